"""What every configuration model shares: immutability, identity, and errors of one sentence. Loads no jax."""

from __future__ import annotations

import difflib
from datetime import date
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from jaxlm.errors import InputError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def cosmetic(default: Any, **kwargs: Any) -> Any:
    """A field that changes no result, and so is left out of stage identities."""
    return Field(default, json_schema_extra={"cosmetic": True}, **kwargs)


M = TypeVar("M", bound="Frozen")


class Frozen(BaseModel):
    """Immutable, hashable, strict about names and about finite numbers."""

    extra_names: ClassVar[tuple[str, ...]] = ()  # keys that a validator of the model takes beside its fields
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `seed: true` as 1."""
        if isinstance(value, bool) and info.field_name:
            kinds = _alternatives(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("expected a number")
        return value

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, validated again from the start.

        Raises:
            InputError: an unknown field or a value out of range.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return validated(type(self), {**values, **changes})

    def identity(self) -> dict[str, Any]:
        """The fields that decide a result, as plain JSON values (cosmetic ones left out, at any depth)."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("cosmetic"):
                continue
            value = getattr(self, name)
            out[name] = value.identity() if isinstance(value, Frozen) else _plain(value)
        return out


def _alternatives(annotation: Any) -> set[Any]:
    """The types that a value may have: those of a union at any depth, without what Annotated says of them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for one in get_args(annotation) for kind in _alternatives(one)}
    return {annotation}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def validated(model: type[M], values: dict[str, Any], where: str = "") -> M:
    """Builds `model` from `values`; every problem becomes one `InputError` sentence with the nearest valid name."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_sentence(model, item) for item in error.errors())
        stop = "" if problems.endswith(("?", ".")) else "."
        raise InputError(f"{where}: {problems}{stop}" if where else f"{problems}{stop}") from None


def takes_text(model: type[Frozen], path: list[str]) -> bool:
    """Whether the option at `path` holds free text, so that a number given for it is text too."""
    field = _section(model, path[:-1]).model_fields.get(path[-1])
    return field is not None and (field.annotation is str or set(get_args(field.annotation)) == {str, type(None)})


def _sentence(model: type[Frozen], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    field, found = ".".join(path) or "configuration", error["input"]
    if error["type"] == "extra_forbidden":
        names = _names_at(model, path[:-1])
        close = difflib.get_close_matches(path[-1], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(sorted(names))}"
        return f"{field}: unknown option; {hint}"
    message = _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if not path or message.startswith(f"{field}."):  # it names the field itself
        return message
    if isinstance(found, dict | BaseModel):
        return f"{field}: {message}"
    shown = repr(found)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}... ({len(shown):,} characters)"
    sentence = f"{field}: {message[0].lower()}{message[1:]}, found {shown}"
    unquoted = error["type"] == "string_type" and isinstance(found, int | float | date)
    return f"{sentence}; put quotes around it" if unquoted else sentence


_SHOWN = 200  # characters of a value that a sentence repeats

# Pydantic's words for these are Python's, not YAML's.
_EXPECTED = {
    "model_type": "expected options, as name: value",
    "tuple_type": "expected a list, such as [a, b]",
    "string_type": "expected a text",
}


def _names_at(model: type[Frozen], path: list[str]) -> list[str]:
    section = _section(model, path)
    return [*section.model_fields, *section.extra_names]


def _section(model: type[Frozen], path: list[str]) -> type[Frozen]:
    """The model of a section; where a name on the way is none, that of the last one that is."""
    for part in path:
        if part not in model.model_fields:
            break
        annotation = model.model_fields[part].annotation
        inner = [item for item in (annotation, *get_args(annotation)) if isinstance(item, type)]
        model = next((item for item in inner if issubclass(item, Frozen)), model)
    return model
