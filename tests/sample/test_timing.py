"""The timing of decoding: what is counted and shown. Times themselves are not tested, only that there are some."""

from __future__ import annotations

import inspect
import json

import jax
import pytest
from rich.console import Console

from jaxlm.cli import main
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import init
from jaxlm.presets import preset
from jaxlm.sample import Sampling, prepare, timing, timing_report
from jaxlm.sample.timing import BatchTiming, PromptTiming, Timings, measure, read_bandwidth, weight_bytes
from jaxlm.sample.timing_report import bench, figure, table

QUICK_COMPILE = True

CFG = ModelConfig(vocab_size=32, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, max_seq_len=64, position="learned")

# 100 MB at 10 GB/s are 10 ms.
KNOWN = Timings(
    name="known", device="cpu (1 x cpu)", weight_bytes=100_000_000, bytes_per_s=10e9, new_tokens=8, repeats=3,
    sampling=Sampling(top_k=50, top_p=0.9),
    prompts=(PromptTiming(16, 16, 1.5, 0.050), PromptTiming(100, 128, 2.0, 0.200)),
    batches=(BatchTiming(1, 3.0, 0.0125, 0.0005), BatchTiming(8, 4.0, 0.020, 0.002)),
)  # fmt: skip


def test_weight_bytes_are_those_that_a_step_reads():
    def read(cfg):
        return weight_bytes(cfg, jax.eval_shape(lambda: prepare(cfg, init(cfg, jax.random.key(0)))))

    # q, k, v, o: 16x16 + 2 of 16x8 + 16x16; up and down: 2 of 16x64; three norms of 16; the head, which is the
    # embedding: 32x16. Of the positions a step takes one row.
    block = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * 64 + 2 * 16
    assert read(CFG) == 4 * (block + 16 + 32 * 16)
    assert read(CFG.replace(tie_embeddings=False)) == 4 * (block + 16 + 32 * 16)
    # In bfloat16, but for the norms.
    assert read(CFG.replace(compute_dtype="bfloat16")) == 2 * (block + 16 + 32 * 16) + 2 * 3 * 16
    assert read(ModelConfig(kind="bigram", vocab_size=50)) == 4 * 50


def test_figures_that_follow_from_measured_ones():
    assert KNOWN.roofline_s == 0.01
    one, eight = KNOWN.batches
    assert (one.tokens_per_s, eight.tokens_per_s) == (80.0, 400.0)
    assert (one.sampling_share, eight.sampling_share) == (0.04, 0.1)
    console = Console(record=True, width=120)
    for part in table(KNOWN):
        console.print(part)
    text = console.export_text()
    for shown in (
        "50.0",
        "200.0",
        "12.50",
        "80.0",
        "4.0%",
        "80%",
        "400.0",
        "10.0%",
        "50%",
        "100 MB",
        "10.0 GB/s",
        "10.00 ms",
        "sampling: temperature=1.0, top_k=50, top_p=0.9",
    ):
        assert shown in text


def test_the_plot_says_what_it_shows():
    first, step, speed = figure(KNOWN).axes
    assert [axes.get_xlabel() for axes in (first, step, speed)] == ["prompt (tokens)", "batch (rows)", "batch (rows)"]
    assert first.get_ylabel() == "time to first token (ms)"
    assert list(first.lines[0].get_ydata()) == [50.0, 200.0]
    assert [list(line.get_ydata()) for line in step.lines] == [[12.5, 20.0], [10.0, 10.0]]
    assert [list(line.get_ydata()) for line in speed.lines] == [[80.0, 400.0], [100.0, 800.0]]
    assert [label.get_text() for label in step.get_xticklabels()] == ["1", "8"]


def test_bench_measures_shows_and_writes(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(timing_report, "measure", lambda *args, **options: asked.append((args, options)) or KNOWN)
    assert bench(CFG, {}, out=tmp_path / "bench", name="tiny", repeats=2) is KNOWN
    assert asked == [((CFG, {}), {"name": "tiny", "repeats": 2})]
    record = json.loads((tmp_path / "bench" / "decode.json").read_text())
    assert record["batches"][0]["tokens_per_s"] == 80.0
    assert record["roofline_s"] == 0.01
    assert (tmp_path / "bench" / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "time to first token (ms)" in (tmp_path / "bench" / "decode.svg").read_text()
    assert "known: decoding" in capsys.readouterr().out


def test_the_command_measures_what_it_is_told(monkeypatch, capsys):
    asked = []

    def measured(*args, **options):
        asked.append(inspect.signature(measure).bind(*args, **options).arguments)
        return KNOWN

    monkeypatch.setattr(timing_report, "measure", measured)
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "decode", "nano"])
    told = "--batch-sizes 2 --prompt-lengths 5 --prompt-lengths 9 --new-tokens 7 --repeats 1 --dtype bfloat16"
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "decode", "nano", *told.split(), "--temperature", "0.5", "--top-k", "3", "--top-p", "0.8"])
    plain, told = asked
    assert (plain["cfg"], plain["params"]) == (preset("nano").replace(compute_dtype="float32"), None)
    assert (plain["name"], plain["prompt_lengths"], plain["sampling"]) == ("nano", None, KNOWN.sampling)
    assert told["cfg"].compute_dtype == "bfloat16"
    assert told["sampling"] == Sampling(temperature=0.5, top_k=3, top_p=0.8)
    want = {"batch_sizes": (2,), "prompt_lengths": (5, 9), "new_tokens": 7, "repeats": 1}
    assert {name: told[name] for name in want} == want
    assert "nano" not in capsys.readouterr().out  # the table is of what was found


def test_prompts_that_fit_are_taken_by_default():
    for context, want in ((1024, [16, 128, 512]), (400, [16, 128]), (48, [16]), (40, [8])):
        assert timing._lengths(CFG.replace(max_seq_len=context), None, 32) == want


def test_what_ends_at_once_is_not_timed():
    cfg, params = ModelConfig(kind="bigram", vocab_size=9), {"bigram": {"table": jax.numpy.full((9, 9), jax.numpy.nan)}}
    with pytest.raises(InputError, match="ends after 0 of 4 tokens"):
        measure(cfg, params, batch_sizes=(1,), prompt_lengths=(4,), new_tokens=4)


@pytest.mark.slow
def test_a_model_is_measured_and_the_files_are_written(tmp_path, capsys):
    timings = bench(
        CFG, out=tmp_path / "bench", name="tiny", batch_sizes=(1,), prompt_lengths=(20,), new_tokens=4, repeats=2,
        bandwidth_size=1 << 22,
    )  # fmt: skip
    (prompt,), (batch,) = timings.prompts, timings.batches
    assert (prompt.prompt_length, prompt.padded_length, batch.batch) == (20, 32, 1)
    assert batch.sampling_s > 0
    assert 0 < batch.step_s < batch.compile_s
    assert 0 < prompt.first_token_s < prompt.compile_s + batch.compile_s
    record = json.loads((tmp_path / "bench" / "decode.json").read_text())
    assert record["batches"][0]["tokens_per_s"] == batch.tokens_per_s
    assert record["roofline_s"] == timings.roofline_s
    assert (tmp_path / "bench" / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "time to first token (ms)" in (tmp_path / "bench" / "decode.svg").read_text()
    assert "tiny: decoding" in capsys.readouterr().out


def test_the_bandwidth_is_that_of_a_memory():
    assert 1e8 < read_bandwidth(1 << 24, repeats=2) < 1e13  # a disk is slower, no memory is faster


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sizes": (0,)}, "batch_sizes: must be at least 1"),
        ({"batch_sizes": ()}, "give at least one of each"),
        ({"prompt_lengths": (16, -1)}, "prompt_lengths: must be at least 1"),
        ({"repeats": 0}, "repeats: must be at least 1"),
        ({"prompt_lengths": (16, 60), "new_tokens": 8}, "prompt_lengths: 60 and 8 new .* context of 64; .* at most 56"),
        ({"new_tokens": 64}, "new_tokens: 64 leave no room for a prompt in the model's context of 64"),
        ({"prompt_lengths": ()}, "give at least one of each"),
    ],
)
def test_bad_input_is_one_clear_error(monkeypatch, change, message):
    monkeypatch.setattr(timing, "_Run", None)  # nothing is compiled before all has been looked at
    with pytest.raises(InputError, match=message):
        measure(CFG, sampling=Sampling(), **change)
