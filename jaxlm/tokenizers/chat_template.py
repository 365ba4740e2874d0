"""Chat templates: Jinja programs that come with a model and turn a conversation into its prompt. Loads no jax.

A template is foreign code, so it runs in Jinja's immutable sandbox, sees nothing but strings, numbers, lists and dicts,
and can change none of them. What it may call is what transformers offers it: `raise_exception`, `strftime_now`,
`namespace`, `dict`, and a `tojson` that does not escape for HTML. The sandbox keeps a template from reaching Python.
What is bounded is the prompt, a product (`*`, `**`) and a range. What is not: the running time, and the memory for
values on the way, which `~`, `%` and filters such as `center` can make as large as they like.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxlm.errors import InputError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
LARGEST_REPEAT = 1_000_000  # items in the result of `*`: a template has no use for more, an attack on memory has
LARGEST_PROMPT = 10_000_000  # characters


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt of a conversation.

    Args:
        template: the Jinja source.
        messages: mappings with at least `role` and, mostly, `content`, oldest first.
        add_generation_prompt: end with the opening of the assistant's next turn.
        tools: JSON schemas of functions that the model may call.
        variables: what else the template is told, such as `bos_token` and `eos_token`.

    Raises:
        InputError: the template is not valid Jinja, refuses the conversation (`raise_exception`), or does what the
            sandbox forbids; or `messages` is not a list of mappings. One sentence, with the template's own reason.
    """
    import jinja2

    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not all(isinstance(message, Mapping) for message in messages):
        raise InputError("messages: expected a list of mappings with role and content.")
    told = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        parts, left = [], LARGEST_PROMPT
        for part in _compiled(template).generate(**_plain(variables | told)):
            parts.append(part)
            left -= len(part)
            if left < 0:
                raise jinja2.exceptions.SecurityError(f"a prompt of more than {LARGEST_PROMPT:,} characters")
        return "".join(parts)
    except jinja2.exceptions.SecurityError as error:
        raise InputError(f"chat template: does what a template may not do ({_line(error)}); do not use it.") from None
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise InputError(f"chat template, line {error.lineno}: not valid Jinja ({_line(error)}).") from None
    except jinja2.exceptions.TemplateError as error:
        raise InputError(f"chat template: refuses this conversation: {_line(error)}.") from None
    except (RecursionError, MemoryError):
        raise InputError("chat template: never comes to an end; do not use it.") from None
    except Exception as error:  # a template is a program, and can fail in every way that Python can
        raise InputError(f"chat template: fails with {type(error).__name__}: {_line(error)}.") from None


def pick(found: object, *, tools: bool = False, where: str = "chat_template") -> str | None:
    """The template among those that a file holds: one string, or a list of `{"name": ..., "template": ...}`.

    Raises:
        InputError: it is neither, or has no template named default.
    """
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        chosen = (named.get("tool_use") if tools else None) or named.get("default")
        if isinstance(chosen, str):
            return chosen
    raise InputError(f"{where}: expected a template or a list of named ones with a default.")


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")[:300]


def _plain(value: Any) -> Any:
    """A copy made of plain types: an object would bring methods that the sandbox does not know to be dangerous."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    raise InputError(
        f"messages: a chat template takes text, numbers, lists and mappings, found {type(value).__name__}."
    )


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
            numbers = all(isinstance(side, int | float) for side in (left, right))
            power = operator == "**" and not (numbers and abs(left) < 1000 and abs(right) < 100)
            if power or (not numbers and sizes[0] * sizes[1] > LARGEST_REPEAT):
                raise jinja2.exceptions.SecurityError(f"the product of {operator} would be too large")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}`: marks the assistant's own words for training; renders its body."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own way to declare it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own, without names that reach into Python."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    helpers: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": lambda *args, **values: _filled(Namespace(), dict(*args, **values)),
        "dict": lambda *args, **values: dict(*args, **values),
    }
    environment.globals.update(helpers)
    return environment


def _filled(namespace: Any, values: Mapping[str, Any]) -> Any:
    for name, value in values.items():
        namespace[name] = value
    return namespace


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
