from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm import tokenizers
from jaxlm.errors import DiskError, InputError
from jaxlm.tokenizers import BytePairTokenizer, Tokenizer
from jaxlm.tokenizers.base import FILE_NAME
from jaxlm.tokenizers.bpe import TO_PRINTABLE

MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: tokenizers.char("naïve \x00🚀\u0301", pad=True, unk=True, eot=True),
    "word": lambda: tokenizers.word("A naïve café, “open”.\nYes!", split="punctuation", eot=True),
    "bpe": lambda: tokenizers.bpe("naïve café naïve café", 262),
}


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def test_loaded_is_what_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / FILE_NAME
    assert [path.name for path in file.parent.iterdir()] == [FILE_NAME]  # no temporary file left
    for place in (file, file.parent, str(file.parent)):
        loaded = tokenizers.load(place)
        assert loaded == tokenizer
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("naïve") == tokenizer.encode("naïve")
        assert isinstance(loaded, Tokenizer)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(alphabet=st.sets(st.characters(), min_size=1).map("".join))
def test_any_alphabet_survives(tmp_path: Path, alphabet: str) -> None:
    tok = tokenizers.char(alphabet)
    tok.save(tmp_path)
    assert tokenizers.load(tmp_path) == tok


def test_fingerprint_tells_all_that_decides_ids_apart() -> None:
    char, word, bpe = tokenizers.char, tokenizers.word, tokenizers.bpe
    different = [
        *(char("abc"), char("acb"), char("abcd"), char("abc", pad=True), char("abc", unk=True), char("abc", eot=True)),
        *(word("a b"), word("a c"), word("a b", lower=False), word("a b", split="punctuation", lower=True)),
        *(word("a b", unk=False), word("a b", eot=True)),
        *(bpe("abab", 258), bpe("abab", 257), bpe("abab", 257, eot=False), bpe("acac", 258)),
    ]
    prints = [tok.fingerprint for tok in different]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 64 and int(text, 16) >= 0 for text in prints)


def test_fingerprints_never_change() -> None:
    # They are part of stage identities. A change here means that every stored result is made again: say so.
    char, word = MAKERS["char"](), MAKERS["word"]()
    bpe = BytePairTokenizer((*TO_PRINTABLE.values(), "Ġt"), specials=(("<|endoftext|>", 257),))
    assert [tok.fingerprint[:12] for tok in (char, word, bpe)] == ["9bf4e2d49ec5", "ba778e76e33d", "109e516d09f1"]


def _change(file: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("char", lambda c: c.update(alphabet="other"), "field fingerprint"),
        ("char", lambda c: c.update(unk=False), "field fingerprint"),
        ("char", lambda c: c.pop("fingerprint"), "field fingerprint"),
        ("char", lambda c: c.pop("alphabet"), "field alphabet: missing"),
        ("char", lambda c: c.update(alphabet=5), "field alphabet: .*string"),
        ("char", lambda c: c.update(colour="red"), "field colour: unknown"),
        ("char", lambda c: c.pop("kind"), "field kind: missing"),
        ("char", lambda c: c.update(kind="syllable"), "field kind: 'syllable' is unknown, .*char, word, bpe, named"),
        ("char", lambda c: c.update(format=2), "field format: expected 1"),
        ("word", lambda c: c.update(words="one two"), "field words: "),
        ("word", lambda c: c["words"].reverse(), "field fingerprint"),
        ("word", lambda c: c.update(split="letters"), "field split: .*whitespace"),
        ("bpe", lambda c: c["tokens"].pop(), "field fingerprint"),
        ("bpe", lambda c: c["tokens"].pop(7), "field tokens: .*256 bytes"),
        ("bpe", lambda c: c["tokens"].append("\n"), r"field tokens: '\\n' stands for no byte"),
        ("bpe", lambda c: c.update(specials=[["<|endoftext|>"]]), "field specials: "),
        ("char", lambda c: c.update(kind="named", name="gpt5"), "field name: 'gpt5' is unknown"),
        ("char", lambda c: c.update(kind="named", name="gpt2", sha256="0" * 64), "field sha256: found '000"),
    ],
)
def test_damage_names_the_file_and_the_field(
    tmp_path: Path,
    kind: str,
    change: Callable[[dict], object],
    field: str,  # type: ignore[type-arg]
) -> None:
    file = MAKERS[kind]().save(tmp_path)
    _change(file, change)
    with pytest.raises(InputError, match=field) as caught:
        tokenizers.load(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"kind": "char", "alph', b"\xff\xfe", b"[1, 2]", b"null", b"[" * 100_000])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(content)
    with pytest.raises(InputError, match=FILE_NAME):
        tokenizers.load(file)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{FILE_NAME}: no such tokenizer; use gpt2, cl100k_base"):
        tokenizers.load(tmp_path)
    with pytest.raises(InputError, match="gpt7: no such tokenizer"):
        tokenizers.load("gpt7")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, trained: BytePairTokenizer) -> None:
    old = tokenizers.char("abc")
    old.save(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match=FILE_NAME):
            trained.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tokenizers.load(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
