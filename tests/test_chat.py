from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxlm import chat, init, interop
from jaxlm.cli import main
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.interop import save_hf
from jaxlm.sample import Sampling, generate
from jaxlm.sample.stream import Piece
from jaxlm.tokenizers import HFTokenizer

QUICK_COMPILE = True
GREEDY = Sampling(temperature=0)
TEMPLATE = (
    "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content ~ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> HFTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<user>", "<assistant>", "<system>"])
    specials = (("eos_token", "<end>"),)
    return HFTokenizer(backend.to_str(), special_tokens=specials, chat_template=template)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny published model, as a directory."""
    cfg = ModelConfig(
        vocab_size=260, n_layers=1, d_model=32, n_heads=2, max_seq_len=64, norm="rms", position="rotary", mlp="swiglu",
        d_ff=64,
    )  # fmt: skip
    params = init(cfg, jax.random.key(1))
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(path, cfg, params, tokenizer())
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> chat.Loaded:
    return chat.load_model(directory)


def test_a_directory_is_a_model(model: chat.Loaded) -> None:
    assert model.stop_ids == (256,)
    assert isinstance(model.tokenizer, HFTokenizer)
    assert model.tokenizer.chat_template == TEMPLATE
    assert model.template is None


def test_a_run_is_a_model(tiny_run: Any) -> None:
    model = chat.load_model("tiny", tiny_run.root)
    assert model.stop_ids == (model.tokenizer.eot_id,)
    assert model.template == tiny_run.cfg.sft.template
    question = [{"role": "user", "content": "Where is Anna?"}]
    asked = tiny_run.cfg.sft.template.replace("{prompt}", "Where is Anna?")
    # As the fine-tuning's examples begin: end-of-text, then the prompt in its template.
    assert chat.chat_ids(model, question) == [model.tokenizer.eot_id, *model.tokenizer.encode(asked)]
    out = io.StringIO()
    chat.chat(model, stdin=io.StringIO("Where is Anna?"), out=out, sampling=GREEDY, max_new_tokens=4)
    assert out.getvalue().endswith("\n")


def test_a_run_without_fine_tuning_cannot_chat(letters_run: Any) -> None:
    model = chat.load_model("letters", letters_run.root)
    assert model.template is None
    with pytest.raises(InputError, match="no chat template"):
        chat.chat(model, stdin=io.StringIO("hello"), out=io.StringIO())


def test_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such run"):
        chat.load_model("nothing", tmp_path)
    with pytest.raises(InputError, match=r"no such file|gguf"):
        chat.load_model(tmp_path / "x.gguf")
    asked = []

    def load(name: str, dtype: Any = None, revision: str | None = None) -> Any:
        asked.append((name, revision))
        raise InputError("away")

    monkeypatch.setattr(interop, "load_hf", load)
    for name in ("owner/name", "owner/name@main"):
        with pytest.raises(InputError, match="away"):
            chat.load_model(name, tmp_path)
    assert asked == [("owner/name", None), ("owner/name", "main")]


def test_an_end_outside_the_vocabulary_is_said(directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(directory, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 300]}))
    found = chat.load_model(source)
    assert found.stop_ids == (256,)
    assert found.notes == (f"{source}: its files name the end token 300, which is not among the model's 260; it is "
                           "ignored.",)  # fmt: skip


def test_an_imported_run_keeps_its_stop_ids(directory: Path, tmp_path: Path) -> None:
    """Of `jaxlm import-hf`: what the published model's files say ends an answer, as in its own directory."""
    rules = json.loads((directory / "generation_config.json").read_text())
    source = shutil.copytree(directory, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(rules | {"eos_token_id": [256, 258]}))
    with pytest.raises(SystemExit) as ended:
        main(["import-hf", str(source), str(tmp_path / "run")])
    assert ended.value.code == 0
    run, published = (chat.load_model(path) for path in (tmp_path / "run", source))
    assert run.stop_ids == published.stop_ids == (256, 258)
    assert run.tokenizer == published.tokenizer
    jax.tree.map(np.testing.assert_array_equal, run.params, published.params)
    assert chat.chat_ids(run, [{"role": "user", "content": "Hi"}])[0] == 257


def test_export_says_who_reads_it(tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tiny_run.root)
    with pytest.raises(SystemExit) as ended:
        main(["export-hf", "tiny", str(tmp_path / "out"), "--root", root])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err) == (0, "")
    assert "exported as model_type jaxlm; jaxlm reads it and transformers does not" in captured.out
    # What the nano preset has and the nearest family's config.json, Qwen3's, has no field for.
    assert "published family has its norm_scale, embed_mix, key_offset, mlp, logit_softcap\n" in captured.out
    before, after = chat.load_model("tiny", root), chat.load_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert (after.cfg, after.tokenizer, after.stop_ids) == (before.cfg, before.tokenizer, before.stop_ids)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import-hf", "x.gguf", "new", "--revision", "main"], "--revision main: x.gguf is a file and has none"),
        (["import-hf", "x.gguf", "new"], "x.gguf: no such file"),
        (["import-hf", "no/such/place", "new"], "no/such/place: there is no such directory"),
        (["import-hf", "x.gguf", "."], ".: is there already and not an empty directory"),
        (["export-hf", "nothing", "new"], "nothing: no such run, stage or directory"),
        (["chat", "nothing"], "nothing: no such run, stage or directory"),
        (["chat", "nothing", "--top-p", "2"], "top_p"),
        (["sample", "nothing", "--n", "0"], "--n 0"),
    ],
)
def test_wrong_words_are_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (65, "")
    assert captured.err.startswith("jaxlm: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_options_keep_their_names_and_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--root"]
    for command, own in (("sample", ["--prompt", "--n", "--min-p", "--overflow"]),
                         ("chat", ["--system"])):  # fmt: skip
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert all(option in out for option in [*shared, *own])
        assert "keep the k most likely tokens" in out


def test_weights_without_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(InputError, match="there is no tokenizer with these weights"):
        chat.load_model(tmp_path)


def test_one_sample_streams_what_several_give(model: chat.Loaded) -> None:
    texts = []
    for n in (1, 2):
        out = io.StringIO()
        chat.sample(model, "ab", n=n, max_new_tokens=12, sampling=GREEDY, out=out)
        texts.append(out.getvalue())
    assert texts[0].startswith("ab")
    assert texts[1] == texts[0] * 2
    (expected,) = generate(
        model.cfg, model.params, [model.tokenizer.encode("ab")], sampling=GREEDY, max_new_tokens=12,
        stop_ids=model.stop_ids, tokenizer=model.tokenizer,
    )  # fmt: skip
    ended = expected.finish_reason == "stop"
    ids = model.tokenizer.encode("ab") + expected.tokens[: len(expected.tokens) - ended]
    assert texts[0] == model.tokenizer.decode(ids) + "\n"
    with pytest.raises(InputError, match="--n 0"):
        chat.sample(model, "ab", n=0)


def test_an_empty_prompt_starts_from_the_end_of_text(model: chat.Loaded) -> None:
    assert chat.start_ids(model.tokenizer, empty=True) == [256]
    assert chat.start_ids(model.tokenizer, empty=False) == []


class Talk:
    """`stream` replaced by answers made up, to see what the model is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[int]] = []
        self.rooms: list[int] = []
        self.interrupt = False
        monkeypatch.setattr(chat, "stream", self.stream)

    def stream(self, cfg: Any, params: Any, ids: list[int], *, max_new_tokens: int, **options: Any) -> Iterator[Any]:
        self.asked.append(ids)
        self.rooms.append(max_new_tokens)
        assert options["stop_ids"] == (256,)
        for text in ("An", "swer"):
            yield Piece(text, (), ())
            if self.interrupt:
                raise KeyboardInterrupt


def test_a_conversation(model: chat.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, out = Talk(monkeypatch), io.StringIO()
    said = "Hi\n\nAgain\n/reset\nNew\n/exit\nnever"
    chat.chat(model, system="S", stdin=io.StringIO(said), out=out, interactive=True, max_new_tokens=8)
    decode = model.tokenizer.decode
    assert [decode(ids) for ids in talk.asked] == [
        "<system>S<end><user>Hi<end><assistant>",
        "<system>S<end><user>Hi<end><assistant>Answer<end><user>Again<end><assistant>",
        "<system>S<end><user>New<end><assistant>",
    ]
    assert out.getvalue().count("Answer\n") == 3
    assert out.getvalue().startswith(chat.HELP)


@pytest.mark.parametrize("template", ["Q: {prompt}\nA:", None])
def test_a_system_message_that_would_not_be_seen_is_refused(model: chat.Loaded, template: str | None) -> None:
    """Of a model that was fine-tuned here on single questions, and of a published one whose template drops it."""
    deaf = None if template else "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    tuned = model._replace(tokenizer=tokenizer(deaf), template=template)
    for interactive in (False, True):
        with pytest.raises(InputError, match=r"^--system: this model's template has no place for a system message"):
            chat.chat(tuned, system="Be brief.", stdin=io.StringIO("Hi"), out=io.StringIO(), interactive=interactive)


def test_overflow_is_as_in_generate(
    model: chat.Loaded, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context is 64: of 70 letters and 12 new tokens, `crop` leaves the last 52 letters."""
    prompt = "abcdefg" * 10
    command = ["sample", str(directory), "--prompt", prompt, "--max-new-tokens", "12", "--temperature", "0"]

    def ended(*more: str) -> Any:
        with pytest.raises(SystemExit) as end:
            main([*command, *more])
        return end.value.code, capsys.readouterr()

    code, captured = ended()
    assert code == 65
    assert "exceed the model's context of 64" in captured.err
    assert "pass overflow='crop'" in captured.err
    assert ended("--overflow", "wrap")[0] == 65
    code, captured = ended("--overflow", "crop")
    out = io.StringIO()
    chat.sample(model, prompt[-52:], max_new_tokens=12, sampling=GREEDY, out=out)
    assert (code, captured.out) == (0, prompt[:-52] + out.getvalue())
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(chat, "generate", lambda *_, **options: asked.append(options) or [])
    assert ended("--overflow", "slide", "--n", "2")[0] == 0
    assert [options["overflow"] for options in asked] == ["slide"]


def test_one_message_from_a_pipe(model: chat.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, out = Talk(monkeypatch), io.StringIO()
    chat.chat(model, stdin=io.StringIO("two\nlines\n"), out=out, max_new_tokens=8)
    assert model.tokenizer.decode(talk.asked[0]) == "<user>two\nlines<end><assistant>"
    assert out.getvalue() == "Answer\n"
    with pytest.raises(InputError, match="standard input is empty"):
        chat.chat(model, stdin=io.StringIO(" \n"), out=out)


def test_old_turns_are_forgotten(model: chat.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, out = Talk(monkeypatch), io.StringIO()
    # The context is 64. "<user>" + 20 letters + "<end>" are 22 tokens, an answer with its two marks 8: the third
    # question does not fit beside the two before it, with 10 tokens to answer.
    said = "\n".join(["a" * 20, "b" * 20, "c" * 20, "d" * 70, "e" * 58])
    chat.chat(model, stdin=io.StringIO(said), out=out, interactive=True, max_new_tokens=10)
    shown = [model.tokenizer.decode(ids) for ids in talk.asked]
    b, c = "<user>" + "b" * 20 + "<end>", "<user>" + "c" * 20 + "<end>"
    assert shown[2] == f"{b}<assistant>Answer<end>{c}<assistant>"
    assert "the message has 73 tokens, and the model's context 64" in out.getvalue()
    assert shown[3] == "<user>" + "e" * 58 + "<end><assistant>"
    assert talk.rooms == [10, 10, 10, 3]  # what is left of the context


def test_an_answer_can_be_stopped(model: chat.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, out = Talk(monkeypatch), io.StringIO()
    talk.interrupt = True
    chat.chat(model, stdin=io.StringIO("Hi\nGo on\n"), out=out, interactive=True, max_new_tokens=8)
    assert "<assistant>An<end><user>Go on" in model.tokenizer.decode(talk.asked[1])
    with pytest.raises(KeyboardInterrupt):
        chat.chat(model, stdin=io.StringIO("Hi"), out=out, max_new_tokens=8)


def test_a_template_that_fails_stops_before_the_first_message(model: chat.Loaded) -> None:
    broken = model._replace(tokenizer=tokenizer("{{ raise_exception('No chats.') }}"))
    with pytest.raises(InputError, match="refuses this conversation: No chats"):
        chat.chat(broken, stdin=io.StringIO("Hi\n"), out=io.StringIO(), interactive=True)


def test_a_terminal_that_sends_no_utf8(model: chat.Loaded) -> None:
    with pytest.raises(InputError, match=r"^standard input: byte 0 is not UTF-8"):
        chat.chat(model, stdin=io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"), out=io.StringIO(), interactive=True)
