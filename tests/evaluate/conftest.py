from __future__ import annotations

import math
from typing import Any

import pytest

from jaxlm.evaluate.accuracy import by_type


def make_history() -> list[dict[str, Any]]:
    """A plausible loss curve: 30 training points, 4 validation points, one sample."""
    curve = [(step, 1.1 + 4 * math.exp(-step / 40)) for step in range(10, 310, 10)]
    records: list[dict[str, Any]] = [
        {"step": step, "split": "train", "loss": loss, "tokens": step * 1024, "lr": 0.01} for step, loss in curve
    ]
    records += [
        {"step": step, "split": "val", "loss": loss + 0.02, "tokens": step * 1024}
        for step, loss in curve
        if step % 80 == 0
    ]
    return [*records, {"event": "sample", "step": 300, "text": "Mara went home."}]


@pytest.fixture
def history() -> list[dict[str, Any]]:
    return make_history()


@pytest.fixture(scope="session")
def full_data() -> dict[str, Any]:
    """A report with every part, and texts that are hostile to HTML and to Markdown."""
    table = by_type(
        ["who", "who", "where <it> is", "where <it> is"],
        before=[False, False, False, True],
        after=[True, True, True, False],
        baselines={"who": {"last mention": 0.5}, "where <it> is": {"most | frequent": 0.25, "last mention": 0.125}},
    )
    return {
        "name": "quick<start>",
        "val_loss": 1.1048,
        "perplexity": math.exp(1.1048),
        "bits_per_byte": 0.3161,
        "floor": 1.053,
        "order5_loss": 1.412,
        "accuracy_before": 0.25,
        "accuracy_after": 0.75,
        "accuracy_by_type": table,
        "seconds": {"tokenize": 14.25, "pretrain": 148.0, "sft": 3723.0},
        "model": {"parameters": 842112, "shape": "4 layers"},
        "data": {"source": "storyworld", "chars": 5312440, "tokens": 1204332, "stories": 20000},
        "history": make_history(),
        "sft_history": make_history(),
        "samples": [
            {"prompt": "Once <upon>", "text": " a time & <script>alert(1)</script>\n```\nend", "label": "T = 0.8"}
        ],
        "examples": [
            {"type": "who", "prompt": "Who has it?", "expected": "Mara", "before": " ", "after": " Mara<|endoftext|>x"},
            {"type": "who", "prompt": "Who <now>?", "expected": "Tobin", "before": "Mara|<i>", "after": "Ilse"},
        ],
        "config_summary": {"steps": 900, "schedule": "cosine"},
        "config": {"train": {"steps": 900}, "note": "<tag>"},
        "environment": {"device": "cpu", "jax": "0.10.2"},
        "command": "jaxlm pipeline configs/quickstart.yaml",
        "created": "2025-01-31",
        "notes": ["Checkpoint 600 was damaged <d/0>."],
    }
