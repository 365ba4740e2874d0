"""Every notebook: kept as people should find it, and, with `-m slow`, run from top to bottom without a network."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000
SECONDS = 600  # for one cell, on a machine that does other work beside it
NAMES = ["01_next_token_pretraining", "02_llm_playground", "03_decoding_and_pretrained_gpt2",
         "04_sampling_from_scratch", "05_inside_the_model"]  # fmt: skip

# A path from a root directory or a drive; not a web address, a shape or a fraction.
ABSOLUTE = re.compile(r"(?<![\w/.:])(/(home|root|Users|work|tmp|var|opt|usr|mnt|content)/|[A-Z]:\\\\)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def written(notebook: dict[str, Any]) -> str:
    """All text of a notebook, its outputs' included, pictures left out."""
    parts = [source(cell) for cell in notebook["cells"]]
    for output in outputs(notebook):
        shown = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
        parts += ["".join(text) for text in [output.get("text", ""), *shown]]
    return "\n".join(parts)


def test_nothing_else_lies_there():
    assert {path.stem for path in NOTEBOOKS} <= set(NAMES)


@pytest.mark.slow
def test_there_are_five_notebooks():
    assert [path.stem for path in NOTEBOOKS] == NAMES


def test_names_sort_in_the_order_of_reading(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)


def test_it_opens_anywhere(notebook):
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert source(notebook["cells"][0]).startswith("# ")


def test_it_was_run_from_top_to_bottom(notebook):
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_its_results_are_kept(notebook):
    kept = outputs(notebook)
    assert kept
    assert any("image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {}) for o in kept)
    assert not [o for o in kept if o["output_type"] == "error"]
    assert not [o for o in kept if o.get("name") == "stderr"], "warnings are left in the outputs"


def test_it_asserts_its_figures(notebook):
    asserting = [cell for cell in code_cells(notebook) if re.search(r"^\s*assert ", source(cell), re.MULTILINE)]
    assert len(asserting) >= 5


def test_it_names_no_place_of_the_machine_it_ran_on(notebook):
    assert not ABSOLUTE.findall(written(notebook))


def test_the_search_for_paths_finds_them():
    assert ABSOLUTE.search("see /home/someone/file")
    assert ABSOLUTE.search('File "/usr/lib/python3')
    assert not ABSOLUTE.search("https://example.org/home/page and 1/2 and tokens/s")


def test_it_is_small(path):
    assert path.stat().st_size < MAX_BYTES


@pytest.fixture(scope="module")
def spent() -> list[float]:
    """Seconds of each notebook so far; printed, not asserted: 12 minutes for all is a figure for two cores."""
    return []


@pytest.mark.slow
def test_it_runs_with_no_network(path, tmp_path, monkeypatch, capsys, spent):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    pytest.importorskip("ipykernel", reason="needs the extra `notebooks`")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody answers
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Notebook 2 keeps its model in the system's directory for temporary files; here it is trained every time.
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    # Two devices and no optimizations are for the other tests; a notebook gets what its reader has.
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    start = time.perf_counter()
    nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises with the cell's error
    spent.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\n{path.name}: {spent[-1]:.0f} s, {len(spent)} so far {sum(spent):.0f} s")
