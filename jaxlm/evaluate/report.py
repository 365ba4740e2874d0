"""The report of a run: `report.json` for programs, `report.md` with pictures for a forge, `report.html` for a browser.

The input is one plain dict, `ReportData`. What it leaves out is left out of the pages too, section by section; the main
figures of `report.json` are always there, null where they were not measured. Loads no jax.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from jaxlm._style import COLORS
from jaxlm.errors import DiskError
from jaxlm.evaluate import plots
from jaxlm.evaluate.accuracy import TypeAccuracy, exact_match, normalize, wilson_interval
from jaxlm.evaluate.formats import cell, count, duration, fenced, interval, number, percent, signed_percent, times

SCHEMA_VERSION = 1
FIGURES_DIR = "report-files"

Scalar = str | int | float | bool | None


class ModelInfo(TypedDict):
    """The model in figures."""

    parameters: int
    shape: NotRequired[str]  # one line for people, such as "4 layers, D = 128, 4 heads"


class DataInfo(TypedDict, total=False):
    """The training text in figures."""

    source: str
    chars: int  # characters of training text
    tokens: int  # tokens of training text
    stories: int  # documents in it
    val_tokens: int  # tokens that val_loss was measured on
    val_bytes: int  # their text in UTF-8 bytes
    vocab_size: int
    tokenizer: str


class Sample(TypedDict):
    """A text that the model wrote."""

    prompt: str  # may be empty
    text: str  # what came after the prompt
    label: NotRequired[str]  # which model and which settings


class Example(TypedDict):
    """One question, worked."""

    prompt: str
    expected: str
    type: NotRequired[str]
    before: NotRequired[str | None]  # the pretrained model's answer
    after: NotRequired[str | None]  # the fine-tuned model's answer


class ReportData(TypedDict):
    """Everything a report shows. Losses are nats per token, accuracies fractions, times seconds."""

    name: str
    val_loss: float  # over the whole validation split
    perplexity: float
    bits_per_byte: NotRequired[float | None]
    floor: NotRequired[float | None]  # lowest reachable val_loss; None where the text has no known one
    order5_loss: NotRequired[float | None]  # val_loss of an order-5 model
    accuracy_before: NotRequired[float | None]
    accuracy_after: NotRequired[float | None]
    accuracy_by_type: NotRequired[Mapping[str, TypeAccuracy]]  # from `accuracy.by_type`
    seconds: NotRequired[Mapping[str, float]]  # stage -> seconds, in order
    model: NotRequired[ModelInfo]
    data: NotRequired[DataInfo]
    history: NotRequired[list[dict[str, Any]]]  # pretraining's metrics.jsonl: `metrics_log.history`
    sft_history: NotRequired[list[dict[str, Any]]]  # the same of fine-tuning
    samples: NotRequired[list[Sample]]
    examples: NotRequired[list[Example]]
    config_summary: NotRequired[Mapping[str, Scalar]]  # the options that a reader asks for first
    config: NotRequired[Mapping[str, Any]]  # all of them, nested
    environment: NotRequired[Mapping[str, Scalar]]  # device, cores, platform, git commit, library versions …
    command: NotRequired[str]  # what to type to get this run again
    created: NotRequired[str]  # ISO 8601
    notes: NotRequired[list[str]]  # what a reader must know: damaged checkpoints passed over, restarts, skipped steps


class ReportPaths(NamedTuple):
    """Where the report lies; `figures` belong beside `markdown`, `html` needs no other file."""

    json: Path
    markdown: Path
    html: Path
    figures: tuple[Path, ...]


class Figure(NamedTuple):
    """One picture of the report."""

    name: str
    title: str
    caption: str
    picture: Any  # matplotlib.figure.Figure


def write_report(data: ReportData, directory: str | Path) -> ReportPaths:
    """Writes report.json, report.md with its pictures in `report-files/`, and report.html into `directory`.

    Raises:
        ValueError: a key that `ReportData` does not have.
        DiskError: the files cannot be written.
    """
    unknown = sorted(set(data) - set(ReportData.__annotations__))
    if unknown:
        raise ValueError(f"ReportData has no {', '.join(unknown)}")
    folder = Path(directory)
    view = _view(data)
    drawn = figures(data)
    paths = ReportPaths(
        folder / "report.json",
        folder / "report.md",
        folder / "report.html",
        tuple(folder / FIGURES_DIR / f"{figure.name}.png" for figure in drawn),
    )
    try:
        (folder / FIGURES_DIR if drawn else folder).mkdir(parents=True, exist_ok=True)
        for figure, path in zip(drawn, paths.figures, strict=True):
            plots.save_png(figure.picture, path)
        paths.markdown.write_text(_render("report.md.j2", view, drawn), encoding="utf-8")
        paths.html.write_text(_render("report.html.j2", view, drawn), encoding="utf-8")
        paths.json.write_text(json.dumps(to_json(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{folder}: cannot write the report ({error.strerror or error}); free some space.") from error
    return paths


def to_json(data: ReportData) -> dict[str, Any]:
    """`report.json` as a dict: `data`, the main figures null where they are missing, and what follows from them.

    Figures that are not finite become null. Of the histories only split, step, tokens and loss are kept.
    """
    out: dict[str, Any] = {"schema": SCHEMA_VERSION}
    for key in ("name", "val_loss", "floor", "order5_loss", "perplexity", "bits_per_byte"):
        out[key] = data.get(key)
    out["above_floor"] = _excess(data.get("val_loss"), data.get("floor"))
    out["order5_above_floor"] = _excess(data.get("order5_loss"), data.get("floor"))
    out |= {"accuracy_before": data.get("accuracy_before"), "accuracy_after": data.get("accuracy_after")}
    out["accuracy_by_type"] = data.get("accuracy_by_type", {})
    out["seconds"] = data.get("seconds", {})
    out |= {key: value for key, value in data.items() if key not in out}
    for key in ("history", "sft_history"):
        if key in out:
            points = (record for record in out[key] if "loss" in record)
            out[key] = [{name: record.get(name) for name in ("split", "step", "tokens", "loss")} for record in points]
    return {key: _finite(value) for key, value in out.items()}


def figures(data: ReportData) -> list[Figure]:
    """The pictures that `data` holds something for, in the order of the page."""
    history, floor, order5 = data.get("history", []), data.get("floor"), data.get("order5_loss")
    levels = (
        " The dashed line is the floor, the loss of the process that wrote the text: no model does better on average."
        if floor is not None
        else ""
    )
    drawn = [
        Figure(
            "loss",
            "Loss by tokens seen",
            f"Training loss of each logged step and loss on validation rows.{levels}",
            plots.loss_figure(history, floor=floor, order5=order5),
        ),
        Figure(
            "perplexity",
            "Perplexity by tokens seen",
            "exp(loss): among how many equally likely tokens the model hesitates. The axis is cut above,"
            " so early points may lie outside.",
            plots.perplexity_figure(history, floor=floor, order5=order5),
        ),
        Figure(
            "accuracy",
            "Right answers by type of question",
            "Bars with Wilson 95 % intervals; the markers are strategies that need no model.",
            plots.accuracy_figure(data.get("accuracy_by_type", {})),
        ),
        Figure(
            "sft_loss",
            "Fine-tuning loss by tokens seen",
            "Loss on the response tokens only.",
            plots.loss_figure(data.get("sft_history", [])),
        ),
    ]
    return [figure for figure in drawn if figure.picture is not None]


def _view(data: ReportData) -> dict[str, Any]:
    """What the templates read: the data and what is worked out from it."""
    table = data.get("accuracy_by_type", {})
    n_questions = sum(row["n"] for row in table.values())
    overall = data.get("accuracy_after") if data.get("accuracy_after") is not None else data.get("accuracy_before")
    return {
        **data,
        "tiles": _tiles(data),
        "above_floor": _excess(data["val_loss"], data.get("floor")),
        "order5_above_floor": _excess(data.get("order5_loss"), data.get("floor")),
        "n_questions": n_questions,
        "overall_interval": wilson_interval(round(overall * n_questions), n_questions)
        if n_questions and overall is not None
        else None,
        "strategies": sorted({name for row in table.values() for name in row["baselines"]}),
        "asked_before": any(row["before"] is not None for row in table.values()),
        "asked_after": any(row["after"] is not None for row in table.values()),
        "examples": [_marked(example) for example in data.get("examples", [])],
        "details": _details(data),
        "config_yaml": _yaml(data["config"]) if data.get("config") else None,
        "seconds_total": sum(data.get("seconds", {}).values()),
    }


class Tile(NamedTuple):
    """One of the figures at the top of the page."""

    label: str
    value: str
    unit: str
    note: str


def _tiles(data: ReportData) -> list[Tile]:
    floor, order5 = data.get("floor"), data.get("order5_loss")
    above = _excess(data["val_loss"], floor)
    tiles = [
        Tile(
            "Validation loss",
            number(data["val_loss"]),
            "nats per token",
            f"{signed_percent(above)} against the floor of {number(floor)}" if above is not None else "",
        ),
        Tile(
            "Perplexity",
            number(data["perplexity"]),
            "per token",
            f"floor {number(math.exp(floor))}" if floor is not None else "",
        ),
    ]
    if data.get("bits_per_byte") is not None:
        tiles.append(Tile("Compression", number(data.get("bits_per_byte")), "bits per byte", ""))
    before, after = data.get("accuracy_before"), data.get("accuracy_after")
    if after is not None:
        note = f"{percent(before)} before fine-tuning" if before is not None else ""
        tiles.append(Tile("Right answers", percent(after), "", note))
    elif before is not None:
        tiles.append(Tile("Right answers", percent(before), "", "without fine-tuning"))
    if order5 is not None:
        excess = _excess(order5, floor)
        note = f"{signed_percent(excess)} against the floor" if excess is not None else ""
        tiles.append(Tile("Order-5 model", number(order5), "nats per token", note))
    if data.get("seconds"):
        tiles.append(Tile("Time", duration(sum(data["seconds"].values())), "", "all stages together"))
    return tiles


def _details(data: ReportData) -> list[tuple[str, str]]:
    """The table of model and data, without what is unknown."""
    model: Mapping[str, Any] = data.get("model", {})
    text: Mapping[str, Any] = data.get("data", {})
    seen = max(
        (record["tokens"] for record in data.get("history", []) if record.get("tokens") is not None), default=None
    )
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("Parameters", model.get("parameters"), count),
        ("Shape", model.get("shape"), str),
        ("Tokens trained on", seen, count),
        ("Text", text.get("source"), str),
        ("Documents", text.get("stories"), count),
        ("Characters", text.get("chars"), count),
        ("Tokens", text.get("tokens"), count),
        ("Validation tokens", text.get("val_tokens"), count),
        ("Validation bytes", text.get("val_bytes"), count),
        ("Tokenizer", text.get("tokenizer"), str),
        ("Vocabulary", text.get("vocab_size"), count),
    ]
    return [(label, form(value)) for label, value, form in rows if value is not None]


def _marked(example: Example) -> dict[str, Any]:
    """The example with its answers as they are compared, and `right_before`, `right_after` (None without an answer)."""
    marks: dict[str, Any] = dict(example)
    for name in ("before", "after"):
        answer = marks.get(name)
        marks[f"right_{name}"] = None if answer is None else exact_match([answer], [example["expected"]])[0]
        marks[name] = None if answer is None else normalize(answer) or "(nothing)"
    return marks


def _render(template: str, view: Mapping[str, Any], drawn: list[Figure]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    forms: tuple[Callable[..., str], ...] = (number, percent, times, interval, count, duration, cell, fenced)
    environment.filters |= {form.__name__: form for form in forms}
    pictures = {figure.name: figure for figure in drawn}
    if environment.autoescape:
        environment.globals["svg"] = lambda figure: Markup(plots.inline_svg(figure.picture, figure.name, figure.title))
    return environment.get_template(template).render(**view, figures=pictures, figures_dir=FIGURES_DIR, colors=COLORS)


def _excess(loss: float | None, floor: float | None) -> float | None:
    return loss / floor - 1 if loss is not None and floor else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True)).rstrip()
