"""What all tests share: two CPU devices, and quick compilation where a test module asks for it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# A shell that starts the tests in the background has them ignore SIGINT, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports jax: a layout of two devices on every machine, whichever test comes first. Stages run inline
# would otherwise claim the cores of the machine when they find jax not yet in use.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets XLA compile without LLVM's optimizations in modules that say `QUICK_COMPILE = True`.

    Programs of a test run for microseconds and compile for seconds: this halves the seconds. A hook and not a fixture,
    because it must come before the session's fixtures.
    """
    quick = getattr(getattr(item, "module", None), "QUICK_COMPILE", False)
    if quick or "jax" in sys.modules:
        import jax

        jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="session")
def parameter_shapes() -> Callable[[Any], dict[str, tuple[int, ...]]]:
    """parameter_shapes(cfg) -> the shape of each parameter by its path, found without making it."""
    import jax

    from jaxlm import model
    from jaxlm.model.weights import path_of

    @cache
    def shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
        tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
        return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}

    return shapes


# Both trainings have the same options and shapes, so that they share one compiled step.
TINY = """
launcher: inline
data: {n_stories: 300, n_val_stories: 30, seq_len: 128, pack: documents}
tokenizer: {kind: word}
model: {preset: nano, n_layers: 1, d_model: 32, n_heads: 2, max_seq_len: 128, embed_mix: 2}
train: &train {steps: 12, batch_size: 4, warmup_steps: 2, learning_rate: 0.01, log_every: 1, eval_every: 6,
               checkpoint_every: 6, sample_tokens: 0}
sft: {n_examples: 60, train: *train}
eval: {n_questions: 8, max_new_tokens: 4, n_samples: 0, batch_size: 8}
"""

LETTERS = """
launcher: inline
data: {source: file, path: letters.txt, seq_len: 16}
tokenizer: {kind: char, unk: false}
model: {preset: bigram, max_seq_len: 32}
train: {steps: 12, batch_size: 4, learning_rate: 0.1, log_every: 1, eval_every: 5, checkpoint_every: 4,
        sample_tokens: 5}
sft: {enabled: false}
eval: {n_samples: 1, sample_tokens: 5, batch_size: 8}
"""


class Run(NamedTuple):
    """A finished run of the whole chain, made once for all tests. Nobody changes what is in `root`: copy it first.

    Attributes:
        root: holds store/, runs/ and the configuration.
        config: the file `tiny.yaml` or `letters.yaml`, whose name the run has.
        cfg: what it says.
        manifests: of the stages, in their order.
    """

    root: Path
    config: Path
    cfg: Any
    manifests: dict[str, Any]


def _run(root: Path, name: str, text: str) -> Run:
    import jax

    from jaxlm.config import load
    from jaxlm.stages.runner import run_chain

    jax.devices()  # in use, so that no stage asks for all cores of this machine
    config = root / f"{name}.yaml"
    config.write_text(text)
    cfg = load(config).replace(root=str(root))
    done = run_chain(cfg, config_name=str(config), echo=lambda line: None)
    assert not any(cached for _, cached in done)
    return Run(root, config, cfg, {manifest.stage: manifest for manifest, _ in done})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A transformer on the story world, for as long as it takes to go through every stage."""
    from jaxlm.stages import evaluate, tokenize_sft

    with pytest.MonkeyPatch.context() as patch:
        # Threads instead of processes, for a few dozen questions.
        patch.setattr(tokenize_sft, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
        patch.setattr(tokenize_sft, "N_VAL", 20)
        patch.setattr(tokenize_sft, "N_TEST", 30)
        patch.setattr(evaluate, "N_KNOWN", 60)
        return _run(tmp_path_factory.mktemp("tiny"), "tiny", TINY)


@pytest.fixture(scope="session")
def letters_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A bigram table on a text of one's own, without fine-tuning: seconds, compilation included."""
    root = tmp_path_factory.mktemp("letters")
    (root / "letters.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 40)
    return _run(root, "letters", LETTERS.replace("letters.txt", str(root / "letters.txt")))
