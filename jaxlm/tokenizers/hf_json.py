"""Hugging Face tokenizers, served by `tokenizers`. Their files are read in `hf_files`. Loads no jax."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import InputError
from jaxlm.tokenizers import chat_template as templates
from jaxlm.tokenizers.base import EOT, encodable, fingerprint_of, outside, write

if TYPE_CHECKING:
    import tokenizers

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, repr=False)
class HFTokenizer:
    """The tokenizer of a published model.

    `encode` takes text as ordinary text: the spelling of a special token in it gives no special id. (Added tokens that
    the model's makers did not mark special, such as Qwen's `<tool_call>`, are found in text all the same.) Special ids
    come from `start_ids`, `eot_id` and `apply_chat_template`. With a normaliser (Qwen's NFC), `decode(encode(text))` is
    the normalised text.

    Attributes:
        definition: `tokenizer.json` as canonical JSON, without padding and truncation.
        special_tokens: roles (bos_token, eos_token, pad_token, unk_token) and the texts that play them.
        add_bos: whether texts start with bos_token; None: what the definition's post-processor says.
        stop_ids: what ends an answer, besides eos_token (from `generation_config.json` or `config.json`).
        chat_template: Jinja source; None: the model has none.
        template_from: the file that it stands in, to name it in errors; no part of the identity.
    """

    definition: str
    special_tokens: tuple[tuple[str, str], ...] = ()
    add_bos: bool | None = None
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    template_from: str | None = field(default=None, compare=False)

    kind = "hf"

    def __post_init__(self) -> None:
        _ = self.backend  # a definition that `tokenizers` refuses is refused here, not at the first text

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` that finds special tokens in text, for prompts made from a template."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self.definition)
        except Exception as error:  # `tokenizers` raises plain Exception
            raise InputError(f"definition: not a tokenizer that `tokenizers` can read ({error}).") from None

    @cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.definition)
        backend.encode_special_tokens = True  # that is: their spelling is encoded as the text it is
        return backend

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {i: text for text, i in self.backend.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def vocab_size(self) -> int:
        return max(self._texts, default=-1) + 1

    def _role(self, role: str) -> int | None:
        text = dict(self.special_tokens).get(role)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts a text; None: there is none."""
        return self._role("bos_token")

    @property
    def eot_id(self) -> int | None:
        """Id of eos_token, which ends a document (and, in a chat model, a turn)."""
        found = self._role("eos_token")
        return self.backend.token_to_id(EOT) if found is None else found

    @property
    def pad_id(self) -> int | None:
        """Id of pad_token, unless another role shares it: then nothing may be skipped."""
        found = self._role("pad_token")
        return None if found in (self.eot_id, self.bos_id, self.unk_id) else found

    @property
    def unk_id(self) -> int | None:
        return self._role("unk_token")

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the model expects before a text: its bos_token, or nothing."""
        if self.add_bos is not None:
            return (self.bos_id,) if self.add_bos and self.bos_id is not None else ()
        return self.processed_start

    @cached_property
    def processed_start(self) -> tuple[int, ...]:
        """What the definition's own post-processor puts before a text."""
        encoding = self._ordinary.encode("a")
        first = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        return tuple(encoding.ids[:first])

    @cached_property
    def fingerprint(self) -> str:
        identity = {"definition": json.loads(self.definition), "special_tokens": dict(self.special_tokens)}
        return fingerprint_of({"kind": self.kind, "start": self.start_ids, **identity})

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            InputError: a lone surrogate, which is no character; names its offset.
        """
        return list(self._ordinary.encode(encodable(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out, `pad_id` skipped; bytes that are not UTF-8 become U+FFFD."""
        return self._ordinary.decode(list(self._known(ids)), skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        # How a token is written can depend on the one before (a space, a character's first bytes), so the ids of the
        # last piece stay in the window and what they gave is cut off.
        window: list[int] = []
        shown = ""
        start = 0  # of the ids in the window that are not shown yet
        for i in self._known(ids):
            window.append(i)
            text = self._ordinary.decode(window, skip_special_tokens=False)
            if text.endswith("\ufffd") or self._is_byte(i):
                yield ""
                continue
            yield text[len(shown) :]
            if self._looks_far:
                shown = text
                continue
            window, start = window[start:], len(window) - start
            shown = self._ordinary.decode(window, skip_special_tokens=False)
        yield self._ordinary.decode(window, skip_special_tokens=False)[len(shown) :]

    def apply_chat_template(
        self,
        messages: Sequence[templates.Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation as the model was trained to see it; arguments as `render_chat`.

        By default they end where the model's answer begins; for a conversation that is to be learned from, or counted,
        as it is, pass add_generation_prompt=False.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)
        return list(self.backend.encode(encodable(text), add_special_tokens=False).ids)

    def render_chat(
        self,
        messages: Sequence[templates.Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, by the model's own template; arguments as `chat_template.render`.

        Other than there, add_generation_prompt is on by default: the text ends where the model's answer begins.

        Raises:
            InputError: the model has no template, or the template fails or refuses.
        """
        if self.chat_template is None:
            raise InputError("chat template: this model's tokenizer has none; use jaxlm sample to continue plain text.")
        told = dict(self.special_tokens) | variables
        prompt = {"add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            return templates.render(self.chat_template, messages, **prompt, **told)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{self.template_from}: {error}" if self.template_from else str(error)) from None

    def save(self, directory: str | Path) -> Path:
        return write(directory, self.kind, self._fields(), self.fingerprint)

    def _fields(self) -> dict[str, Any]:
        return {
            "definition": self.definition,
            "special_tokens": self.special_tokens,
            "add_bos": self.add_bos,
            "stop_ids": self.stop_ids,
            "chat_template": self.chat_template,
        }

    def _known(self, ids: Iterable[int]) -> Iterator[int]:
        pad = self.pad_id
        for i in ids:
            if i not in self._texts:
                raise outside(i, self.vocab_size)
            if i != pad:
                yield int(i)

    @cached_property
    def _looks_far(self) -> bool:
        """How a token is written can depend on any before it: the decoder replaces in the joined text."""
        steps = (json.loads(self.definition).get("decoder") or {}).get("decoders", [])
        kinds = [step["type"] for step in steps]
        return "Fuse" in kinds and "Replace" in kinds[kinds.index("Fuse") :]

    @cached_property
    def _byte_fallback(self) -> bool:
        return bool(json.loads(self.definition)["model"].get("byte_fallback"))

    def _is_byte(self, token_id: int) -> bool:
        """A token such as <0x41>: whether a run of them is text at all shows when the run has ended."""
        text = self._texts[token_id]
        return self._byte_fallback and len(text) == 6 and text.startswith("<0x")

    def __repr__(self) -> str:  # the default would print the definition
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]!r})"

    def __getstate__(self) -> dict[str, Any]:  # a worker process makes these again rather than receive them
        made = ("backend", "_ordinary", "_texts")
        return {name: value for name, value in self.__dict__.items() if name not in made}


def canonical(definition: Mapping[str, Any]) -> str:
    """A tokenizer.json's content in the one form that compares and hashes: sorted keys, no padding, no truncation."""
    kept = {**definition, "padding": None, "truncation": None}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
