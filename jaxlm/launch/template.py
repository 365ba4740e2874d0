"""Batch scripts and manifests from their templates."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jinja2

from jaxlm.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"


def rendered(path: str | None, default: str, **values: Any) -> str:
    """A template with its values filled in.

    Args:
        path: a file of the user's; None takes the built-in one.
        default: the name of the built-in one.
        values: what the template may use.

    Raises:
        InputError: there is no such file, it is not a template, or it uses a value that does not exist.
    """
    file = TEMPLATES / default if path is None else Path(path)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    try:
        return environment.from_string(file.read_text(encoding="utf-8")).render(**values)
    except OSError as error:
        raise InputError(f"{file}: no readable template ({error.strerror}).") from None
    except jinja2.TemplateError as error:
        raise InputError(f"{file}: not a usable template ({error}); compare it with {TEMPLATES / default}.") from None
