"""The `jaxlm` command. Every command ends with one of the exit codes of `jaxlm.errors`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import cyclopts
from cyclopts import Parameter

from jaxlm import __version__, cli_flows, cli_models, cli_playground, cli_runs
from jaxlm._compiled import VARIABLE
from jaxlm._memory import cores
from jaxlm.errors import InputError, JaxlmError, Preempted

app = cyclopts.App(
    name="jaxlm",
    version=__version__,
    help="Language models as pure JAX functions: train, resume, fine-tune, evaluate, sample.",
    result_action="return_value",
)

for group in (cli_flows, cli_models, cli_playground, cli_runs):
    group.register(app)

Set = Annotated[
    list[str] | None, Parameter(name="--set", help="replace a setting, e.g. --set train.steps=500", negative="")
]
Root = Annotated[Path, Parameter(help="directory that holds store/ and runs/")]


@app.command
def pipeline(config: str, /, *, set_: Set = None, root: Root = Path(".")) -> None:
    """Run the whole chain as a Prefect flow: download, tokenize, pretrain, fine-tune, evaluate."""
    cli_flows.flow("pipeline", config, set_=set_, root=root)


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
def doctor() -> None:
    """Print what a bug report needs: devices, versions, caches, free disk."""
    import json
    import shutil
    from importlib import metadata

    import jax

    from jaxlm.data.download import default_cache_dir
    from jaxlm.stages.provenance import environment
    from jaxlm.stages.runner import say

    programs = f"kept by the playground alone, in {default_cache_dir() / 'programs'}"
    facts = environment() | {
        "default backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "cpu cores": cores(),
        "prefect": metadata.version("prefect"),
        "download cache": str(default_cache_dir()),
        "compiled programs": os.environ.get(VARIABLE) or programs,
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
    except OSError as error:  # a path that the system refuses, where no command has better words for it
        place = f"{error.filename}: " if error.filename else ""
        print(f"jaxlm: {place}{error.strerror or error}; choose another path.", file=sys.stderr)
        raise SystemExit(InputError.exit_code) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
