"""The tokenizer inside a GGUF file, put together from its metadata as a Hugging Face definition. Loads no jax.

A GGUF holds the tokens, the merges or scores, and the *name* of the pre-tokenizer; what the name stands for is known to
the programs that read it, and stands here in `PRE_TOKENIZERS`. The names are those of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.errors import InputError
from jaxlm.tokenizers.bos import starting
from jaxlm.tokenizers.chat_template import pick
from jaxlm.tokenizers.hf_json import ROLES, HFTokenizer, canonical

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

_CL100K_LIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """How text is cut into words before merging.

    Attributes:
        pattern: a regular expression of the words; None: GPT-2's.
        digits: each digit is a word of its own, before the pattern.
        nfc: text is normalised to NFC first.
        whole_words: a word that is a token is that token, whatever its merges (`ignore_merges`).
        add_bos: texts start with the bos token unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


# Llama 3 (and its tool calls), ChatML as of SmolLM2 and Qwen, Phi 3, Gemma.
ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

_LLAMA3 = PreTokenizer(pattern=_CL100K_LIKE % "{1,3}", whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer(pattern=_CL100K_LIKE % "", nfc=True)
_DIGITS = PreTokenizer(digits=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "gpt2": PreTokenizer(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}


def from_gguf(metadata: Mapping[str, Any], where: str) -> HFTokenizer | None:
    """The tokenizer that a GGUF's metadata describes; None: it describes none.

    Args:
        metadata: the file's keys and values, as Python values.
        where: the file's name, for errors.

    Raises:
        InputError: a model or pre-tokenizer that is not known here, or fields that are missing or do not fit.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None or model == "none":
        return None
    tokens = _listed(metadata, "tokens", str, where)
    types: Sequence[int] = [NORMAL] * len(tokens)
    if metadata.get("tokenizer.ggml.token_type"):
        types = _listed(metadata, "token_type", int, where, len(tokens))
    last = len(tokens)
    while last and types[last - 1] == UNUSED:  # rows that only pad the embedding
        last -= 1
    tokens, types = tokens[:last], types[:last]
    if model == "gpt2":
        name = metadata.get("tokenizer.ggml.pre") or ("gpt-2" if metadata["general.architecture"] == "gpt2" else None)
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise InputError(f"{where}: field tokenizer.ggml.pre: {name!r} is not known here; known are {known}.")
        definition = _byte_level(tokens, types, _listed(metadata, "merges", str, where), PRE_TOKENIZERS[name])
        add_bos = PRE_TOKENIZERS[name].add_bos
    elif model == "llama":
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        scores = _listed(metadata, "scores", float, where, len(metadata["tokenizer.ggml.tokens"]))
        definition = _sentencepiece(tokens, types, scores, prefix)
        add_bos = True
    else:
        raise InputError(f"{where}: field tokenizer.ggml.model: {model!r} is not known here; known are gpt2, llama.")
    specials = _special_tokens(metadata, tokens, where)
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in dict(specials):
        definition["post_processor"] = starting(dict(specials)["bos_token"], metadata["tokenizer.ggml.bos_token_id"])
    try:
        return HFTokenizer(
            canonical(definition),
            special_tokens=tuple(specials),
            stop_ids=_stop_ids(metadata, tokens, types, where),
            chat_template=pick(metadata.get("tokenizer.chat_template"), where=where),
            template_from=where,
        )
    except InputError as error:
        raise InputError(f"{where}: tokenizer: {error}") from None


def _listed(metadata: Mapping[str, Any], name: str, kind: type, where: str, length: int | None = None) -> list[Any]:
    value, field = metadata.get(f"tokenizer.ggml.{name}"), f"{where}: field tokenizer.ggml.{name}"
    if not isinstance(value, list) or not value:
        raise InputError(f"{field}: missing, though the file has a tokenizer.")
    if wrong := [item for item in value if not isinstance(item, kind)]:
        raise InputError(f"{field}: expected a list of {kind.__name__}, found {wrong[0]!r:.60} in it.")
    if length is not None and len(value) != length:
        raise InputError(f"{field}: {len(value)} values for {length} tokens.")
    return value


def _token_id(metadata: Mapping[str, Any], name: str, n_tokens: int, where: str) -> int | None:
    """The id of a special token; None: the file names none."""
    found = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if found is not None and not (type(found) is int and 0 <= found < n_tokens):
        raise InputError(f"{where}: field tokenizer.ggml.{name}_token_id: {found!r:.60} is not among the tokens.")
    return found


def _special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> list[tuple[str, str]]:
    found = []
    for role, name in zip(ROLES, ("bos", "eos", "padding", "unknown"), strict=True):
        token_id = _token_id(metadata, name, len(tokens), where)
        if token_id is not None:
            found.append((role, tokens[token_id]))
    return found


def _stop_ids(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str) -> tuple[int, ...]:
    """The ids that the file names, and the control tokens that are known to end a turn, which older files leave out."""
    named = [_token_id(metadata, name, len(tokens), where) for name in ("eos", "eot", "eom")]
    known = [i for i, text in enumerate(tokens) if types[i] == CONTROL and text in ENDS_OF_TURN]
    return tuple(dict.fromkeys(i for i in (*named, *known) if i is not None))


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens that are found in text before anything else is done to it."""
    return [
        {
            "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip


def _definition(added: list[dict[str, Any]], model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **model,
    }  # fmt: skip
    return {"version": "1.0", "added_tokens": added, "post_processor": None, "model": model, **parts}


def _byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: PreTokenizer
) -> dict[str, Any]:
    # Added tokens after the last learned one stay out of the vocabulary, so that whole_words cannot find them.
    learned = max((i + 1 for i, kind in enumerate(types) if kind in (NORMAL, BYTE, UNUSED)), default=0)
    words: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre.digits else []
    if pre.pattern is not None:
        steps.append({"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False})
    steps.append({**words, "use_regex": pre.pattern is None})
    return _definition(
        _added(tokens, types),
        {
            "vocab": {text: i for i, text in enumerate(tokens[:learned])},
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": pre.whole_words,
        },
        normalizer={"type": "NFC"} if pre.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={**words, "use_regex": True},
    )


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool
) -> dict[str, Any]:
    """SentencePiece BPE: of two neighbours, those merge first whose union has the highest score.

    As a list of merges: every way to cut a piece into two pieces, in the order of the pieces' scores.
    """
    vocab = {text: i for i, text in enumerate(tokens)}
    pairs = []
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != NORMAL:
            continue
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [(vocab[left], vocab[right]) for left, right in cuts if left in vocab and right in vocab]
        pairs += [(-scores[i], i, left, right) for left, right in known]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unspace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    normalizers = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    return _definition(
        _added(tokens, types),
        {
            "vocab": vocab,
            "merges": [[tokens[left], tokens[right]] for _, _, left, right in sorted(pairs)],
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": BYTE in types,
        },
        normalizer={"type": "Sequence", "normalizers": [*normalizers, space]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    )
