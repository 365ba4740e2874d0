"""The files of a Hugging Face tokenizer: `tokenizer.json` and what stands beside it. Loads no jax."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm._json import read_json
from jaxlm.errors import DiskError, InputError
from jaxlm.tokenizers.bos import settled
from jaxlm.tokenizers.chat_template import pick
from jaxlm.tokenizers.hf_json import ROLES, HFTokenizer, canonical

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


def from_directory(directory: str | Path) -> HFTokenizer:
    """The tokenizer of a Hugging Face model directory.

    Reads `tokenizer.json`, and where they are, `tokenizer_config.json` (special tokens, template),
    `special_tokens_map.json`, `chat_template.jinja` (which comes before the template in the config) and
    `generation_config.json` (`eos_token_id`, an int or a list; where it says nothing, `config.json`). Whether texts
    start with a token, the post-processor of `tokenizer.json` says; `add_bos_token` of the config does not count, as in
    transformers.

    Raises:
        InputError: `tokenizer.json` is missing or not one, or a file beside it is damaged; names the file.
    """
    folder = Path(directory)
    if not (folder / JSON).is_file():
        other = "; it has only a SentencePiece model, so convert it with transformers first"
        hint = other if (folder / "tokenizer.model").is_file() else ""
        raise InputError(f"{folder / JSON}: there is no such file{hint}.")
    definition = _read(folder / JSON)
    config = _read(folder / CONFIG)
    older = _read(folder / "special_tokens_map.json")
    stops = _stop_ids(folder / "generation_config.json") or _stop_ids(folder / "config.json")
    template = pick(config.get("chat_template"), where=f"{folder / CONFIG}: field chat_template")
    source = folder / (TEMPLATE if (folder / TEMPLATE).is_file() else CONFIG)
    if source.name == TEMPLATE:
        template = _text(source)
    specials = ((role, _content(config.get(role) or older.get(role))) for role in ROLES)
    try:
        tokenizer = HFTokenizer(
            canonical(definition),
            special_tokens=tuple((role, text) for role, text in specials if text),
            stop_ids=stops,
            chat_template=template,
            template_from=str(source),
        )
    except InputError as error:
        raise InputError(f"{folder / JSON}: {error}") from None
    for role, text in tokenizer.special_tokens:
        if tokenizer.backend.token_to_id(text) is None:
            raise InputError(f"{folder / CONFIG}: field {role}: {text!r} is not in the vocabulary of {JSON}.")
    return tokenizer


def write_directory(tokenizer: HFTokenizer, directory: str | Path, *, spelled: bool = True) -> list[Path]:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, for transformers to load.

    Args:
        tokenizer: what to write.
        directory: where to.
        spelled: transformers finds special tokens by their spelling in text, as the published models have it;
            False: there as here, the spelling is ordinary text.

    Raises:
        DiskError: a file cannot be written.
    """
    folder = Path(directory)
    tokenizer = settled(tokenizer)
    config: dict[str, Any] = dict(tokenizer.special_tokens) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["clean_up_tokenization_spaces"] = False
    if tokenizer.add_bos is not None:
        config["add_bos_token"] = tokenizer.add_bos
    if not spelled:
        config["split_special_tokens"] = True
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


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, hint="download it again") if path.is_file() else {}


def _stop_ids(path: Path) -> tuple[int, ...]:
    found = _read(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{path}: field eos_token_id: expected a token's id or a list of them, found {found!r:.60}.")
    return tuple(ids)


def _content(token: object) -> str | None:
    """A special token's text, which files hold as it is or as `{"content": ...}`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
