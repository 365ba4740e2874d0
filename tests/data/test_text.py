"""Reading documents: exact characters, and errors that name the file and the byte or line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlm.data.text import read_documents, read_text, split_documents, split_text
from jaxlm.errors import DiskError, InputError


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path: Path) -> None:
    text = "First.\r\n\r\n\tSecond — naïve 数据 😀\u2028e\u0301\n"
    assert read_documents(_write(tmp_path / "a b.txt", text)) == [text]
    assert read_documents(str(tmp_path / "a b.txt")) == [text]


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read_text(_write(tmp_path / "a.txt", b"\xef\xbb\xbfHello")) == "Hello"
    assert read_documents(_write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "Hello"}')) == ["Hello"]


def test_json_lines(tmp_path: Path) -> None:
    texts = ["one\ntwo", "U+2028 is\u2028no line end here", "naïve 😀"]
    raw = "\n\n".join(json.dumps({"text": text, "id": 3}, ensure_ascii=False) for text in texts) + "\r\n"
    assert read_documents(_write(tmp_path / "a.jsonl", raw)) == texts


def test_a_directory_in_the_order_of_its_paths(tmp_path: Path) -> None:
    _write(tmp_path / "b.txt", "three")
    _write(tmp_path / "a" / "z.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    _write(tmp_path / "c.txt", "four")
    _write(tmp_path / "README.md", "not a document")
    assert read_documents(tmp_path) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\t\n", "the file is empty"),
        (b"caf\xe9", r"byte 3 \(0xe9\) is not UTF-8"),
        (b"\xef\xbb\xbfab\xff", r"byte 5 \(0xff\)"),  # counted from the start of the file, mark included
        ("cut off: é".encode()[:-1], r"byte 9 \(0xc3\)"),
        (b"\xed\xa0\x80", r"byte 0 \(0xed\)"),  # an encoded surrogate, which UTF-8 forbids (RFC 3629, section 3)
        (b"ab\0c", "byte 2 is NUL"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_bad_file(tmp_path: Path, content: bytes, said: str, name: str) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError, match=said) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "not a JSON value"),
        ("text", "not a JSON value"),
        ("[" * 100_000, "not a JSON value"),
        ('"text"', 'expected an object with a "text" field, found a string'),
        ("[1]", "found an array"),
        ('{"Text": "a", "id": 1}', "found an object with 'Text', 'id'"),
        ('{"text": 3}', "field 'text' must be a string, found a number"),
        ('{"text": null}', "found null"),
        ('{"text": ["a"]}', "found an array"),
        ('{"text": ""}', "field 'text' is empty"),
        ('{"text": " \\n"}', "field 'text' is empty"),
        ('{"text": "ab\\u0000"}', "NUL at character 2"),
        ('{"text": "ab\\ud800"}', "half a surrogate pair at character 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = _write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=said) as caught:
        read_documents(path)
    assert f"{path}:3:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_of_a_directory_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.txt", "fine")
    _write(tmp_path / "b.txt", "")
    with pytest.raises(InputError, match=r"b\.txt: the file is empty"):
        read_documents(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(InputError, match=r"no \.txt or \.jsonl file"):
        read_documents(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_documents(_write(tmp_path / "file", "x") / "below.txt")


def test_an_unreadable_file_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for a failing disk: permissions would not stop a test that runs as root.
    def fails(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(DiskError, match="Input/output error"):
        read_documents(_write(tmp_path / "a.txt", "x"))


@pytest.mark.parametrize(
    ("length", "fraction", "train"),
    [
        (1_115_394, 0.1, 1_003_854),  # Tiny Shakespeare: nanoGPT's data/shakespeare_char/readme.md
        (10, 0.1, 9),
        (10, 0.9, 1),  # in binary, 10 * (1 - 0.9) is below 1
        (10, 0.3, 7),
        (1000, 0.7, 300),
        (7, 0.5, 3),
    ],
)
def test_split_text(length: int, fraction: float, train: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    first, second = split_text(text, fraction)
    assert len(first) == train
    assert first + second == text


@pytest.mark.parametrize(
    ("text", "fraction", "words"),
    [
        ("x", 0.5, "of 1 characters, training got nothing; lower it"),
        ("x" * 9, 0.999, "of 9 characters, training got nothing; lower it"),
        ("", 0.1, "training got nothing"),
        ("x" * 5, 0.0, "validation got nothing; raise it"),
        ("xxxxxxx \n", 0.2, "validation got nothing but white space; raise it"),
        (" \nxxxxxxxx", 0.8, "training got nothing but white space; lower it"),
    ],
)
def test_a_split_must_not_be_empty(text: str, fraction: float, words: str) -> None:
    with pytest.raises(InputError, match=f"^data.val_fraction={fraction} leaves a split empty: .*{words}"):
        split_text(text, fraction)


def test_documents_are_split_whole(tmp_path: Path) -> None:
    documents = ["a" * 40, "b" * 40, "c" * 10, "d" * 10]
    assert split_documents(documents, 0.1) == (documents[:3], documents[3:])
    assert split_documents(documents, 0.15) == (documents[:2], documents[2:])
    assert split_documents(documents, 0.9) == (documents[:1], documents[1:])  # at least one to train on
    assert split_documents(["a", "b" * 99], 0.001) == (["a"], ["b" * 99])  # and one to validate on
    assert split_documents(["0123456789"], 0.2) == (["01234567"], ["89"])
    with pytest.raises(InputError, match="no document"):
        split_documents([], 0.1)
