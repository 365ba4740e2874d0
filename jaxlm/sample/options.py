"""How one request is sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxlm.errors import InputError

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, math.inf),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "min_new_tokens": (0, 2**31 - 1),
    "no_repeat_ngram": (0, 2**31 - 1),
    "seed": (0, 2**32 - 1),
}
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # options become float32
_INTEGERS = ("top_k", "min_new_tokens", "no_repeat_ngram", "seed")


@dataclass(frozen=True)
class Sampling:
    """Options of one request; the defaults draw from the model's own distribution.

    They apply in this order: penalties, bias and bans, temperature, top-k, top-p, min-p, typical, draw. The rules of
    the filters are in `jaxlm.sample.filters`, those of the penalties in `jaxlm.sample.penalties`. All are data to the
    compiled program: no value causes a recompile. A request whose options leave no token to choose ends with `error`.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens and those tied with the last of them; 0 is off.
        top_p: keep the most likely tokens that together have this probability; 1 is off.
        min_p: keep tokens at least this many times as likely as the most likely; 0 is off.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is off.
        presence_penalty: subtracted from the logit of every token in the answer so far; 0 is off.
        frequency_penalty: subtracted once for each time that the token is in the answer so far; 0 is off.
        logit_bias: added to the logits of these ids: a mapping, or pairs of id and number.
        banned_ids: never produced.
        min_new_tokens: no stop id is produced before so many tokens are.
        typical_p: keep the tokens whose information is nearest to the entropy, the fewest that together have this
            probability; 1 is off.
        no_repeat_ngram: no run of so many tokens comes twice in prompt and answer; 0 is off.
        seed: makes the request's draws its own; empty: they follow from the call's key and the request's number.

    Raises:
        InputError: a value of the wrong type, NaN, infinite in float32 or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    typical_p: float = 1.0
    no_repeat_ngram: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None or name != "seed":
                _check(f"sampling.{name}", value, least, most, name in _INTEGERS)
        if self.repetition_penalty < _TINY:
            raise InputError(
                "sampling.repetition_penalty: must be above 0 in float32 (1.2e-38), found "
                f"{self.repetition_penalty}; 1 turns it off."
            )
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        try:
            biases = tuple((token, bias) for token, bias in pairs)
        except (TypeError, ValueError):
            raise InputError(
                f"sampling.logit_bias: expected numbers by id, or pairs (id, number), found {self.logit_bias!r:.60}."
            ) from None
        if isinstance(self.banned_ids, str) or not hasattr(self.banned_ids, "__iter__"):
            raise InputError(f"sampling.banned_ids: expected a list of token ids, found {self.banned_ids!r:.60}.")
        object.__setattr__(self, "logit_bias", biases)
        object.__setattr__(self, "banned_ids", tuple(self.banned_ids))
        for token, bias in biases:
            _check("sampling.logit_bias", token, 0, 2**31 - 1, True)
            _check(f"sampling.logit_bias of id {token}", bias, -math.inf, math.inf, False)
        for token in self.banned_ids:
            _check("sampling.banned_ids", token, 0, 2**31 - 1, True)

    @property
    def edits(self) -> dict[int, float]:
        """What is added to which logits; -inf for banned ids."""
        return dict(self.logit_bias) | dict.fromkeys(self.banned_ids, -math.inf)


def _check(name: str, value: object, least: float, most: float, integer: bool) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__" if integer else "__float__"):
        raise InputError(f"{name}: must be {'an integer' if integer else 'a number'}, found {value!r}.")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not least <= number <= most:
        if most == math.inf:
            expected = "a finite number" + (f" of at least {least:g}" if least > -math.inf else "")
        else:
            expected = f"between {least:g} and {most:g}"
        raise InputError(f"{name}: must be {expected}, found {value!r:.60}.")
    if not integer and abs(number) > _HUGE:
        raise InputError(f"{name}: must be at most 3.4e38 in size, as float32 is, found {value!r:.60}.")
