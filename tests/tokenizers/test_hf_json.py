from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as decoding

from jaxlm import tokenizers
from jaxlm.errors import InputError
from jaxlm.tokenizers import HFTokenizer, Tokenizer, hf_files, stream_text
from jaxlm.tokenizers.hf_json import canonical
from jaxlm.tokenizers.to_tiktoken import TiktokenForm, to_tiktoken

KINDS = ["gpt2", "smollm", "llama-bpe", "qwen2"]


@pytest.fixture(scope="session", params=KINDS)
def backend(request: pytest.FixtureRequest, make_backend: Callable[[str], Backend]) -> Backend:
    return make_backend(request.param)


def wrapped(backend: Backend, **more: Any) -> HFTokenizer:
    return HFTokenizer(canonical(json.loads(backend.to_str())), **more)


ROLES = (("bos_token", "<|start|>"), ("eos_token", "<|end|>"), ("pad_token", "<|pad|>"))


def test_ids_are_the_backends(backend: Backend, hard: list[str]) -> None:
    tok = wrapped(backend, special_tokens=ROLES)
    assert isinstance(tok, Tokenizer)
    for text in hard:
        if "<|" not in text:
            assert tok.encode(text) == backend.encode(text, add_special_tokens=False).ids
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        assert tok.decode(tok.encode(text)) == normal
    # The spelling of a special token is text; in a prompt that a template makes it is the token.
    end = backend.token_to_id("<|end|>")
    assert end not in tok.encode("<|end|>")
    assert (tok.eot_id, tok.bos_id, tok.pad_id, tok.unk_id) == (end, end - 1, end + 1, None)
    assert tok.decode([end, end + 1, tok.encode("x")[0]]) == "<|end|>x"  # the padding is skipped
    assert tok.vocab_size == end + 2 == backend.get_vocab_size()


def test_tiktoken_agrees_on_hard_text(backend: Backend, hard: list[str]) -> None:
    tok = wrapped(backend, special_tokens=ROLES)
    form = to_tiktoken(tok)
    assert form.nfc == (backend.normalizer is not None)
    for text in [*hard, "".join(hard), " ".join(hard) * 3]:
        ids = tok.encode(text)
        assert form.encode(text) == ids
        assert form.decode(ids) == tok.decode(ids)
    assert form.encoding.encode("<|end|>", allowed_special="all") == [tok.eot_id]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiktoken_agrees_on_any_text(
    backends: dict[str, HFTokenizer], forms: dict[str, TiktokenForm], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(KINDS))
    text = data.draw(st.one_of(st.text(), st.text(alphabet="ab1²' \n\r\t\u00a0Sſé!-")))
    assert forms[name].encode(text) == backends[name].encode(text)


@pytest.fixture(scope="session")
def forms(backends: dict[str, HFTokenizer]) -> dict[str, TiktokenForm]:
    return {name: to_tiktoken(tok) for name, tok in backends.items()}


def bytes_and(*made: str, merges: list[str], ignore_merges: bool = False) -> Backend:
    """All bytes and these tokens, by these merges, GPT-2's way."""
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *made]
    pairs = [tuple(merge.split()) for merge in merges]
    backend = Backend(
        models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=pairs, ignore_merges=ignore_merges)
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoding.ByteLevel()
    return backend


def test_a_token_that_the_merges_do_not_reach_as_tiktoken_does() -> None:
    """ "abc" is "a" and "bc" by the list, which "ab c" never meets; tiktoken would make "abc" of "a" and "bc"."""
    made = ("bc", "ab", "abc")
    tok = wrapped(bytes_and(*made, merges=["b c", "a b", "ab c"]))
    assert [tok.decode([i]) for i in tok.encode("abc")] == ["a", "bc"]
    with pytest.raises(InputError, match="tiktoken makes 'abc' of 'a' and 'bc', and no merge does"):
        to_tiktoken(tok)
    # With both ways listed, as files made from tiktoken's ranks have them, the two agree.
    both = wrapped(bytes_and(*made, merges=["b c", "a b", "ab c", "a bc"]))
    assert to_tiktoken(both).encode("xabc abcab") == both.encode("xabc abcab")
    # A token that only a whole word gives.
    whole = wrapped(bytes_and("xyz", merges=[], ignore_merges=True))
    assert to_tiktoken(whole).encode("xyz xyz") == whole.encode("xyz xyz")
    assert len(whole.encode("xyz")) == 1


def test_a_pattern_that_leaves_out_text_is_refused() -> None:
    backend = bytes_and("ab", merges=["a b"])
    for pattern in (r"\p{Han}+|.", r"[^\n]+|\n(?!b)", r"\w+|[^\w\s]+"):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        with pytest.raises(InputError, match="its pattern cuts text in another way there"):
            to_tiktoken(wrapped(backend))


@pytest.fixture(scope="session")
def backends(make_backend: Callable[[str], Backend]) -> dict[str, HFTokenizer]:
    return {name: wrapped(make_backend(name)) for name in KINDS}


def test_the_published_encoding_and_its_tokenizer_json_agree(gpt2: Any, hard: list[str]) -> None:
    # GPT-2's merges, put together as its tokenizer.json is; the ids to compare with are tiktoken's own.
    merges = [(left, right) for left, right in map(str.split, _merge_lines())]
    backend = Backend(models.BPE(vocab={text: i for i, text in enumerate(gpt2.tokens)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoding.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    tok = wrapped(backend)
    assert (tok.vocab_size, tok.eot_id) == (50257, 50256)
    form = to_tiktoken(tok)
    for text in hard:
        assert tok.encode(text) == gpt2.encode(text) == form.encode(text)


def _merge_lines() -> list[str]:
    from jaxlm.data.download import fetch
    from jaxlm.data.sources import source

    return fetch(source("gpt2/vocab.bpe").resource).read_text(encoding="utf-8").split("\n")[1:-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["model"].update(byte_fallback=True), "byte_fallback=True"),
        (lambda d: d["model"].update(dropout=0.1), "dropout=0.1"),
        (lambda d: d["model"]["merges"].reverse(), "not in the order of their ids"),
        (lambda d: d["model"]["vocab"].pop("Ā"), "lacks the bytes 00"),
        (lambda d: d["model"]["vocab"].update({"zq": 999}), "makes 'zq' of 'z' and 'q', and no merge does"),
        (lambda d: d["model"]["vocab"].update({"zqx": 999}), "no merge gives its token 'zqx'"),
        (lambda d: d.update(normalizer={"type": "NFKC"}), "normaliser NFKC"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normaliser Lowercase"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "a space before"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "ByteLevel"),
        (lambda d: d["added_tokens"][0].update(special=False), "'?<|start|>'? is found in ordinary text"),
        (lambda d: d.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "WordLevel, not BPE"),
    ],
)
def test_what_tiktoken_cannot_express_is_refused(
    make_backend: Callable[[str], Backend], change: Callable[[Any], Any], words: str
) -> None:
    definition = json.loads(make_backend("gpt2").to_str())
    change(definition)
    tok = _unchecked(definition)
    with pytest.raises(InputError, match=words.replace("|", r"\|")) as caught:
        to_tiktoken(tok)
    assert "tiktoken cannot express it" in str(caught.value)


def _unchecked(definition: Any) -> HFTokenizer:
    """Past the backend, which refuses some of these itself."""
    tok = object.__new__(HFTokenizer)
    object.__setattr__(tok, "definition", canonical(definition))
    return tok


def test_saved_loaded_pickled(backend: Backend, tmp_path: Path) -> None:
    tok = wrapped(backend, special_tokens=ROLES, add_bos=True, stop_ids=(0, 7), chat_template="{{ x }}")
    assert tokenizers.load(tok.save(tmp_path)) == tokenizers.load(tmp_path) == tok
    assert tokenizers.load(tmp_path).fingerprint == tok.fingerprint
    tok.encode("x")
    again = pickle.loads(pickle.dumps(tok))
    assert (again, hash(again), again.encode("café")) == (tok, hash(tok), tok.encode("café"))
    others = [wrapped(backend), wrapped(backend, special_tokens=ROLES), tok]
    assert len({other.fingerprint for other in others}) == 3


def test_a_model_directory(backend: Backend, tmp_path: Path) -> None:
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    text = "The gardener's café"
    bare = tokenizers.load(tmp_path)
    assert isinstance(bare, HFTokenizer)
    assert bare.encode(text) == backend.encode(text, add_special_tokens=False).ids  # neither padded nor cut off
    assert (bare.eot_id, bare.pad_id, bare.start_ids, bare.stop_ids) == (None, None, (), ())
    config = {
        "eos_token": {"content": "<|end|>"},
        "bos_token": "<|start|>",
        "add_bos_token": True,
        "chat_template": "A",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>", "eos_token": "<|pad|>"}))
    end = backend.token_to_id("<|end|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))  # what counts without the other file
    assert getattr(tokenizers.load(tmp_path), "stop_ids", None) == (3, 4)
    for eos, stops in ((0, (0,)), ([end, 5], (end, 5)), (None, (3, 4))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        tok = tokenizers.load(tmp_path / "tokenizer.json")
        assert isinstance(tok, HFTokenizer)
        # No post-processor puts the start there, so add_bos_token is without effect, as in transformers.
        assert (tok.eot_id, tok.start_ids, tok.pad_id, tok.stop_ids) == (end, (), end + 1, stops)
    assert tok.chat_template == "A"
    (tmp_path / "chat_template.jinja").write_text("B\r\n")
    assert hf_files.from_directory(tmp_path).render_chat([]) == "B"
    for name in ("chat_template.jinja", "tokenizer.jaxlm.json"):  # in a directory as published, and as saved here
        (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('No.') }}")
        place = hf_files.from_directory(tmp_path).save(tmp_path / "saved").parent if "jaxlm" in name else tmp_path
        with pytest.raises(InputError) as caught:
            tokenizers.load(place).render_chat([])
        assert str(caught.value) == f"{place / name}: chat template: refuses this conversation: No."
    hf_files.write_directory(tok, tmp_path / "out")
    assert tokenizers.load(tmp_path / "out") == HFTokenizer(tok.definition, tok.special_tokens, None, (), "A")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", '{"model": ', "not readable as JSON"),
        ("tokenizer.json", "[]", "expected a JSON object"),
        ("tokenizer.json", '{"model": {"type": "Magic"}}', "not a tokenizer that `tokenizers` can read"),
        ("tokenizer.json", "{}", "not a tokenizer that `tokenizers` can read"),
        ("tokenizer_config.json", '{"eos_token": "<gone>"}', "field eos_token: '<gone>' is not in the vocabulary"),
        ("tokenizer_config.json", '{"chat_template": 5}', "field chat_template: expected a template"),
        ("generation_config.json", '{"eos_token_id": "two"}', "generation_config.json: field eos_token_id: .*'two'"),
        ("generation_config.json", '{"eos_token_id": [1, null]}', r"generation_config.json: .*found \[1, None\]"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(
    make_backend: Callable[[str], Backend], tmp_path: Path, name: str, content: Any, words: str
) -> None:
    make_backend("gpt2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words) as caught:
        tokenizers.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_only_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(InputError, match="only a SentencePiece model"):
        hf_files.from_directory(tmp_path)


def test_bos_rules(sentencepiece: Backend) -> None:
    roles = (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    start = sentencepiece.token_to_id("<s>")
    assert wrapped(sentencepiece, special_tokens=roles).start_ids == (start,)  # as its post-processor says
    assert wrapped(sentencepiece, special_tokens=roles, add_bos=False).start_ids == ()
    tok = wrapped(sentencepiece, special_tokens=roles)
    assert start not in tok.encode("The café")  # encode adds nothing
    assert tok.decode(tok.encode("The 🚀  café")) == "The 🚀  café"


def test_a_sentencepiece_tokenizer_json(sentencepiece: Backend, hard: list[str]) -> None:
    """Llama 2's kind: a space before the text, spaces as ▁, bytes where no piece is; against the library itself."""
    tok = wrapped(sentencepiece, special_tokens=(("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")))
    seen = set()
    for text in hard:
        ids = tok.encode(text)
        seen.update(ids)
        assert ids == sentencepiece.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == sentencepiece.decode(ids) == text
        assert "".join(tok.pieces(ids)) == text
    byte = sentencepiece.token_to_id("<0x0A>")
    assert {byte, byte - 10} <= seen  # a line break and a null are bytes
    assert tok.unk_id not in seen
    assert tok.unk_id not in tok.encode("<unk>")  # a spelling, not the token


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_streamed_is_decoded(backends: dict[str, HFTokenizer], sentencepiece: Backend, data: st.DataObject) -> None:
    for tok in (backends["gpt2"], wrapped(sentencepiece)):
        ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=20))
        parts = list(stream_text(tok, ids))
        assert "".join(parts) == tok.decode(ids)
        assert all(parts)


def test_characters_come_whole(backends: dict[str, HFTokenizer]) -> None:
    tok = backends["gpt2"]
    ids = tok.encode("a🦊b")  # not in the corpus, so four bytes
    assert len(ids) > 4
    assert list(stream_text(tok, ids)) == ["a", "🦊", "b"]
    assert list(stream_text(tok, ids[:3])) == ["a", "\ufffd"]
    for wrong in (-1, tok.vocab_size):
        with pytest.raises(InputError, match=f"token id {wrong}"):
            tok.decode([wrong])
    with pytest.raises(InputError, match="U\\+D800 at offset 1"):
        tok.encode("a\ud800")


def test_a_chat_prompt(backends: dict[str, HFTokenizer]) -> None:
    tok = backends["gpt2"]
    with pytest.raises(InputError, match="has none"):
        tok.apply_chat_template([{"role": "user", "content": "hi"}])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tok = HFTokenizer(tok.definition, special_tokens=ROLES, chat_template=template)
    ids = tok.apply_chat_template([{"role": "user", "content": "the"}])
    assert ids == [tok.bos_id, *tok.encode("the"), tok.eot_id]


def test_a_chat_prompt_is_open_for_the_answer_unless_told_otherwise(backends: dict[str, HFTokenizer]) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} a{% endif %}"
    tok = HFTokenizer(backends["gpt2"].definition, chat_template=template)
    talk = [{"role": "user", "content": "the"}]
    assert tok.apply_chat_template(talk) == tok.apply_chat_template(talk, True) == tok.encode("the a")
    assert tok.apply_chat_template(talk, add_generation_prompt=False) == tok.encode("the")


def test_added_tokens_may_be_ordinary(make_backend: Callable[[str], Backend]) -> None:
    backend = make_backend("gpt2")
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tok = wrapped(backend)
    assert tok.encode("a<tool>b")[1] == backend.token_to_id("<tool>")
