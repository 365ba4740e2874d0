"""The command that opens the playground."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from jaxlm.errors import InputError

Root = Annotated[Path, Parameter(help="directory that holds store/ and runs/")]


def playground(
    *models: str,
    port: int | None = None,
    browser: bool = True,
    root: Root = Path("."),
) -> None:
    """Open a web page on this machine to try models: text as it comes, and what each token's rivals were.

    Parameters
    ----------
    models
        Runs, RUN/STAGE, Hugging Face directories or owner/name, or .gguf files; by default the newest run, before
        and after its fine-tuning.
    port
        Where the page is; by default a free one.
    browser
        Show the page in a browser, where the machine has a screen.
    """
    try:
        from jaxlm.playground import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "jaxlm":
            raise
        raise InputError(f"playground: needs the package {error.name}; pip install 'jaxlm[playground]'.") from None
    from jaxlm.data.download import default_cache_dir
    from jaxlm.playground import open_models, warm
    from jaxlm.stages.runner import say

    listener = server.listen(port)  # before the models, so that a port in use is known at once
    _keep_programs(default_cache_dir() / "programs")
    opened = open_models(models, root)
    for name, model in opened.items():
        for note in model.notes:
            print(note, file=sys.stderr)
        say(f"{name}: ready after {warm(model):.1f} s of compiling")
    address = f"http://{server.HOST}:{listener.getsockname()[1]}/"
    say(f"playground: {address} (Ctrl-C ends it)")
    if browser and _has_screen():
        import webbrowser

        webbrowser.open(address)
    server.serve(opened, listener)
    say("playground: ended")


def _keep_programs(folder: Path) -> None:
    """Compiled programs are kept on disk, so that the next start compiles little; JAX_COMPILATION_CACHE_DIR wins."""
    import jax

    from jaxlm._compiled import VARIABLE, remove_damaged

    chosen = os.environ.get(VARIABLE)
    if not chosen:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    remove_damaged(Path(chosen or folder))


def _has_screen() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def register(app: cyclopts.App) -> None:
    """Adds this command to `jaxlm`."""
    app.command(playground)
