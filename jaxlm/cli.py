"""The `jaxlm` command. Every command ends with one of the exit codes of `jaxlm.errors`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import cyclopts
from cyclopts import Parameter

from jaxlm import __version__
from jaxlm.errors import InputError, JaxlmError, Preempted

app = cyclopts.App(
    name="jaxlm",
    version=__version__,
    help="Language models as pure JAX functions: train, resume, fine-tune, evaluate, sample.",
    result_action="return_value",
)

Set = Annotated[
    list[str] | None, Parameter(name="--set", help="replace a setting, e.g. --set train.steps=500", negative="")
]
Root = Annotated[Path, Parameter(help="directory that holds store/ and runs/")]


@app.command
def pipeline(config: str, /, *, set_: Set = None, root: Root = Path(".")) -> None:
    """Run the whole chain as a Prefect flow: download, tokenize, pretrain, fine-tune, evaluate."""
    from flows import pipeline as flow

    flow.run(config, set_ or [], str(root))


@app.command
def prepare(config: str, /, *, set_: Set = None, root: Root = Path(".")) -> None:
    """Get the text and tokenize it, without Prefect."""
    from jaxlm.config import load
    from jaxlm.stages.plan import plan

    has_sft = any(spec.stage == "tokenize_sft" for spec in plan(load(config, tuple(set_ or []))))
    _chain(config, set_, root, last="tokenize_sft" if has_sft else "tokenize")


@app.command
def pretrain(config: str, /, *, set_: Set = None, root: Root = Path(".")) -> None:
    """Train the base model, without Prefect."""
    _chain(config, set_, root, last="pretrain")


@app.command
def sft(config: str, /, *, set_: Set = None, root: Root = Path(".")) -> None:
    """Fine-tune the base model, without Prefect."""
    _chain(config, set_, root, last="sft")


@app.command
def evaluate(config: str, /, *, set_: Set = None, root: Root = Path(".")) -> None:
    """Measure the models and write the report, without Prefect."""
    _chain(config, set_, root, last="evaluate")


def _chain(config: str, overrides: list[str] | None, root: Path, *, last: str) -> None:
    from jaxlm.config import load
    from jaxlm.stages.runner import run_chain

    cfg = load(config, tuple(overrides or []))
    run_chain(cfg if str(root) == "." else cfg.replace(root=str(root)), last=last, config_name=config)


@app.command
def sample(
    run: str,
    /,
    *,
    prompt: str = "",
    max_new_tokens: int = 100,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    root: Root = Path("."),
) -> None:
    """Continue a prompt with a trained model.

    Parameters
    ----------
    run
        A run's name, or the directory of a run, a stage or a checkpoint. A run's fine-tuned model comes first.
    prompt
        The text to continue.
    max_new_tokens
        Longest continuation.
    n
        How many continuations.
    temperature
        0 is greedy.
    top_k
        Keep the k most likely tokens; 0 is off.
    top_p
        Keep the most likely tokens that make up this share of the probability; 1 is off.
    min_p
        Keep tokens at least this share as likely as the most likely one.
    seed
        The same seed gives the same texts.
    """
    import jax

    from jaxlm.sample import Sampling, generate, prepare
    from jaxlm.stages import runs, saved
    from jaxlm.stages.runner import say

    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if n < 1:
        raise InputError(f"--n {n}: ask for at least one continuation.")
    found = saved.load(runs.resolve(run, root, stages=("sft", "pretrain")))
    for note in found.notes:
        print(note, file=sys.stderr)
    tokenizer = found.tokenizer
    eot = tokenizer.eot_id
    asked = tokenizer.encode(prompt)
    start = ([] if eot is None else [eot]) + asked
    if not start:
        raise InputError("--prompt: it is empty, and this model's tokenizer has no start of text; give a prompt.")
    outs = generate(
        found.cfg, prepare(found.cfg, found.params), [start] * n, sampling=options, max_new_tokens=max_new_tokens,
        stop_ids=() if eot is None else (eot,), key=jax.random.key(seed), tokenizer=tokenizer,
    )  # fmt: skip
    for out in outs:
        say(tokenizer.decode(asked + [token for token in out.tokens if token != eot]))


@app.command
def verify(run: str, /, *, root: Root = Path(".")) -> None:
    """Check every digest of a run, its stages and its checkpoints; name what is damaged."""
    from jaxlm.stages import runs, store
    from jaxlm.stages.runner import say

    place = runs.resolve(run, root)
    stages = list(runs.stages_of(place).values()) if (place / "run.json").is_file() else [place]
    damage = [f"{stage}: {line}" for stage in stages for line in store.verify(stage)]
    if damage:
        raise InputError("; ".join(damage))
    say(f"{place}: {len(stages)} stages, every file as it was written")


@app.command
def doctor() -> None:
    """Print what a bug report needs: devices, versions, caches, free disk."""
    import json
    import shutil

    import jax

    from jaxlm.data.download import default_cache_dir
    from jaxlm.stages.provenance import environment
    from jaxlm.stages.runner import say

    facts = environment() | {
        "default backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "cpu cores": len(os.sched_getaffinity(0)),
        "download cache": str(default_cache_dir()),
        "mirrors": os.environ.get("JAXLM_MIRROR", ""),
        "free disk here, GB": round(shutil.disk_usage(".").free / 1e9, 1),
    }
    say(json.dumps(facts, indent=2, default=str))


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs a command. An expected failure is one sentence on standard error and its exit code."""
    try:
        app(sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False)
    except JaxlmError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except cyclopts.CycloptsError as error:
        print(f"jaxlm: {' '.join(str(error).split())} See jaxlm --help.", file=sys.stderr)
        raise SystemExit(InputError.exit_code) from None
    except KeyboardInterrupt:
        print("jaxlm: stopped.", file=sys.stderr)
        raise SystemExit(Preempted.exit_code) from None
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


if __name__ == "__main__":
    main()
