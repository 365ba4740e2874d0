"""What callers of this package pass, looked at before any work: one sentence for what cannot be meant.

Only types, lengths and ids on the host are looked at, never a value on the device, and nothing here is traced: so no
check compiles, or waits for, anything.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.sample.options import Sampling


class Decodes(Protocol):
    """What `generate` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: list[int]) -> str: ...


def found(value: object) -> str:
    """A value as an error tells of it: itself where it is short, or else its type."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float | list | tuple):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def check_cfg(cfg: object, name: str = "cfg") -> None:
    """
    Raises:
        InputError: it is no shape of a model.
    """
    if not isinstance(cfg, ModelConfig):
        raise InputError(f"{name}: expected a ModelConfig, such as jaxlm.preset('nano'), found {found(cfg)}.")


def check_params(cfg: ModelConfig, params: object, name: str = "params") -> None:
    """
    Raises:
        InputError: they are not laid out as a model's weights; their shapes are not looked at.
    """
    part = "bigram" if cfg.kind == "bigram" else "blocks"
    if not isinstance(params, Mapping) or part not in params:
        what = f"a dict without {part!r}" if isinstance(params, Mapping) else found(params)
        raise InputError(f"{name}: expected the model's weights, as jaxlm.init gives them, found {what}.")


def check_prompts(cfg: ModelConfig, prompts: Iterable[Iterable[int]]) -> list[list[int]]:
    """The ids of each prompt.

    Raises:
        InputError: what is wrong, with the number of the prompt.
    """
    check_cfg(cfg)
    if isinstance(prompts, str):
        raise InputError("prompts: expected a list of prompts, found text; give prompts=[tokenizer.encode(text)].")
    if isinstance(prompts, Mapping) or not _iterable(prompts):
        raise InputError(f"prompts: expected a list of prompts, each a list of token ids, found {found(prompts)}.")
    rows = list(prompts)
    if rows and (isinstance(rows[0], numbers.Number) or getattr(rows[0], "ndim", 1) == 0):
        raise InputError(
            f"prompts: expected a list of prompts, each a list of token ids, found one list of ids ({found(rows)}); "
            "put it into a list, as in prompts=[ids]."
        )
    return [_ids(cfg, i, row) for i, row in enumerate(rows)]


def _ids(cfg: ModelConfig, i: int, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        raise InputError(f"prompt {i}: expected token ids, found text; encode it with the tokenizer first.")
    if isinstance(prompt, Mapping) or not _iterable(prompt):
        raise InputError(f"prompt {i}: expected a list of token ids, found {found(prompt)}.")
    prompt = list(prompt)
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        wrong = next(token for token in prompt if not _whole(token))
        raise InputError(f"prompt {i}: expected a list of token ids, found {found(wrong)} among them.") from None
    if not ids:
        raise InputError(f"prompt {i}: is empty; give it at least one token, such as the end-of-text id.")
    for token in ids:
        if not 0 <= token < cfg.vocab_size:
            raise InputError(f"prompt {i}: id {token} is outside the vocabulary of {cfg.vocab_size} tokens.")
    return ids


def check_sampling(sampling: Sampling | Sequence[Sampling] | None, each: int) -> list[Sampling]:
    """The options of `each` prompts, or as many as there were given.

    Raises:
        InputError: something else than options.
    """
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * each
    if isinstance(sampling, str | Mapping) or not _iterable(sampling):
        hint = "; write Sampling(**options)" if isinstance(sampling, Mapping) else ""
        raise InputError(f"sampling: expected jaxlm.Sampling or a list of them, found {found(sampling)}{hint}.")
    options = list(sampling)
    for i, option in enumerate(options):
        if not isinstance(option, Sampling):
            raise InputError(f"sampling {i}: expected jaxlm.Sampling, found {found(option)}.")
    return options


def check_lengths(max_new_tokens: int | Sequence[int], each: int) -> list[int]:
    """New tokens of `each` prompts, or as many as there were given.

    Raises:
        InputError: no integer, or one below 1.
    """
    many = _iterable(max_new_tokens) and not isinstance(max_new_tokens, str | Mapping)
    given: list[Any] = list(max_new_tokens) if many else [max_new_tokens] * max(each, 1)  # type: ignore[arg-type]
    counts = [check_count("max_new_tokens", count) for count in given]
    return counts if many else counts[:each]


def check_ends(
    cfg: ModelConfig, stop: str | Sequence[str], stop_ids: Iterable[int], tokenizer: Decodes | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What ends an answer: strings and ids.

    Raises:
        InputError: a stop string that is empty or has no tokenizer, or a stop id outside the vocabulary, the model's
            or the tokenizer's.
    """
    return check_stops(stop, tokenizer), check_stop_ids(cfg, stop_ids, real_vocab(cfg, tokenizer))


def check_stop_ids(cfg: ModelConfig, stop_ids: Iterable[int], n_vocab: int) -> tuple[int, ...]:
    """The ids that end an answer; none is produced from `n_vocab` on.

    Raises:
        InputError: something else than ids, or one outside the vocabulary, the model's or the tokenizer's.
    """
    if isinstance(stop_ids, str | Mapping) or not _iterable(stop_ids):
        raise InputError(f"stop_ids: expected a list of token ids, found {found(stop_ids)}; one id is stop_ids=(5,).")
    ids = []
    for token in stop_ids:
        if not _whole(token):
            raise InputError(f"stop_ids: expected token ids, found {found(token)} among them.")
        if not 0 <= token < cfg.vocab_size:
            raise InputError(f"stop_ids: {token} is outside the vocabulary of {cfg.vocab_size} tokens.")
        if token >= n_vocab:
            raise InputError(
                f"stop_ids: {token} is never produced, for ids from {n_vocab} on, which the tokenizer lacks, are "
                "padding of the model's vocabulary; leave it out."
            )
        ids.append(operator.index(token))
    return tuple(ids)


def check_stops(stop: str | Iterable[str], tokenizer: Decodes | None) -> tuple[str, ...]:
    """The stop strings.

    Raises:
        InputError: one is empty or no text, or there is no tokenizer to look for them with.
    """
    if isinstance(stop, Mapping) or not _iterable(stop):
        raise InputError(f"stop: expected text or a list of texts, found {found(stop)}.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str):
            raise InputError(f"stop: expected texts, found {found(text)} among them; token ids go into stop_ids.")
    if "" in stops:
        raise InputError("stop: a stop string is empty; remove it.")
    if stops and tokenizer is None:
        raise InputError("stop: stop strings need a tokenizer; pass tokenizer=, or stop_ids= instead.")
    return stops


def check_count(name: str, value: int, least: int = 1, most: int | None = None) -> int:
    """`value` as an int.

    Raises:
        InputError: it is no integer, or out of range.
    """
    if not _whole(value):
        raise InputError(f"{name}: must be an integer, found {found(value)}.")
    count = operator.index(value)
    if count < least or (most is not None and count > most):
        expected = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InputError(f"{name}: must be {expected}, found {value}.")
    return count


def check_slots(slots: int | None, requests: int, most: int) -> int:
    """Rows that decode together: by default the power of two, at most `most`, that holds all `requests`."""
    return check_count("slots", min(most, 1 << max(requests - 1, 0).bit_length()) if slots is None else slots)


def real_vocab(cfg: ModelConfig, tokenizer: Decodes | None) -> int:
    """Ids from here on are padding of the vocabulary, never produced."""
    if tokenizer is None:
        return cfg.vocab_size
    # A tokenizer of transformers leaves added tokens, such as those that end a turn, out of its vocab_size.
    return min(cfg.vocab_size, len(tokenizer) if isinstance(tokenizer, Sized) else tokenizer.vocab_size)


def check_tokenizer(tokenizer: object, *methods: str) -> None:
    """
    Args:
        tokenizer: one that has `vocab_size`, `decode` and these methods; or None.

    Raises:
        InputError: it is none.
    """
    needed = ("vocab_size", "decode", *methods)
    if tokenizer is not None and (lacks := [name for name in needed if not hasattr(tokenizer, name)]):
        raise InputError(
            f"tokenizer: expected one as jaxlm.tokenizers.load(name) gives, found {found(tokenizer)}, which has no "
            f"{lacks[0]}."
        )


def check_key(key: jax.Array | int | None) -> jax.Array:
    """The call's key; `jax.random.key(0)` for None, and that of a seed.

    Raises:
        InputError: it is neither one typed key nor a seed.
    """
    if key is None:
        return jax.random.key(0)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return key  # type: ignore[return-value]
    if _whole(key) and shape == ():
        return jax.random.key(check_count("key", key, 0, 2**32 - 1))  # type: ignore[arg-type]
    what = found(key) if dtype is None else f"{dtype} of shape {shape}"
    raise InputError(f"key: expected one typed key (jax.random.key) or a seed, found {what}.")


def _iterable(value: object) -> bool:
    """Whether there is something to go through; an array of no dimension only looks so."""
    return hasattr(value, "__iter__") and getattr(value, "ndim", 1) > 0


def _whole(value: object) -> bool:
    """Whether it is an integer, of Python, numpy or jax; True and False are none."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
