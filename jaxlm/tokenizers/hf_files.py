"""The files of a Hugging Face tokenizer: `tokenizer.json` and what stands beside it. Loads no jax."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import DiskError, InputError
from jaxlm.tokenizers.chat_template import pick
from jaxlm.tokenizers.hf_json import ROLES, HFTokenizer, canonical

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


def from_directory(directory: str | Path) -> HFTokenizer:
    """The tokenizer of a Hugging Face model directory.

    Reads `tokenizer.json`, and where they are, `tokenizer_config.json` (special tokens, BOS rule, template),
    `special_tokens_map.json`, `chat_template.jinja` (which comes before the template in the config) and
    `generation_config.json` (`eos_token_id`, an int or a list).

    Raises:
        InputError: `tokenizer.json` is missing or not one, or a file beside it is damaged; names the file.
    """
    folder = Path(directory)
    if not (folder / JSON).is_file():
        other = "; it has only a SentencePiece model, so convert it with transformers first"
        hint = other if (folder / "tokenizer.model").is_file() else ""
        raise InputError(f"{folder / JSON}: there is no such file{hint}.")
    definition = _read(folder / JSON)
    config = _read(folder / CONFIG, optional=True)
    older = _read(folder / "special_tokens_map.json", optional=True)
    generation = _read(folder / "generation_config.json", optional=True)
    stop = generation.get("eos_token_id")
    template = pick(config.get("chat_template"), where=f"{folder / CONFIG}: field chat_template")
    if (folder / TEMPLATE).is_file():
        template = _text(folder / TEMPLATE)
    specials = ((role, _content(config.get(role) or older.get(role))) for role in ROLES)
    add_bos = config.get("add_bos_token")
    try:
        tokenizer = HFTokenizer(
            canonical(definition),
            special_tokens=tuple((role, text) for role, text in specials if text),
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            stop_ids=() if stop is None else tuple(map(int, stop if isinstance(stop, list) else [stop])),
            chat_template=template,
        )
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{folder / JSON}: {error}") from None
    for role, text in tokenizer.special_tokens:
        if tokenizer.backend.token_to_id(text) is None:
            raise InputError(f"{folder / CONFIG}: field {role}: {text!r} is not in the vocabulary of {JSON}.")
    return tokenizer


def write_directory(tokenizer: HFTokenizer, directory: str | Path) -> list[Path]:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, for transformers to load.

    Raises:
        DiskError: a file cannot be written.
    """
    folder = Path(directory)
    config: dict[str, Any] = dict(tokenizer.special_tokens) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["clean_up_tokenization_spaces"] = False
    if tokenizer.add_bos is not None:
        config["add_bos_token"] = tokenizer.add_bos
    contents = {JSON: tokenizer.definition, CONFIG: json.dumps(config, indent=2) + "\n"}
    if tokenizer.chat_template is not None:
        contents[TEMPLATE] = tokenizer.chat_template
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written ({error.strerror}); free the disk.") from None
    return [folder / name for name in contents]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions.") from None
    except ValueError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error}); download it again.") from None


def _read(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}; download it again.")
    return content


def _content(token: object) -> str | None:
    """A special token's text, which files hold as it is or as `{"content": ...}`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
