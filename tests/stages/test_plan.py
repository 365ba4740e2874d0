from __future__ import annotations

import pytest

from jaxlm.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    SftConfig,
    TokenizerConfig,
    TrainOptions,
    load,
)
from jaxlm.errors import InputError
from jaxlm.stages import runs, store
from jaxlm.stages.plan import VERSIONS, plan, until
from jaxlm.stages.process import execute
from jaxlm.stages.spec import Spec

ALL = ("download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate")
BASE = RunConfig()


def ids(cfg):
    return {spec.stage: spec.id for spec in plan(cfg)}


def changed(cfg, base=BASE):
    before, after = ids(base), ids(cfg)
    return tuple(stage for stage in ALL if before.get(stage) != after.get(stage))


# What each field decides, by the description of the stages: the stages named, and all that come after them.
@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("seed=1", ALL),
        ("data.world=rich", ALL),
        ("data.n_stories=10", ALL),
        ("data.n_val_stories=10", ALL),
        ("data.pack=documents", ALL[1:]),
        ("data.seq_len=64", ("tokenize_sft", "pretrain", "sft", "evaluate")),
        ("tokenizer.kind=char", ALL[1:]),
        ("tokenizer.unk=false", ALL[1:]),
        ("model.n_layers=2", ("pretrain", "sft", "evaluate")),
        ("train.steps=7", ("pretrain", "sft", "evaluate")),
        ("train.learning_rate=0.5", ("pretrain", "sft", "evaluate")),
        ("sft.n_examples=5", ("tokenize_sft", "sft", "evaluate")),
        ("sft.template='Q: {prompt} A: '", ("tokenize_sft", "sft", "evaluate")),
        ("sft.train.steps=7", ("sft", "evaluate")),
        ("eval.n_questions=5", ("evaluate",)),
        ("eval.temperature=0.1", ("evaluate",)),
        # These decide nothing.
        ("name=other", ()),
        ("root=/elsewhere", ()),
        ("launcher=inline", ()),
        ("train.log_every=1", ()),
        ("train.checkpoint_seconds=1", ()),
        ("sft.train.eval_every=3", ()),
        ("eval.batch_size=1", ()),
    ],
)
def test_a_field_changes_exactly_the_stages_after_it(tmp_path, override, stages):
    file = tmp_path / "run.yaml"
    file.write_text("")
    assert changed(load(file, [override])) == stages


def test_packed_documents_depend_on_the_row_length():
    packed = BASE.replace(data=DataConfig(pack="documents"))
    assert changed(packed.replace(data=DataConfig(pack="documents", seq_len=64)), packed) == ALL[1:]


def test_without_sft_its_stages_are_left_out():
    specs = plan(BASE.replace(sft=SftConfig(enabled=False)))
    assert [spec.stage for spec in specs] == ["download", "tokenize", "pretrain", "evaluate"]
    assert set(specs[-1].inputs) == {"download", "tokenize", "pretrain"}


@pytest.mark.parametrize("stage", ALL)
def test_a_version_invalidates_its_stage_and_those_after_it(monkeypatch, stage):
    after = {
        "download": ALL,
        "tokenize": ALL[1:],
        "tokenize_sft": ("tokenize_sft", "sft", "evaluate"),
        "pretrain": ("pretrain", "sft", "evaluate"),
        "sft": ("sft", "evaluate"),
        "evaluate": ("evaluate",),
    }
    before = ids(BASE)
    monkeypatch.setitem(VERSIONS, stage, VERSIONS[stage] + 1)
    now = ids(BASE)
    assert tuple(name for name in ALL if before[name] != now[name]) == after[stage]


def test_golden_ids():
    """When this fails, every store made before is made again. Was that meant? Then take the new ids from the message;
    a stage whose behaviour changed gets a new number in VERSIONS as well."""
    assert ids(BASE) == GOLDEN


def test_the_settings_are_the_configuration_again():
    cfg = RunConfig(
        train=TrainOptions(steps=9, log_every=3),
        sft=SftConfig(train=TrainOptions(steps=4, eval_every=2)),
        model=ModelConfig(n_layers=1),
        data=DataConfig(pack="documents", n_stories=7),
        eval=EvalConfig(batch_size=3, n_samples=1),
    )
    specs = {spec.stage: spec for spec in plan(cfg)}
    assert specs["download"].section("data", DataConfig) == cfg.data
    assert specs["tokenize"].section("data", DataConfig) == cfg.data
    assert specs["tokenize"].section("tokenizer", TokenizerConfig) == cfg.tokenizer
    assert specs["tokenize_sft"].section("data", DataConfig) == cfg.data
    assert specs["pretrain"].section("model", ModelConfig) == cfg.model
    assert specs["pretrain"].section("train", TrainOptions) == cfg.train
    assert specs["pretrain"].section("pretrain", PretrainConfig) == cfg.pretrain
    assert specs["sft"].section("sft.train", TrainOptions) == cfg.sft.train
    assert specs["evaluate"].section("eval", EvalConfig) == cfg.eval
    assert "seq_len" not in plan(BASE)[1].settings["data"]  # a stream's rows are cut when they are read


def test_a_file_enters_by_its_bytes_and_suffix_not_by_its_name(tmp_path):
    def with_file(name, text, **more):
        (tmp_path / name).write_text(text)
        return BASE.replace(
            data=DataConfig(source="file", path=str(tmp_path / name), **more), sft=SftConfig(enabled=False)
        )

    base = with_file("a.txt", "once upon a time")
    without_sft = tuple(stage for stage in ALL if "sft" not in stage)
    assert changed(with_file("b.txt", "once upon a time"), base) == ()
    assert changed(with_file("c.txt", "once upon a line"), base) == without_sft
    assert changed(with_file("d.jsonl", "once upon a time"), base) == without_sft
    assert changed(with_file("a.txt", "once upon a time", val_fraction=0.2), base) == without_sft
    assert changed(with_file("a.txt", "once upon a time", n_stories=5), base) == ()
    assert plan(base)[0].section("data", DataConfig).path == str(tmp_path / "a.txt")


def test_a_file_that_changes_after_the_plan_is_refused(tmp_path, fake_modules, monkeypatch):
    import fake_stage

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("once")
    data = DataConfig(source="file", path="a.txt")
    spec = plan(BASE.replace(root=str(tmp_path), data=data, sft=SftConfig(enabled=False)))[0]
    (tmp_path / "a.txt").write_text("twice")
    with pytest.raises(InputError, match=r"^data\.path=.*/a\.txt: the file has changed since the run was planned"):
        execute(spec, fake_stage.run)
    (tmp_path / "a.txt").write_text("once")
    execute(spec, fake_stage.run)


def test_a_url_is_its_digest():
    def with_url(url, sha256):
        data = DataConfig(source="file", url=url, size=3, sha256=sha256)
        return BASE.replace(data=data, sft=SftConfig(enabled=False))

    base = with_url("https://a.example/x.txt", "0" * 64)
    assert changed(with_url("https://b.example/y.txt?z", "0" * 64), base) == ()
    assert changed(with_url("https://a.example/x.txt", "1" * 64), base) == (
        "download",
        "tokenize",
        "pretrain",
        "evaluate",
    )


def test_bad_files_are_one_sentence_with_the_field(tmp_path):
    gone = DataConfig(source="file", path=str(tmp_path / "gone.txt"))
    with pytest.raises(InputError, match=r"^data\.path=.*gone\.txt: no such file"):
        plan(BASE.replace(data=gone, sft=SftConfig(enabled=False)))
    (tmp_path / "a.txt").write_text("x")
    wrong = DataConfig(source="file", path=str(tmp_path / "a.txt"), sha256="0" * 64)
    with pytest.raises(InputError, match=r"its SHA-256 is 2d711642b726… *, and data\.sha256 says 000000000000…"):
        plan(BASE.replace(data=wrong, sft=SftConfig(enabled=False)))
    with pytest.raises(InputError, match=r"^sft\.path="):
        plan(BASE.replace(sft=SftConfig(source="file", path=str(tmp_path / "gone.jsonl"))))


def test_sft_pairs_of_a_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    base = BASE.replace(sft=SftConfig(source="file", path=str(file)))
    assert changed(base.replace(sft=SftConfig(source="file", path=str(file), n_examples=3)), base) == ()
    file.write_text("{ }\n")
    assert "tokenize_sft" in {s.stage for s in plan(base)}
    before = ids(base)["tokenize_sft"]
    file.write_text("{}\n")
    assert ids(base)["tokenize_sft"] != before


def test_a_tokenizer_on_disk_enters_by_its_bytes(tmp_path):
    def named(name):
        return BASE.replace(tokenizer=TokenizerConfig(kind="named", name=name))

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
    assert ids(named(str(tmp_path / "a"))) == ids(named(str(tmp_path / "b")))
    assert plan(named(str(tmp_path / "a")))[1].section("tokenizer", TokenizerConfig).name == str(tmp_path / "a")
    (tmp_path / "b" / "tokenizer.json").write_text("[]")
    assert changed(named(str(tmp_path / "a")), named(str(tmp_path / "b"))) == ALL[1:]
    assert changed(named("cl100k_base"), named("gpt2")) == ALL[1:]


def test_init_from_enters_by_what_it_points_at(tmp_path, fake_modules):
    import fake_stage

    def starting(name):
        return BASE.replace(root=str(tmp_path), pretrain=PretrainConfig(init_from=name))

    made = Spec("pretrain", 1, {"value": 3}, root=str(tmp_path))
    store.write_spec(made)
    with pytest.raises(InputError, match="has not finished"):
        plan(starting(str(made.directory)))
    manifest = execute(made, fake_stage.run)
    runs.record(BASE.replace(root=str(tmp_path), name="first"), "", manifest)
    by_run, by_stage = starting("first"), starting(str(made.directory))
    assert ids(by_run) == ids(by_stage)
    assert changed(by_run, BASE) == ("pretrain", "sft", "evaluate")
    with_optimizer = by_run.replace(pretrain=PretrainConfig(init_from="first", init_optimizer=True))
    assert changed(with_optimizer, by_run) == ("pretrain", "sft", "evaluate")
    spec = plan(by_run)[3]
    assert spec.section("pretrain", PretrainConfig).init_from == str(made.directory)

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "digests.json").write_text("{}")
    before = ids(starting(str(checkpoint)))
    (checkpoint / "not-listed").write_text("x")
    assert ids(starting(str(checkpoint))) == before
    (checkpoint / "digests.json").write_text("{ }")
    assert ids(starting(str(checkpoint)))["pretrain"] != before["pretrain"]
    with pytest.raises(InputError, match=r"firts: no such run, stage or directory; did you mean first\?"):
        plan(starting("firts"))


def test_until_takes_what_a_stage_needs():
    specs = plan(BASE)
    assert [spec.stage for spec in until(specs, "pretrain")] == ["download", "tokenize", "pretrain"]
    assert [spec.stage for spec in until(specs, "tokenize_sft")] == ["download", "tokenize", "tokenize_sft"]
    assert [spec.stage for spec in until(specs, "evaluate")] == list(ALL)
    with pytest.raises(InputError, match="did you mean pretrain"):
        until(specs, "pretrian")
    with pytest.raises(InputError, match=r"stage sft: .* set sft\.enabled=true"):
        until(plan(BASE.replace(sft=SftConfig(enabled=False))), "sft")


GOLDEN = {
    "download": "7d67cdc0773a",
    "tokenize": "9324598c6a15",
    "tokenize_sft": "23086568fb5d",
    "pretrain": "ead72652144a",
    "sft": "94e2c8b52fe2",
    "evaluate": "ca4cd0982d98",
}
