"""A byte-level BPE `tokenizer.json` as a `tiktoken.Encoding`, when the two say the same. Loads no jax.

tiktoken merges by the id of the result and cuts words with one regular expression. Many published tokenizers fit that:
GPT-2's, SmolLM2's, Llama 3's, the first Qwen's. Those that do not are refused, with the reason: SentencePiece models,
and those with added tokens that are found in ordinary text, as `<tool_call>` is by Qwen2.5's and Qwen3's.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.errors import InputError
from jaxlm.tokenizers.bpe import FROM_PRINTABLE, GPT2_PATTERN, from_printable
from jaxlm.tokenizers.hf_json import HFTokenizer

if TYPE_CHECKING:
    import tiktoken

# GPT-2's words with every digit on its own. `Digits` cuts first, so white space before a digit ends a piece of text
# and is one word, where GPT-2 alone would keep its last character back.
DIGITS_PATTERN = GPT2_PATTERN.replace(r"| ?\p{N}++", r"|\p{N}").replace(
    r" ?[^\s\p{L}\p{N}]++|", r" ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|"
)


class TiktokenForm(NamedTuple):
    """What does the same as a tokenizer, with tiktoken.

    Attributes:
        encoding: the merges, the words' pattern and the special tokens.
        nfc: text has to be normalised to NFC first, which tiktoken cannot; `encode` does it.
    """

    encoding: tiktoken.Encoding
    nfc: bool

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, as ordinary text."""
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids))


def to_tiktoken(tokenizer: HFTokenizer) -> TiktokenForm:
    """The tokenizer as tiktoken has it.

    Raises:
        InputError: it is no byte-level BPE, or one that tiktoken cannot express; says why.
    """
    import tiktoken

    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    _require(model.get("type") == "BPE", f"its model is {model.get('type')}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _require(not model.get(name), f"its model has {name}={model.get(name)!r}")
    normalizer = definition.get("normalizer")
    kind = None if normalizer is None else normalizer.get("type")
    _require(kind in (None, "NFC"), f"its normaliser {kind} is neither NFC nor none")
    added = {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    ordinary = [token["content"] for token in definition.get("added_tokens", []) if not token["special"]]
    _require(not ordinary, f"its added token {', '.join(ordinary[:1])} is found in ordinary text")
    ranks = _ranks({text: i for text, i in model["vocab"].items() if text not in added}, model)
    encoding = tiktoken.Encoding(
        f"hf-{tokenizer.fingerprint[:12]}",
        pat_str=_pattern(definition.get("pre_tokenizer")),
        mergeable_ranks=ranks,
        special_tokens=added,
    )
    form = TiktokenForm(encoding, nfc=kind == "NFC")
    # Merges are checked one by one, but the pattern is read by another library: so it is tried on every kind of text.
    _require(form.encode(_trial()) == tokenizer.encode(_trial()), "its pattern cuts text in another way there")
    return form


@cache
def _trial() -> str:
    """The characters up to U+30FF that Unicode 3.2 had, beside each other and beside others; and a few texts."""
    known = [c for c in map(chr, range(0x3100)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
    mixed = "it's IT'S we'LL 12 345\n\n  \t x\r\n\r\n 6789,... 漢字かな 한국어 🚀👩\u200d👩 \U0010ffff   "
    return "".join(known) + " a".join(known) + "1\n".join(known[:0x250]) + mixed


def _ranks(vocab: Mapping[str, int], model: Mapping[str, Any]) -> dict[bytes, int]:
    """The id of each token's bytes, after checking that merging by id is merging in the order of the list."""
    unknown = next((text for text in vocab if any(character not in FROM_PRINTABLE for character in text)), None)
    _require(unknown is None, f"its token {unknown!r} is no string of bytes")
    missing = [byte for character, byte in FROM_PRINTABLE.items() if character not in vocab]
    _require(not missing, f"it lacks the bytes {', '.join(f'{byte:02x}' for byte in sorted(missing))}")
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    for left, right in merges:
        _require(left + right in vocab, f"its merge of {left!r} and {right!r} gives no token")
    listed = set(merges)
    parts = {text: _parts(text, vocab) for text in vocab if len(text) > 1}
    for text, found in parts.items():
        if len(found) > 2:
            _require(bool(model.get("ignore_merges")), f"no merge gives its token {text!r}")
        else:
            _require(found in listed, f"tiktoken makes {text!r} of {found[0]!r} and {found[1]!r}, and no merge does")
    later = len(vocab) + max(vocab.values())  # the least id that a merge further down the list is needed for
    for left, right in reversed(merges):
        made = vocab[left + right]
        _require(made <= later, "its merges are not in the order of their ids")
        if parts[left + right] == (left, right):
            later = made
    return {from_printable(text): i for text, i in vocab.items()}


def _parts(text: str, vocab: Mapping[str, int]) -> tuple[str, ...]:
    """What a token's characters become by the merges before its own: what tiktoken makes it of, wherever it does."""
    own, parts = vocab[text], list(text)
    while len(parts) > 2:
        best, at = min((vocab.get(a + b, own), i) for i, (a, b) in enumerate(pairwise(parts)))
        if best >= own:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    steps = [pre_tokenizer] if pre_tokenizer is not None else []
    if pre_tokenizer is not None and pre_tokenizer.get("type") == "Sequence":
        steps = list(pre_tokenizer["pretokenizers"])
    kinds = [step.get("type") for step in steps]
    _require(kinds[-1:] == ["ByteLevel"], "it does not work on bytes (its last pre-tokenizer is not ByteLevel)")
    _require(not steps[-1].get("add_prefix_space"), "it puts a space before the text")
    own = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not own:
        split = steps[0]
        regex = split["pattern"].get("Regex")
        if regex and split.get("behavior") == "Isolated" and not split.get("invert"):
            return str(regex)
    raise InputError(f"tokenizer: tiktoken cannot express it: its pre-tokenizers are {', '.join(map(str, kinds))}.")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(f"tokenizer: tiktoken cannot express it: {otherwise}.")
