"""Tokenizers by name or from where they were saved."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from jaxlm._json import read_json
from jaxlm.errors import InputError
from jaxlm.tokenizers.base import FILE_NAME, FORMAT, Tokenizer
from jaxlm.tokenizers.bpe import BytePairTokenizer
from jaxlm.tokenizers.char import CharTokenizer
from jaxlm.tokenizers.hf_files import JSON, from_directory
from jaxlm.tokenizers.hf_json import HFTokenizer
from jaxlm.tokenizers.named import PUBLISHED, named
from jaxlm.tokenizers.word import WordTokenizer

SelfContained = CharTokenizer | WordTokenizer | BytePairTokenizer | HFTokenizer

_SAVED: dict[str, type[SelfContained]] = {
    "hf": HFTokenizer,
    "char": CharTokenizer,
    "word": WordTokenizer,
    "bpe": BytePairTokenizer,
}


def load(name_or_path: str | Path) -> Tokenizer:
    """A published encoding, or a tokenizer that was saved.

    Args:
        name_or_path: "gpt2" or "cl100k_base" (a directory of that name is "./gpt2"); a directory that holds
            `tokenizer.jaxlm.json` or a Hugging Face `tokenizer.json`; or such a file. Beside a `tokenizer.json`, the
            model's other files say what the special tokens, the chat template and the stop ids are.

    Raises:
        InputError: there is nothing of that name, or the file is damaged; names the file and the field.
        UnavailableError: a published encoding is in no cache and no mirror, and the network is away.
    """
    if name_or_path in PUBLISHED:
        return named(str(name_or_path))
    path = Path(name_or_path)
    if path.name == JSON and path.is_file():
        return from_directory(path.parent)
    if path.is_dir():
        if not (path / FILE_NAME).is_file() and (path / JSON).is_file():
            return from_directory(path)
        path = path / FILE_NAME
    if not path.is_file():
        names = ", ".join(PUBLISHED)
        raise InputError(f"{path}: no such tokenizer; use {names}, or a directory or file that one was saved to.")
    content = _read(path)
    kind = content.pop("kind")
    fingerprint = content.pop("fingerprint", None)
    if kind == "named":
        tokenizer = _published(path, content)
    elif kind in _SAVED:
        tokenizer = _self_contained(path, _SAVED[kind], content)
    else:
        known = ", ".join([*_SAVED, "named"])
        raise InputError(f"{path}: field kind: {kind!r} is unknown, expected one of {known}; save the tokenizer again.")
    if tokenizer.fingerprint != fingerprint:
        raise InputError(
            f"{path}: field fingerprint: found {fingerprint!r}, but the content has {tokenizer.fingerprint!r}; "
            "the file was changed or damaged, so save the tokenizer again."
        )
    return tokenizer


def is_there(name: str) -> bool:
    """Whether `load` finds something of that name. Reads no file."""
    path = Path(name)
    return name in PUBLISHED or path.is_file() or any((path / file).is_file() for file in (FILE_NAME, JSON))


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, hint="save the tokenizer again")
    if not isinstance(content.get("kind"), str):
        raise InputError(f"{path}: field kind: missing, so this is not a file that a jaxlm tokenizer was saved to.")
    if content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: field format: expected {FORMAT}; the file is of another version of jaxlm.")
    return content


def _self_contained(path: Path, cls: type[SelfContained], content: dict[str, Any]) -> SelfContained:
    names = [field.name for field in fields(cls) if field.compare]  # the others are no part of a tokenizer's identity
    for name in [*names, *content]:
        if name not in content or name not in names:
            found = "unknown" if name in content else "missing"
            raise InputError(f"{path}: field {name}: {found}; save the tokenizer again.")
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name in names:
        try:
            values[name] = TypeAdapter(types[name]).validate_python(content[name])
        except ValidationError as error:
            problem = error.errors()[0]
            raise InputError(f"{path}: field {name}: {problem['msg']}; save the tokenizer again.") from None
    if cls is HFTokenizer:
        values["template_from"] = str(path)
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{path}: field {error}") from None


def _published(path: Path, content: dict[str, Any]) -> Tokenizer:
    name = content.get("name")
    if name not in PUBLISHED:
        raise InputError(f"{path}: field name: {name!r} is unknown, expected one of {', '.join(PUBLISHED)}.")
    expected = PUBLISHED[name].resource.sha256
    if content.get("sha256") != expected:
        raise InputError(f"{path}: field sha256: found {content.get('sha256')!r}, but {name} is the file {expected}.")
    return named(name)
