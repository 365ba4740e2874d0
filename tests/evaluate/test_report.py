from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jaxlm.errors import DiskError
from jaxlm.evaluate import write_report
from jaxlm.evaluate.formats import cell, duration, fenced, number, percent
from jaxlm.evaluate.report import ReportPaths

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects the text and the attributes of a page, and insists that its elements nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def full(full_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    return write_report(full_data, tmp_path_factory.mktemp("report"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page(full: ReportPaths) -> Page:
    return Page(full.html.read_text())


def test_the_json_holds_the_promised_figures(full: ReportPaths, full_data: dict[str, Any]) -> None:
    report = json.loads(full.json.read_text())
    for key in ("val_loss", "floor", "perplexity", "bits_per_byte", "accuracy_before", "accuracy_after", "seconds"):
        assert report[key] == full_data[key]
    assert report["accuracy_by_type"]["who"]["baselines"] == {"last mention": 0.5}
    assert report["accuracy_by_type"]["who"]["ratio"] == 2.0
    assert report["above_floor"] == pytest.approx(1.1048 / 1.053 - 1)
    assert report["order5_above_floor"] == pytest.approx(1.412 / 1.053 - 1)
    assert report["history"][0] == {
        "split": "train",
        "step": 10,
        "tokens": 10240,
        "loss": pytest.approx(4.2152, abs=1e-4),
    }
    assert len(report["history"]) == 33  # the sample is no point of the curve


def test_the_main_figures_are_null_where_they_were_not_measured(tmp_path: Path) -> None:
    paths = write_report({"name": "bare", "val_loss": 1.0, "perplexity": math.inf}, tmp_path)
    report = json.loads(paths.json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["perplexity"] is None
    for key in ("floor", "bits_per_byte", "accuracy_before", "accuracy_after", "above_floor"):
        assert report[key] is None
    assert report["accuracy_by_type"] == {}
    assert report["seconds"] == {}


def test_the_page_needs_nothing_else(full: ReportPaths, page: Page) -> None:
    source = full.html.read_text()
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#"), f"<{tag} {name}={value}> would be fetched"
    assert not re.search(r"url\((?!#)|@import", source)
    assert "http:" not in source
    assert "https:" not in source
    assert page.tags.count("svg") == 4


def test_the_page_suits_dark_and_narrow_screens(full: ReportPaths, page: Page) -> None:
    source = full.html.read_text()
    assert "prefers-color-scheme: dark" in source
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_shows_the_figures(page: Page) -> None:
    for shown in (
        "quick<start>", "1.105", "3.019", "0.316", "75.0 %", "25.0 % before fine-tuning",
        "+4.9 % against the floor of 1.053",
        "1.412", "842,112 parameters", "5,312,440", "1 h 02 min", "14.2 s", "most | frequent", "12.5 %",
        "Checkpoint 600 was damaged <d/0>.", "✗ (nothing)", "✓ Mara", "✗ Ilse",
        "jaxlm pipeline configs/quickstart.yaml",
        "steps: 900", "0.10.2", "2.00 ×", "tokens seen", "loss (nats per token)",
    ):  # fmt: skip
        assert shown in page.text, shown


def test_text_is_escaped(full: ReportPaths, page: Page) -> None:
    source = full.html.read_text()
    assert "alert(1)" in page.text
    assert "<script" not in source
    assert "<i>" not in source
    assert "&lt;script&gt;" in source


def test_the_markdown_shows_the_figures_and_its_pictures(full: ReportPaths) -> None:
    source = full.markdown.read_text()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", source)
    assert [str(path.relative_to(full.markdown.parent)) for path in full.figures] == links
    assert links == [f"report-files/{name}.png" for name in ("loss", "perplexity", "accuracy", "sft_loss")]
    assert all(path.stat().st_size > 5000 for path in full.figures)
    for shown in (
        "# quick&lt;start&gt;",
        "1.105",
        "+34.1\u00a0%",
        "842,112",
        "most \\| frequent",
        "1\u00a0h 02\u00a0min",
    ):
        assert shown in source, shown


def test_markdown_tables_and_fences_hold_together(full: ReportPaths) -> None:
    source = full.markdown.read_text()
    outside, tables = True, 0
    fence, width = "", 0
    for line in source.splitlines():
        if match := re.match(r"(`{3,})(.*)", line):
            if outside:
                outside, fence = False, match[1]
            elif match[1] == fence and not match[2]:
                outside = True
            continue
        if not outside:
            continue
        columns = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if columns and not width:
            tables += 1
        assert not (columns and width) or columns == width, line
        width = columns
    assert outside
    assert tables == 5
    assert "````text" in source  # the sample holds a fence of three
    assert "\n\n\n" not in source


def test_missing_parts_leave_no_empty_section(tmp_path: Path, full_data: dict[str, Any]) -> None:
    parts = {
        "history": "Pretraining", "samples": "What the model writes", "examples": "Questions, worked",
        "seconds": "Time by stage", "environment": None, "notes": "Notes", "config": "The whole configuration",
    }  # fmt: skip
    data = {key: value for key, value in full_data.items() if key not in parts and key != "command"}
    for key in ("accuracy_by_type", "sft_history", "config_summary", "model", "data"):
        del data[key]
    paths = write_report(data, tmp_path)  # type: ignore[arg-type]
    shown = Page(paths.html.read_text())
    assert paths.figures == ()
    assert not (tmp_path / "report-files").exists()
    assert not {"figure", "table", "section", "article", "aside", "h2"} & set(shown.tags)
    markdown = paths.markdown.read_text()
    assert "##" not in markdown
    assert "![" not in markdown
    for heading in filter(None, parts.values()):
        assert heading not in shown.text


def test_a_corpus_without_a_floor_names_none(tmp_path: Path, full_data: dict[str, Any]) -> None:
    data = {**full_data, "floor": None, "order5_loss": None, "accuracy_after": None}
    paths = write_report(data, tmp_path)  # type: ignore[arg-type]
    text = Page(paths.html.read_text()).text
    assert "floor" not in text
    assert "without fine-tuning" in text
    assert "None" not in text
    assert "floor" not in paths.markdown.read_text()


def test_a_key_that_the_report_does_not_know_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no val_los"):
        write_report({"name": "x", "val_loss": 1.0, "perplexity": 2.7, "val_los": 1.0}, tmp_path)  # type: ignore[typeddict-unknown-key]


def test_a_directory_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write the report"):
        write_report({"name": "x", "val_loss": 1.0, "perplexity": 2.7}, tmp_path / "file")


def test_a_report_is_written_without_jax(tmp_path: Path) -> None:
    program = (
        "import sys, jaxlm.evaluate, jaxlm.metrics_log; assert not {'jax', 'matplotlib', 'jinja2'} & set(sys.modules);"
        "jaxlm.evaluate.write_report({'name': 'x', 'val_loss': 1.0, 'perplexity': 2.7}, sys.argv[1]);"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_formats() -> None:
    assert [number(value) for value in (1.10482, 12.345, 50257.0, None, math.nan)] == [
        "1.105",
        "12.35",
        "50,257",
        "–",
        "–",
    ]
    assert percent(0.8125) == "81.2\u00a0%"
    assert [duration(value) for value in (0.42, 59.94, 59.96, 252.3, 3723)] == [
        "0.4\u00a0s", "59.9\u00a0s", "1\u00a0min 00\u00a0s", "4\u00a0min 12\u00a0s", "1\u00a0h 02\u00a0min"
    ]  # fmt: skip
    assert cell("a|b\n<c>_d_ & `e`") == "a\\|b &lt;c&gt;\\_d\\_ &amp; \\`e\\`"
    assert fenced("a ```` b").startswith("`````text\n")
