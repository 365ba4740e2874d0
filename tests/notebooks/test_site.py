"""The documentation builds with one command, warnings being errors, with the notebooks' outputs on its pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURE = "data:image/png;base64,"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package, reason="needs the extra `docs`")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_every_notebook_is_a_page_with_its_pictures(site):
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = (site / "notebooks" / notebook.name).with_suffix(".html").read_text(encoding="utf-8")
        assert page.count(PICTURE) >= notebook.read_text(encoding="utf-8").count('"image/png"'), notebook.name
        assert "assert" in page


@pytest.mark.slow
def test_the_reference_is_made_from_the_docstrings(site):
    page = (site / "reference" / "analysis.html").read_text(encoding="utf-8")
    assert "jaxlm.analysis.capture" in page
    assert "Runs the model and returns the named intermediates." in page
