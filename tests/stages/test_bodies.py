"""The stages' own work, through the runner, on runs so small that the whole chain takes seconds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import TrainConfig, load
from jaxlm.data import storyworld
from jaxlm.errors import DivergedError, InputError
from jaxlm.metrics_log import history
from jaxlm.stages import pretrain, saved
from jaxlm.stages.plan import plan
from jaxlm.stages.runner import run_chain
from jaxlm.stages.store import check, read_manifest, verify

QUICK_COMPILE = True

STAGES = ["download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate"]


def quiet(line: str) -> None:
    pass


def chain(cfg, last="pretrain"):
    """The manifest of `last`, and the stages that had to be run for it."""
    done = run_chain(cfg, last=last, echo=quiet)
    return done[-1][0], [manifest.stage for manifest, cached in done if not cached]


def flip_a_bit(directory: Path) -> Path:
    """In the middle of the largest file there."""
    victim = max((file for file in directory.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    return victim


# The whole chain


def test_every_stage_leaves_a_whole_result(tiny_run, letters_run):
    assert list(tiny_run.manifests) == STAGES
    assert list(letters_run.manifests) == ["download", "tokenize", "pretrain", "evaluate"]
    for run in (tiny_run, letters_run):
        for manifest in run.manifests.values():
            assert verify(manifest.directory) == []
            assert manifest.outputs
            assert read_manifest(manifest.directory).results == manifest.results


def test_the_same_run_again_finds_everything_done(tiny_run, letters_run):
    for run in (tiny_run, letters_run):
        done = run_chain(run.cfg, echo=quiet)
        assert all(cached for _, cached in done)
        assert [manifest.finished for manifest, _ in done] == [m.finished for m in run.manifests.values()]


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("sft.train.learning_rate=0.02", ["sft", "evaluate"]),
        ("sft.n_examples=61", ["tokenize_sft", "sft", "evaluate"]),
        ("eval.temperature=0.7", ["evaluate"]),
        ("train.steps=13", ["pretrain", "sft", "evaluate"]),
        ("model.n_layers=2", ["pretrain", "sft", "evaluate"]),
        ("data.n_stories=301", STAGES),
        ("seed=1", STAGES),
        ("train.log_every=3", []),
        ("train.checkpoint_every=3", []),
        ("sft.train.eval_every=3", []),
        ("eval.batch_size=3", []),
        ("launcher=process", []),
    ],
)
def test_what_a_change_makes_necessary_again(tiny_run, override, again):
    cfg = load(tiny_run.config, [override]).replace(root=str(tiny_run.root))
    assert [spec.stage for spec in plan(cfg) if check(spec)[0] is None] == again


def test_report_of_a_run(tiny_run):
    results = tiny_run.manifests["evaluate"].results
    report = json.loads((tiny_run.root / "runs" / "tiny" / "report.json").read_text())
    for key in ("val_loss", "floor", "perplexity", "bits_per_byte", "accuracy_before", "accuracy_after"):
        assert math.isfinite(report[key]), key
        assert report[key] == results[key]
    val = tiny_run.manifests["download"].results["splits"]["val"]
    tokens = report["data"]["val_tokens"]
    assert report["perplexity"] == pytest.approx(math.exp(report["val_loss"]))
    assert report["bits_per_byte"] == pytest.approx(report["val_loss"] * tokens / math.log(2) / val["bytes"])
    assert report["floor"] == pytest.approx(-val["log_prob"] / tokens)
    assert 0 < report["floor"] < report["val_loss"] < math.log(report["data"]["vocab_size"])
    assert report["val_loss"] == pytest.approx(tiny_run.manifests["pretrain"].results["val_loss"], abs=1e-4)
    assert 0 <= report["accuracy_before"] <= 1
    assert report["accuracy_by_type"]
    for row in report["accuracy_by_type"].values():
        assert {"before", "after", "baselines"} <= row.keys()
        assert all(0 <= share <= 1 for share in row["baselines"].values())
    assert set(report["seconds"]) >= {"download", "tokenize", "tokenize_sft", "pretrain", "sft"}
    for name in ("report.md", "report.html"):
        assert (tiny_run.root / "runs" / "tiny" / name).stat().st_size > 1000


def test_report_of_a_text_of_ones_own(letters_run):
    """No floor and no questions; the text has no line end for its sample to start from."""
    report = json.loads((letters_run.root / "runs" / "letters" / "report.json").read_text())
    assert report["floor"] is None
    assert report["accuracy_after"] is None
    tokens, size = report["data"]["val_tokens"], report["data"]["val_bytes"]
    assert (tokens, size) == (191, 192)  # a tenth of 1920 characters; the first of them is no target
    assert report["bits_per_byte"] == pytest.approx(report["val_loss"] * 191 / math.log(2) / 192)
    assert report["data"]["vocab_size"] == 15
    assert len(report["samples"][0]["text"]) == 5


def test_training_reports_each_step_once_and_learns(tiny_run, letters_run):
    for run, vals in ((tiny_run, [6, 12]), (letters_run, [5, 10, 12])):
        manifest = run.manifests["pretrain"]
        records = history(manifest.directory)
        train = [record for record in records if record.get("split") == "train"]
        assert [record["step"] for record in train] == list(range(1, run.cfg.train.steps + 1))
        assert [record["step"] for record in records if record.get("split") == "val"] == vals
        assert train[-1]["loss"] < train[0]["loss"] - 0.3
        assert train[-1]["tokens"] == manifest.results["tokens"]
        assert train[-1]["loss"] == manifest.results["train_loss"]
        assert list(manifest.directory.glob("tensorboard/*"))
        rates = [record["lr"] for record in train]
        assert max(rates) == pytest.approx(run.cfg.train.learning_rate)
    samples = [record for record in records if record.get("event") == "sample"]
    assert [record["step"] for record in samples] == vals
    assert all(len(record["text"]) == 5 for record in samples)


def test_no_word_of_a_question_is_unknown(tiny_run):
    """The training stories have none of them: read as `[UNK]`, most questions would be alike."""
    assert tiny_run.manifests["tokenize_sft"].results["unknown"] == {"train": 0, "val": 0}
    tokenizer = saved.load(base_dir(tiny_run)).tokenizer
    world = storyworld.WORLDS["small"]
    for question in storyworld.questions(world, 0, "test", len(world.questions)):
        for text in (question.prompt, question.answer):
            assert tokenizer.unk_id not in tokenizer.encode(text)


def test_unknown_words_of_pairs_of_ones_own_are_counted(letters, tmp_path, capfd):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "the bird", "response": "sat"}) + "\n")
    file.write_text(file.read_text() * 24)
    overrides = ["tokenizer.kind=word", "tokenizer.unk=true", "sft.enabled=true", "sft.source=file", f"sft.path={file}"]
    manifest, _ = chain(letters(*overrides, "sft.template='{prompt}'"), last="tokenize_sft")
    assert manifest.results["unknown"] == {"train": 22, "val": 1}
    assert "val: 1 of 5 tokens are unknown to the tokenizer" in capfd.readouterr().out  # two ends of text, three words


def test_results_of_the_fitting_stages(tiny_run):
    base, tuned = (tiny_run.manifests[name].results for name in ("pretrain", "sft"))
    assert base["steps"] == tuned["steps"] == 12
    assert base["tokens"] < 12 * 4 * 128  # padding and the first token of a row are no targets
    assert tuned["tokens"] < base["tokens"]  # responses only
    assert base["devices"] == len(jax.devices())
    assert base["parameters"] == sum(x.size for x in jax.tree.leaves(saved.load(base_dir(tiny_run)).params))


def base_dir(run):
    return run.manifests["pretrain"].directory


def test_a_trained_model_is_read_back(tiny_run):
    found = saved.load(base_dir(tiny_run))
    assert (found.step, found.notes) == (12, [])
    assert found.cfg.vocab_size == found.tokenizer.vocab_size
    text = "".join(found.tokenizer.decode(found.tokenizer.encode("Mara")))
    assert text.strip() == "Mara" or "[UNK]" in text
    earlier = saved.load(base_dir(tiny_run) / "checkpoints" / "6")
    assert earlier.step == 6
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, earlier.params))
    assert saved.load(base_dir(tiny_run), best=True).step == 12  # the lower validation loss of the two


def test_fine_tuning_starts_from_the_base_model(tiny_run):
    """A few small steps keep the weights near those of the base; fresh ones would be far from them."""
    base, tuned = (saved.load(tiny_run.manifests[name].directory).params for name in ("pretrain", "sft"))
    before, after = (np.asarray(p["blocks"]["attn"]["q"]["kernel"]) for p in (base, tuned))
    assert 0 < np.abs(after - before).max() < 0.2 * np.abs(before).max()


# Going on from what is there


def test_a_finished_training_without_its_manifest_is_not_repeated(letters):
    """Killed between the last checkpoint and the manifest."""
    cfg = letters()
    spec = next(spec for spec in plan(cfg) if spec.stage == "pretrain")
    first = read_manifest(spec.directory)
    lines = (spec.directory / "metrics.jsonl").read_bytes()
    (spec.directory / "manifest.json").unlink()
    manifest, ran = chain(cfg)
    assert ran == ["pretrain"]
    assert (spec.directory / "metrics.jsonl").read_bytes() == lines
    assert {**manifest.results, "tokens_per_s": 0} == {**first.results, "tokens_per_s": 0}


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(letters):
    cfg = letters()
    spec = next(spec for spec in plan(cfg) if spec.stage == "pretrain")
    first = read_manifest(spec.directory).results
    params = saved.load(spec.directory).params
    (spec.directory / "manifest.json").unlink()
    victim = max(
        (spec.directory / "checkpoints" / "12" / "params").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    manifest, _ = chain(cfg)
    assert victim.name in manifest.results["notes"][0]
    assert manifest.results["train_loss"] == first["train_loss"]
    again = saved.load(spec.directory)
    assert again.step == 12
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_continued_pretraining_starts_from_the_named_run(letters, letters_run):
    """With a rate too small to move anything, what comes out is what went in."""
    manifest, ran = chain(
        letters(f"pretrain.init_from={base_dir(letters_run)}", "train.steps=1", "train.learning_rate=1e-12",
                "train.weight_decay=0", "train.sample_tokens=0")
    )  # fmt: skip
    assert ran == ["pretrain"]
    assert manifest.id != letters_run.manifests["pretrain"].id
    before, after = (saved.load(path).params["bigram"]["table"] for path in (base_dir(letters_run), manifest.directory))
    np.testing.assert_allclose(after, before, atol=1e-9)
    assert np.abs(before).max() > 0.1


@pytest.fixture
def options(letters_run):
    found = saved.load(base_dir(letters_run))
    return TrainConfig(model=found.cfg, **letters_run.cfg.train.model_dump()), found.tokenizer


@pytest.mark.parametrize("where", ["", "checkpoints/8"])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_start_from_a_run_or_checkpoint(letters_run, options, where, with_optimizer):
    cfg, tokenizer = options
    path = base_dir(letters_run) / where
    state = pretrain.start_from(cfg, 3, path, tokenizer, with_optimizer=with_optimizer)
    jax.tree.map(np.testing.assert_array_equal, state.params, saved.load(path).params)
    assert (int(state.step), int(state.seed)) == (0, 3)
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0}
    moments = [float(np.abs(x).max()) for x in jax.tree.leaves(state.opt_state) if x.ndim == 2]
    if with_optimizer:
        assert counts == {8 if where else 12}  # updates so far: the schedule goes on from there
        assert min(moments) > 0
    else:
        assert counts == {0}
        assert max(moments) == 0


def refused(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        pretrain.start_from(*args, **kwargs)
    return str(caught.value)


def test_start_from_another_shape_tokenizer_or_optimizer_is_refused(letters_run, tiny_run, options):
    cfg, tokenizer = options
    path = base_dir(letters_run)
    other = cfg.replace(model=cfg.model.replace(vocab_size=16))
    assert "model.vocab_size is 15 there and 16 here" in refused(other, 0, path, tokenizer, with_optimizer=False)
    theirs = saved.load(base_dir(tiny_run)).tokenizer
    assert f"init_from={path}: that model's tokenizer" in refused(cfg, 0, path, theirs, with_optimizer=False)
    muon = cfg.replace(optimizer="muon")
    sentence = refused(muon, 0, path, tokenizer, with_optimizer=True)
    assert "opt_state" in sentence
    assert int(pretrain.start_from(muon, 0, path, tokenizer, with_optimizer=False).step) == 0
    free = cfg.replace(model=cfg.model.replace(dropout=0.1))  # changes no weight's shape or meaning
    assert int(pretrain.start_from(free, 0, path, tokenizer, with_optimizer=False).step) == 0


def test_skipped_steps_are_counted_and_the_run_ends_well(letters, monkeypatch):
    """Two steps are not finite, the last of all among them."""
    from jaxlm.train import loop, step

    def poisoned(cfg, state, batch):
        bad = (state.step == 4) | (state.step == 11)
        return step.train_step(cfg, state, batch | {"targets": jax.numpy.where(bad, 99, batch["targets"])})

    monkeypatch.setattr(loop, "train_step", poisoned)
    cfg = letters("train.on_nonfinite=skip", "train.sample_tokens=0")
    manifest, _ = chain(cfg)
    results = manifest.results
    assert (results["steps"], results["skipped"]) == (12, 2)
    assert results["tokens"] == 10 * 4 * 16
    records = history(manifest.directory)
    assert [record["step"] for record in records if record.get("event") == "skipped"] == [5, 12]
    losses = {record["step"]: record["loss"] for record in records if record.get("split") == "train"}
    assert losses[12] is None
    assert results["train_loss"] == losses[11]
    with pytest.raises(DivergedError, match=r"more than train\.max_skips=1 steps were not finite"):
        chain(letters("train.on_nonfinite=skip", "train.max_skips=1", "train.sample_tokens=0"))


@pytest.mark.parametrize("last", ["sft", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_fine_tuning_on_pairs_of_ones_own(letters, tmp_path, last):
    pairs = [{"prompt": "the cat", "response": " sat"}, {"prompt": "the dog", "response": " sat on"}] * 12
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    overrides = [
        "sft.enabled=true", "sft.source=file", f"sft.path={file}", "sft.train.steps=3", "sft.train.batch_size=2",
        "sft.train.sample_tokens=0", "eval.n_questions=2", "eval.max_new_tokens=3", "eval.n_samples=0",
        "train.sample_tokens=0", "train.steps=3",
    ]  # fmt: skip
    manifest, ran = chain(letters(*overrides), last=last)
    stages = ["tokenize", "tokenize_sft", "pretrain", "sft", "evaluate"]
    assert ran == stages[: stages.index(last) + 1]
    if last == "evaluate":
        assert set(manifest.results["accuracy_by_type"]) == {"all"}
        assert 0 <= manifest.results["accuracy_after"] <= 1
    else:  # each of the two answers and the end of its text, in batches of two packed rows
        assert manifest.results["tokens"] > 0
    file.write_text(json.dumps(pairs[0]) + "\n")
    with pytest.raises(InputError, match=re.escape(str(file))):
        chain(letters(*overrides), last="tokenize_sft")
