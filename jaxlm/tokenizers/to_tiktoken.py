"""A byte-level BPE `tokenizer.json` as a `tiktoken.Encoding`, when the two say the same. Loads no jax.

tiktoken merges by the id of the result and cuts words with one regular expression. Many published tokenizers fit that:
GPT-2's, Llama 3's, Qwen's. Those that do not are refused, with the reason.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
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
    return TiktokenForm(encoding, nfc=kind == "NFC")


def _ranks(vocab: Mapping[str, int], model: Mapping[str, Any]) -> dict[bytes, int]:
    """The id of each token's bytes, after checking that merging by id is merging in the order of the list."""
    unknown = next((text for text in vocab if any(character not in FROM_PRINTABLE for character in text)), None)
    _require(unknown is None, f"its token {unknown!r} is no string of bytes")
    missing = [byte for character, byte in FROM_PRINTABLE.items() if character not in vocab]
    _require(not missing, f"it lacks the bytes {', '.join(f'{byte:02x}' for byte in sorted(missing))}")
    made: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        _require(left + right in vocab, f"its merge of {left!r} and {right!r} gives no token")
        made.setdefault(left + right, vocab[left + right])
    order = list(made.values())
    _require(order == sorted(order), "its merges are not in the order of their ids")
    never = [text for text in vocab if len(text) > 1 and text not in made]
    _require(not never or bool(model.get("ignore_merges")), f"no merge gives its token {next(iter(never), '')!r}")
    return {from_printable(text): i for text, i in vocab.items()}


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
