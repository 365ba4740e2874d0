from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import tokenizers
from jaxlm.data.sources import source
from jaxlm.errors import InputError
from jaxlm.tokenizers import BytePairTokenizer, NamedTokenizer
from jaxlm.tokenizers.bpe import from_printable

TEXT = st.text() | st.text(st.sampled_from("aBé's'LL 0123,.!?\n\r\t\u00a0\u3000\u0085🚀中"))


def test_gpt2_known_ids(gpt2: NamedTokenizer) -> None:
    # The source notebook's output, of transformers' GPT-2 tokenizer.
    ids = [3118, 6667, 11203, 540, 11241, 1634, 5635, 0, 12520, 248, 222]
    assert gpt2.encode("Unbelievable tokenization powers! 🚀") == ids
    assert gpt2.decode(ids) == "Unbelievable tokenization powers! 🚀"
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.kind, gpt2.pad_id) == (50257, 50256, "named", None)
    assert gpt2.decode([50256]) == "<|endoftext|>"
    assert gpt2.decode([198]) == "\n"


def test_cl100k_known_ids(cl100k: NamedTokenizer) -> None:
    # The source notebook's output, of tiktoken.
    ids = [791, 11410, 234, 253, 6917, 43467, 16957, 220, 1272, 3585, 0]
    assert cl100k.encode("The 🌟 star-player scored 40 points!") == ids
    assert cl100k.decode([50256]) == "parable"
    assert (cl100k.vocab_size, cl100k.eot_id) == (100277, 100257)
    with pytest.raises(InputError, match="token id 100256 "):  # one of the gaps below the special tokens
        cl100k.decode([100256])


@pytest.fixture(scope="session")
def published(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiktoken.Encoding]:
    """tiktoken's own encodings, its cache filled from the mirror (it names files by the sha1 of their address)."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("gpt2/vocab.bpe", "gpt2/encoder.json", "cl100k_base"):
        resource = source(name).resource
        content = next(mirror.rglob(resource.name)).read_bytes()
        (cache / hashlib.sha1(resource.url.encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return {name: tiktoken.get_encoding(name) for name in ("gpt2", "cl100k_base")}


@settings(max_examples=200)
@given(text=TEXT)
def test_same_ids_as_tiktoken(
    gpt2: NamedTokenizer, cl100k: NamedTokenizer, published: dict[str, tiktoken.Encoding], text: str
) -> None:
    for tok in (gpt2, cl100k):
        ids = tok.encode(text)
        assert ids == published[tok.name].encode_ordinary(text)
        assert tok.decode(ids) == text


def test_special_ids_are_tiktokens(cl100k: NamedTokenizer, published: dict[str, tiktoken.Encoding]) -> None:
    peer = published["cl100k_base"]
    assert cl100k.vocab_size == peer.n_vocab
    assert dict(cl100k.specials) == {name: peer.encode_single_token(name) for name in peer.special_tokens_set}


def test_encoder_json_agrees_with_the_merges(gpt2: NamedTokenizer, mirror: Path) -> None:
    vocabulary = json.loads(next(mirror.rglob("encoder.json")).read_text(encoding="utf-8"))
    assert {token: i for i, token in enumerate(gpt2.tokens)} | dict(gpt2.specials) == vocabulary


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_very_long_white_space(request: pytest.FixtureRequest, name: str) -> None:
    tok = request.getfixturevalue("gpt2" if name == "gpt2" else "cl100k")
    for run in (" " * 1_500_000, "\n" * 1_500_000, " \n" * 750_000):
        assert tok.decode(tok.encode(run + "x")) == run + "x"


def test_fingerprints_never_change(gpt2: NamedTokenizer, cl100k: NamedTokenizer) -> None:
    # They are part of stage identities. A change here means that every stored result is made again: say so.
    assert gpt2.fingerprint.startswith("396d2529a2d5")
    assert cl100k.fingerprint.startswith("63a84d9b679a")


def test_saved_as_name_and_digest(gpt2: NamedTokenizer, tmp_path: Path) -> None:
    file = gpt2.save(tmp_path)
    assert file.stat().st_size < 1000
    assert json.loads(file.read_text())["sha256"] == source("gpt2/vocab.bpe").resource.sha256
    assert tokenizers.load(tmp_path) == gpt2 == tokenizers.load("gpt2")


def test_the_merge_list_gives_the_ids_of_the_bytes_too(
    trained: BytePairTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the published file: one of its form, in which token 256 is " t" and 257 is "he", as in the real one."""
    file = tmp_path / "vocab.bpe"
    file.write_text("#version: 0.2\nĠ t\nh e\n", encoding="utf-8")
    monkeypatch.setattr("jaxlm.data.download.fetch", lambda resource: file)
    tok = tokenizers.load("gpt2")
    # The visible bytes come first ("!" is 33 and the first); then 0-32, so "\n" is 188 + 10 and " " is 188 + 32, then
    # 127-160, so 0x80 is 188 + 34 and 0x9a is 188 + 60. The notebook's output has 0, 198, 220, 222 and 248 for them.
    assert tok.encode("!\n the") == [0, 198, 256, 257]
    assert tok.encode("  ") == [220, 220]
    assert tok.encode("🚀")[2:] == [248, 222]
    assert isinstance(tok, NamedTokenizer)
    assert from_printable(tok.tokens[220]) == b" "


def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"gpt5: .*gpt2, cl100k_base"):
        tokenizers.named("gpt5")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, jaxlm.tokenizers as t; t.char('ab').encode('a'); t.word('a b').encode('a');"
        "print([m for m in ('jax', 'tiktoken', 'tokenizers', 'httpx', 'prefect') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert out.stdout.strip() == "[]"
