"""The commands about runs that are there: verify, diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from jaxlm.errors import InputError

Root = Annotated[Path, Parameter(help="directory that holds store/ and runs/")]
Verified = Annotated[
    str, Parameter(help="a run's name, RUN/STAGE, or the directory of a run, a stage or an imported model")
]
Run = Annotated[str, Parameter(help="a run's name, RUN/STAGE, or the directory of a run or a stage")]


def verify(run: Verified, /, *, root: Root = Path(".")) -> None:
    """Check every digest of a run, its stages and its checkpoints, or of an imported model; name what is damaged."""
    from jaxlm.stages import runs, verification
    from jaxlm.stages.runner import say

    place = runs.resolve(run, root)
    if damage := verification.verify_place(place):
        raise InputError("; ".join(sentence.rstrip(".") for sentence in damage) + ".")
    what = "an imported model" if verification.is_imported(place) else f"{verification.stages_in(place)} stages"
    say(f"{place}: {what}, every file as it was written")


def diff(first: Run, second: Run, /, *, root: Root = Path(".")) -> None:
    """Say why two runs differ: settings, inputs, code, libraries, devices, and where their losses part."""
    from jaxlm.stages import diff as compared
    from jaxlm.stages import runs
    from jaxlm.stages.runner import say

    say(compared.report(runs.resolve(first, root), runs.resolve(second, root)))


def register(app: cyclopts.App) -> None:
    """Adds these commands to `jaxlm`."""
    app.command(verify)
    app.command(diff)
