"""The start of a text: tokenizer_config.json and the post-processor of tokenizer.json made to say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from jaxlm.tokenizers import HFTokenizer, hf_files
from jaxlm.tokenizers.bos import settled
from jaxlm.tokenizers.hf_json import canonical

ROLES = (("bos_token", "<|start|>"), ("eos_token", "<|end|>"))
LEVEL = processors.ByteLevel(trim_offsets=False)


def template(start: int, end: int) -> Any:
    return processors.TemplateProcessing(
        single="<|start|> $A <|end|>", pair=None, special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )


@pytest.mark.parametrize("kind", ["nothing", "bytes", "template", "both"])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_the_definition_follows_the_rule(
    make_backend: Callable[[str], Backend], tmp_path: Path, kind: str, add_bos: bool | None
) -> None:
    backend = make_backend("gpt2")
    start, end = (backend.token_to_id(text) for _, text in ROLES)
    found = {
        "nothing": None, "bytes": LEVEL, "template": template(start, end),
        "both": processors.Sequence([LEVEL, template(start, end)]),
    }[kind]  # fmt: skip
    if found is not None:
        backend.post_processor = found
    tok = HFTokenizer(canonical(json.loads(backend.to_str())), special_tokens=ROLES, add_bos=add_bos)
    same = settled(tok)
    assert settled(same) == same
    assert (same.start_ids, same.encode("the")) == (tok.start_ids, tok.encode("the"))
    # The library itself, which knows nothing of tokenizer_config.json.
    ids = Backend.from_str(same.definition).encode("the").ids
    says = add_bos if add_bos is not None else kind in ("template", "both")
    unchanged = add_bos is None or says == (kind in ("template", "both"))
    assert (same == tok) == unchanged
    assert ids == [start] * says + tok.encode("the") + [end] * (unchanged and kind in ("template", "both"))
    steps = json.dumps(json.loads(same.definition)["post_processor"])
    assert ("ByteLevel" in steps) == (kind in ("bytes", "both"))
    hf_files.write_directory(tok, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(same.definition)
    assert hf_files.from_directory(tmp_path) == replace(same, add_bos=None)  # for the definition says it now


def test_without_a_bos_token_there_is_no_start(make_backend: Callable[[str], Backend]) -> None:
    tok = HFTokenizer(canonical(json.loads(make_backend("gpt2").to_str())), add_bos=True)
    assert settled(tok) is tok
    assert tok.start_ids == ()
