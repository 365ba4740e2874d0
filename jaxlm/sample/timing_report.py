"""The result of `jaxlm.sample.timing` as tables, a plot and files; `bench` measures and shows, for the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import ModelConfig
from jaxlm.model import Params
from jaxlm.sample.options import Sampling
from jaxlm.sample.timing import Timings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_INK, _MUTED, _GRID, _OURS, _BOUND = "#1f2430", "#5d6675", "#e3e6ea", "#1859b5", "#c2570c"


def table(timings: Timings) -> tuple[Table, Table]:
    """The result as tables for a terminal: by prompt length, and by batch size."""
    from rich.table import Table

    first = Table(title=f"{timings.name}: one prompt, on {timings.device}")
    for column in ("prompt tokens", "padded to", "compile s", "first token ms"):
        first.add_column(column, justify="right")
    for p in timings.prompts:
        first.add_row(str(p.prompt_length), str(p.padded_length), f"{p.compile_s:.1f}", f"{1e3 * p.first_token_s:.1f}")
    size, speed = timings.weight_bytes / 1e6, timings.bytes_per_s / 1e9
    bound = 1e3 * timings.roofline_s
    then = Table(
        title=f"{timings.name}: decoding",
        caption=f"reading {size:.0f} MB of weights at the {speed:.1f} GB/s measured here takes {bound:.2f} ms a step\n"
        f"sampling: {_options(timings.sampling)}",
    )
    for column in ("batch", "compile s", "step ms", "tokens/s", "sampling", "of the roofline"):
        then.add_column(column, justify="right")
    for b in timings.batches:
        then.add_row(
            str(b.batch), f"{b.compile_s:.1f}", f"{1e3 * b.step_s:.2f}", f"{b.tokens_per_s:.1f}",
            f"{b.sampling_share:.1%}", f"{timings.roofline_s / b.step_s:.0%}",
        )  # fmt: skip
    return first, then


def _options(sampling: Sampling) -> str:
    """The options that are not off, and the temperature."""
    on = [f.name for f in fields(sampling) if f.name == "temperature" or getattr(sampling, f.name) != f.default]
    return ", ".join(f"{name}={getattr(sampling, name)}" for name in on)


def figure(timings: Timings) -> Figure:
    """Time to the first token by prompt length; step time and throughput by batch size, each beside its roofline."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9, "axes.edgecolor": _MUTED, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _MUTED,
        "ytick.color": _MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": _GRID, "legend.frameon": False, "svg.fonttype": "none",
    }  # fmt: skip
    batches = [b.batch for b in timings.batches]
    curves = (
        ("prompt (tokens)", "time to first token (ms)", [p.prompt_length for p in timings.prompts],
         [1e3 * p.first_token_s for p in timings.prompts], None),
        ("batch (rows)", "time between tokens (ms)", batches, [1e3 * b.step_s for b in timings.batches],
         [1e3 * timings.roofline_s] * len(batches)),
        ("batch (rows)", "throughput (tokens/s)", batches, [b.tokens_per_s for b in timings.batches],
         [n / timings.roofline_s for n in batches]),
    )  # fmt: skip
    with mpl.rc_context(style):
        drawn = Figure(figsize=(10, 3.2), layout="constrained")
        drawn.suptitle(f"Decoding {timings.name} on {timings.device}", fontsize=10)
        for axes, (x_label, y_label, x, y, bound) in zip(drawn.subplots(1, 3), curves, strict=True):
            axes.plot(x, y, "o-", color=_OURS, label="measured")
            if bound is not None:
                axes.plot(x, bound, "_--", color=_BOUND, label="reading the weights")
                axes.legend()
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(n) for n in x])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
    return drawn


def save(timings: Timings, folder: Path) -> list[Path]:
    """Writes decode.json, decode.png and decode.svg, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record = asdict(timings) | {"roofline_s": timings.roofline_s}
    for row, b in zip(record["batches"], timings.batches, strict=True):
        row |= {"tokens_per_s": b.tokens_per_s, "sampling_share": b.sampling_share}
    paths = [folder / f"decode.{kind}" for kind in ("json", "png", "svg")]
    paths[0].write_text(json.dumps(record, indent=2) + "\n")
    drawn = figure(timings)
    for path in paths[1:]:
        drawn.savefig(path, dpi=150)
    return paths


def bench(cfg: ModelConfig, params: Params | None = None, *, out: Path | None = None, **options: Any) -> Timings:
    """Measures, prints the tables, and writes the files where `out` says. `options` are those of `measure`."""
    from rich.console import Console

    timings = measure(cfg, params, **options)
    console = Console()
    for part in table(timings):
        console.print(part)
    if out is not None:
        console.print("wrote " + ", ".join(str(path) for path in save(timings, out)))
    return timings
