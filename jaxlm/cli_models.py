"""The commands that take a model: sample, chat, inspect, import-hf, export-hf, recipe, bench decode."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cyclopts
from cyclopts import Parameter

from jaxlm.cli_import import check_writable, import_hf
from jaxlm.errors import InputError

if TYPE_CHECKING:
    from jaxlm.loading import Loaded

# What several commands take is said once here.
_MODEL = (
    "a run's name, the directory of a run, a stage or a checkpoint, a Hugging Face directory or owner/name (with "
    "@revision: pinned), or a .gguf file; of a run the fine-tuned model comes first"
)
Model = Annotated[str, Parameter(help=_MODEL)]
Shape = Annotated[str, Parameter(help=f"the name of a preset, such as gpt2, or {_MODEL}")]
Root = Annotated[Path, Parameter(help="directory that holds store/ and runs/")]
Length = Annotated[int, Parameter(help="most tokens of an answer or a continuation")]
Temperature = Annotated[float, Parameter(help="0 is greedy")]
TopK = Annotated[int, Parameter(help="keep the k most likely tokens; 0 is off")]
TopP = Annotated[
    float, Parameter(help="keep the most likely tokens that make up this share of the probability; 1: off")
]
Seed = Annotated[
    int,
    Parameter(
        help="the same seed and the same words give the same text",
        validator=cyclopts.validators.Number(gte=0, lt=2**32),
    ),
]

bench = cyclopts.App(name="bench", help="Measure this machine.")


def _load(name: str, root: Path, *, prepared: bool = True) -> Loaded:
    from jaxlm.loading import load_model

    found = load_model(name, root, prepared=prepared)
    for note in found.notes:
        print(note, file=sys.stderr)
    return found


def sample(
    model: Model,
    /,
    *,
    prompt: str = "",
    max_new_tokens: Length = 100,
    n: int = 1,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    repetition_penalty: float = 1.0,
    overflow: Literal["refuse", "crop", "slide"] = "refuse",
    seed: Seed = 0,
    root: Root = Path("."),
) -> None:
    """Continue a prompt; the text is written while it comes.

    Parameters
    ----------
    prompt
        The text to continue.
    n
        How many continuations.
    min_p
        Keep tokens at least this share as likely as the most likely one.
    typical_p
        Keep the tokens of most usual surprise that make up this share of the probability; 1 is off.
    repetition_penalty
        Above 1: tokens that came before become less likely.
    overflow
        When prompt and new tokens exceed the model's context. refuse: an error. crop: drop the prompt's first tokens.
        slide: go on with the last tokens whenever the context is full.
    """
    from jaxlm import chat as talk
    from jaxlm.sample import Sampling

    options = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    if n < 1:
        raise InputError(f"--n {n}: ask for at least one continuation.")
    talk.sample(
        _load(model, root), prompt, n=n, max_new_tokens=max_new_tokens, sampling=options, overflow=overflow, seed=seed
    )


def chat(
    model: Model,
    /,
    *,
    system: str | None = None,
    max_new_tokens: Length = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    root: Root = Path("."),
) -> None:
    """Talk to a model. On a terminal turn by turn; otherwise standard input is one message.

    Parameters
    ----------
    system
        The system message; empty: the model's own. A model whose template has no place for one refuses it, such as
        those that were fine-tuned here on single questions.
    """
    from jaxlm import chat as talk
    from jaxlm.sample import Sampling

    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    talk.chat(_load(model, root), system=system, max_new_tokens=max_new_tokens, sampling=options, seed=seed)


def inspect(
    model: Shape,
    /,
    *,
    block: int | None = None,
    batch: int = 1,
    length: int | None = None,
    root: Root = Path("."),
) -> None:
    """Print a model's weights, what each is for, and what training and decoding with it cost.

    Parameters
    ----------
    block
        Print this block's parts and the shape of its output instead.
    batch
        Rows of the training step, and rows that decode together.
    length
        Tokens in a row; empty: the model's context, at most 1024 (with --block 4).
    """
    from jaxlm import inspect_model
    from jaxlm.loading import read_shape
    from jaxlm.presets import preset
    from jaxlm.stages.runner import say

    with _presets_suggested(model):
        cfg = preset(model) if _is_preset(model, root) else read_shape(model, root)
    if batch < 1 or (length is not None and length < 1):
        raise InputError(f"--batch {batch} --length {length}: both are at least 1.")
    if block is not None:
        say(inspect_model.block_report(cfg, block, batch=batch, length=length or min(4, cfg.max_seq_len)))
    else:
        say(inspect_model.report(cfg, batch=batch, length=length))


def export_hf(model: Model, directory: Path, /, *, root: Root = Path(".")) -> None:
    """Write a model as safetensors and config.json; models of a published form load in transformers.

    Parameters
    ----------
    directory
        A new one, an empty one or an earlier export.
    """
    import warnings

    from jaxlm.interop import families, save_hf
    from jaxlm.stages.runner import say

    check_writable(directory)
    found = _load(model, root, prepared=False)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        save_hf(directory, found.cfg, found.params, found.tokenizer)
    for note in notes:
        print(note.message, file=sys.stderr)
    family = families.family_of(found.cfg)
    reader = "transformers and jaxlm read it"
    if not family.architecture:
        reader = "jaxlm reads it and transformers does not, for no published family has its "
        reader += ", ".join(families.unpublished(found.cfg)) or "sizes"
    say(f"{directory}: exported as model_type {family.model_type}; {reader}")


def recipe(config: str, /, *, root: Root = Path(".")) -> None:
    """Compute a published evaluation again, and compare it with the published figures.

    Parameters
    ----------
    config
        Its YAML file, such as configs/verdict_gpt2.yaml, or the bare name.
    """
    from jaxlm import recipes
    from jaxlm.stages.runner import say

    found = recipes.load(config)
    say(recipes.report(found, recipes.run(found, root)))


@bench.command
def decode(
    model: Shape = "smollm2-135m",
    /,
    *,
    batch_sizes: tuple[int, ...] = (1, 8),
    prompt_lengths: tuple[int, ...] | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    temperature: Temperature = 1.0,
    top_k: TopK = 50,
    top_p: TopP = 0.9,
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path | None = None,
    root: Root = Path("."),
) -> None:
    """Time compilation, the first token by prompt length, and decoding by batch size, beside the memory's bandwidth.

    A preset gets random weights: time does not depend on them.

    Parameters
    ----------
    batch_sizes
        Rows that decode together.
    prompt_lengths
        Tokens of the prompts whose first token is timed; by default those of 16, 128 and 512 that fit the context.
    new_tokens
        Steps timed together.
    repeats
        Of every measurement; the median counts.
    dtype
        Of weights and arithmetic.
    out
        A directory for decode.json and the plot.
    """
    from jaxlm.presets import preset
    from jaxlm.sample import Sampling
    from jaxlm.sample.timing_report import bench as run

    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    with _presets_suggested(model):
        found = None if _is_preset(model, root) else _load(model, root, prepared=False)
    cfg, params = (preset(model), None) if found is None else found[:2]
    run(
        cfg.replace(compute_dtype=dtype), params, name=model, batch_sizes=batch_sizes, prompt_lengths=prompt_lengths,
        new_tokens=new_tokens, repeats=repeats, sampling=options, out=out,
    )  # fmt: skip


def _is_preset(model: str, root: Path) -> bool:
    """A preset's name, unless a run has it."""
    from jaxlm.presets import PRESETS

    return model in PRESETS and not (root / "runs" / model).exists()


@contextmanager
def _presets_suggested(model: str) -> Iterator[None]:
    """The name of nothing may be a slip in a preset's name, or that of a configuration that has not run."""
    try:
        yield
    except InputError as error:
        sentence, _, hint = str(error).partition("; ")
        if sentence != f"{model}: no such run, stage or directory":
            raise
        from jaxlm.config import find_config
        from jaxlm.presets import PRESETS

        runs = hint.removeprefix("did you mean ").rstrip("?") if hint.startswith("did you mean ") else ""
        if presets := difflib.get_close_matches(model, PRESETS, n=1):
            better = f"did you mean the preset {presets[0]}{f' or {runs}' if runs else ''}?"
        elif runs:
            better = hint
        else:
            better = f"the presets are {', '.join(PRESETS)}."
            with suppress(InputError):
                find_config(model)
                better = f"it is a configuration, whose run is made by jaxlm pipeline {model}."
        raise InputError(f"{sentence}; {better}") from None


def register(app: cyclopts.App) -> None:
    """Adds these commands to `jaxlm`."""
    for command in (sample, chat, inspect, import_hf, export_hf, recipe):
        app.command(command)
    app.command(bench)
