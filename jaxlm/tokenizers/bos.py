"""The token that starts a text, in a `tokenizer.json`: its post-processor. Loads no jax.

What counts in a published model's files is that post-processor alone, for transformers as here. But others read
`add_bos_token` of `tokenizer_config.json`, so what we write says the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxlm.tokenizers.hf_json import HFTokenizer, canonical


def starting(text: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts a token before every text."""
    first: dict[str, Any] = {"SpecialToken": {"id": text, "type_id": 0}}
    parts = [{"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1))]
    return {
        "type": "TemplateProcessing",
        "single": [first, parts[0]],
        "pair": [first, *parts],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }


def settled(tokenizer: HFTokenizer) -> HFTokenizer:
    """The same tokenizer, its definition changed where it disagrees with `add_bos` about the start of a text.

    Steps that add no token (`ByteLevel`, which trims offsets) stay; others go, as transformers has it.
    """
    if tokenizer.add_bos is None or tokenizer.start_ids == tokenizer.processed_start:
        return tokenizer
    definition = json.loads(tokenizer.definition)
    steps = [step for step in _steps(definition.get("post_processor")) if step["type"] == "ByteLevel"]
    if tokenizer.start_ids:
        text = dict(tokenizer.special_tokens)["bos_token"]
        steps.append(starting(text, tokenizer.start_ids[0]))
    whole = {"type": "Sequence", "processors": steps} if len(steps) > 1 else next(iter(steps), None)
    return replace(tokenizer, definition=canonical({**definition, "post_processor": whole}))


def _steps(post_processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if post_processor is None:
        return []
    return list(post_processor["processors"]) if post_processor["type"] == "Sequence" else [post_processor]
