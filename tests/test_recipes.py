from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import apply, init, interop, preset, recipes, tokenizers
from jaxlm.errors import InputError, UnavailableError
from jaxlm.interop import save_hf

QUICK_COMPILE = True
VERDICT = """
model: openai-community/gpt2
tokenizer: gpt2
source: verdict
published: {train: 3.7548, val: 3.5596}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> recipes.Recipe:
    (tmp_path / "verdict.yaml").write_text(VERDICT)
    return recipes.load(tmp_path / "verdict.yaml")


def test_a_recipe_is_read(recipe: recipes.Recipe, tmp_path: Path) -> None:
    assert (recipe.name, recipe.length, recipe.stride, recipe.batch_size) == ("verdict", 256, 256, 2)
    for text, words in (
        ("model: x\n", "source"),
        (VERDICT + "colour: red\n", "colour"),
        ("- a\n", "expected a mapping"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            recipes.load(tmp_path / "wrong.yaml")


def test_windows_by_hand() -> None:
    ids = np.arange(9, dtype=np.int32)
    assert recipes.windows(ids, 3, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]  # 7 and 8 are no whole window
    assert recipes.windows(ids, 3, 2).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert recipes.windows(ids, 9, 1).shape == (0, 10)


def test_the_losses_are_those_of_the_logits(
    recipe: recipes.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat sat on the mat; " * 12
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(recipes, "fetch", lambda resource: tmp_path / "text.txt")
    tok = tokenizers.char(text, eot=True)
    cfg = preset("gpt2", vocab_size=tok.vocab_size, n_layers=1, d_model=16, n_heads=2, max_seq_len=8)
    params = init(cfg, jax.random.key(0))
    mirror = tmp_path / "mirror"
    save_hf(mirror / "openai-community" / "gpt2", cfg, params, tok)
    monkeypatch.setenv("JAXLM_MIRROR", str(mirror))
    for name in ("tokenizer.jaxlm.json", "tokenizer.json"):  # the recipe names one
        (mirror / "openai-community" / "gpt2" / name).unlink()
    monkeypatch.setattr(tokenizers, "load", {"gpt2": tok}.get)
    recipe = recipe.replace(length=8, stride=8)
    losses = recipes.run(recipe)
    cut = int(0.9 * len(text))
    for part, loss in ((text[:cut], losses.train), (text[cut:], losses.val)):
        ids = np.array(tok.encode(part))
        rows = np.stack([ids[start : start + 9] for start in range(0, len(ids) - 8, 8)])
        logits = np.asarray(jax.jit(apply)(cfg, params, rows[:, :-1]), np.float64)
        chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
        assert loss == pytest.approx(np.mean(np.log(np.exp(logits).sum(-1)) - chosen), rel=1e-5)
    with pytest.raises(InputError, match=r"train loss \S+ is not the published 3.7548 and val loss"):
        recipes.report(recipe, losses)
    broken = recipes.Losses(float("nan"), losses.val)
    with pytest.raises(InputError, match=r"train loss nan is not the published"):
        recipes.report(recipe, broken)
    figures = recipes.Published(train=losses.train, val=losses.val + 0.0005)
    assert recipes.report(recipe.replace(published=figures), losses).count("published") == 2
    monkeypatch.setattr(tokenizers, "load", {"gpt2": tokenizers.char(text + "0123456789", eot=True)}.get)
    with pytest.raises(InputError, match=r"gpt2: the tokenizer has \d+ entries, but the model embeds \d+"):
        recipes.run(recipe)
    with pytest.raises(InputError, match="hold no window of 8"):
        recipes.window_loss(cfg, params, np.zeros(8, np.int32), recipe)


def test_missing_weights_are_said(recipe: recipes.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(name: str, **options: Any) -> Any:
        raise UnavailableError(f"{name}: the hub cannot be reached.")

    monkeypatch.delenv("JAXLM_MIRROR", raising=False)
    monkeypatch.setattr(tokenizers, "load", lambda name: None)
    monkeypatch.setattr(interop, "load_hf", away)
    with pytest.raises(UnavailableError, match=r"weights of openai-community/gpt2 are missing here .*JAXLM_MIRROR"):
        recipes.run(recipe)
