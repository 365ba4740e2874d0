"""Tokenization mapped over shards: whoever encodes, the result is the same file for file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.config import load
from jaxlm.errors import InputError
from jaxlm.stages import pieces
from jaxlm.stages.plan import plan
from jaxlm.stages.runner import run_stage
from jaxlm.stages.store import write_spec

OVERRIDES = ["tokenizer.kind=bpe", "tokenizer.vocab_size=300", "data.pack=documents", "sft.enabled=false"]


@pytest.fixture
def stages(tmp_path):
    """stages(name) -> specs of download and tokenize in a root of their own; 40 documents."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text(
        "".join(f'{{"text": "document {k}: the cat sat {k % 7} times on mat {k % 3}"}}\n' for k in range(40))
    )

    def make(name):
        (tmp_path / f"{name}.yaml").write_text(f"data: {{source: file, path: {documents}, seq_len: 16}}\n")
        cfg = load(tmp_path / f"{name}.yaml", OVERRIDES).replace(root=str(tmp_path / name), launcher="inline")
        download, tokenize = plan(cfg)[:2]
        run_stage(download, launcher="inline")
        return tokenize

    return make


def digests(manifest):
    return {name: output["sha256"] for name, output in manifest.outputs.items()}


@pytest.mark.parametrize("shards", [1, 3, 50])
def test_shards_give_the_stage_alone_file_for_file(stages, shards):
    alone, _ = run_stage(stages("alone"), launcher="inline")
    spec = stages("mapped")
    write_spec(spec)
    print_of_tokenizer = pieces.build_tokenizer(spec.directory)
    tokens = sum(pieces.encode_shard(spec.directory, shard, shards) for shard in range(shards))
    mapped, _ = run_stage(spec, launcher="inline")
    assert (mapped.id, digests(mapped), mapped.results) == (alone.id, digests(alone), alone.results)
    assert (print_of_tokenizer, tokens) == (alone.results["fingerprint"], sum(alone.results["tokens"].values()))
    assert not (spec.directory / "encoded").exists()


def test_the_shards_are_used_and_what_is_missing_is_encoded(stages, monkeypatch):
    from jaxlm.stages import tokenize

    spec = stages("mapped")
    write_spec(spec)
    pieces.build_tokenizer(spec.directory)
    pieces.encode_shard(spec.directory, 1, 4)  # the others were not done when a flow was stopped
    encoded = []
    encode = pieces.encode
    monkeypatch.setattr(pieces, "encode", lambda tokenizer, texts: encoded.extend(texts) or encode(tokenizer, texts))
    monkeypatch.setattr(tokenize.tokenizers, "build", lambda *args, **kwargs: pytest.fail("it is there already"))
    manifest, _ = run_stage(spec, launcher="inline")
    assert len(encoded) == 30  # of 36 training and 4 validation documents, without a quarter of each
    monkeypatch.undo()
    assert digests(manifest) == digests(run_stage(stages("alone"), launcher="inline")[0])


def test_a_shard_says_where_a_text_lies_that_it_cannot_express(tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["abc\nabc"] * 18 + ["cab", "a\nbx"]  # 18 for training, 2 for validation
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "run.yaml").write_text(f"data: {{source: file, path: {file}, seq_len: 4}}\nsft: {{enabled: false}}\n")
    cfg = load(tmp_path / "run.yaml", ["tokenizer.kind=char", "tokenizer.unk=false"]).replace(
        root=str(tmp_path), launcher="inline"
    )
    download, spec = plan(cfg)[:2]
    run_stage(download, launcher="inline")
    write_spec(spec)
    pieces.build_tokenizer(spec.directory)
    pieces.encode_shard(spec.directory, 0, 2)
    with pytest.raises(InputError) as alone:
        run_stage(spec, launcher="inline")
    with pytest.raises(InputError) as mapped:
        pieces.encode_shard(spec.directory, 1, 2)
    assert str(mapped.value) == str(alone.value)
    assert f"data.path={file}, document 20, line 2 of it (val split): character 'x'" in str(mapped.value)


def test_a_runner_whose_package_is_missing(monkeypatch):
    from flows import mapping

    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(mapping.importlib, "import_module", gone)
    with pytest.raises(InputError, match="runner=ray: the package prefect-ray is not installed"):
        mapping.task_runner("ray", 2)


@pytest.mark.slow
def test_the_workers_of_a_pool_end_with_a_flow_that_was_killed(tmp_path, processes):
    code = (
        "from flows import mapping\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        "    with mapping.task_runner('processes', 2) as runner:\n"
        "        runner._executor.submit(time.sleep, 0).result()\n"
        "        print('idle', flush=True)\n"
        "        time.sleep(999)\n"
    )
    (tmp_path / "pool.py").write_text(code)
    checkout = Path(__file__).parent.parent.parent
    flow = subprocess.Popen(
        [sys.executable, tmp_path / "pool.py"],
        env={**os.environ, "PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert flow.stdout.readline() == "idle\n"
        workers = processes.descendants(flow.pid)
    finally:
        flow.kill()
        flow.communicate()
    assert len(workers) >= 2  # a worker and the tracker of its resources
    assert processes.wait_until(lambda: not any(map(processes.running, workers)), 60)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["threads", "processes", "dask"])
def test_a_flow_maps_the_shards_over_a_task_runner(stages, runner, prefect_home, tmp_path):
    """In a process of its own: Prefect reads its settings once."""
    if runner == "dask":
        pytest.importorskip("prefect_dask", reason="prefect-dask is not installed whole", exc_type=ImportError)
    alone, _ = run_stage(stages("alone"), launcher="inline")
    code = (
        "import sys\n"
        "from flows import command, parts\n"
        "if __name__ == '__main__':\n"
        "    command.run(sys.argv[1], sys.argv[4:], sys.argv[2], flow=parts.prepare, last='prepare', shards=3, "
        "runner=sys.argv[3])\n"
    )
    (tmp_path / "map.py").write_text(code)
    spec = stages("mapped")
    shutil.rmtree(tmp_path / "mapped")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    checkout = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, tmp_path / "map.py", tmp_path / "mapped.yaml", tmp_path / "mapped", runner, *OVERRIDES],
        env={
            **clean,
            "PREFECT_HOME": str(prefect_home),
            "PYTHONPATH": str(checkout),
            "DASK_TEMPORARY_DIRECTORY": str(tmp_path),
        },
        cwd=checkout, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mapped, cached = run_stage(spec, launcher="inline")
    assert cached
    assert digests(mapped) == digests(alone)
