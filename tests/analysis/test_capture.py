from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import analysis, model
from jaxlm.errors import InputError
from jaxlm.model import attention, blocks, transformer
from jaxlm.presets import preset
from jaxlm.sample import prepare

QUICK_COMPILE = True

capture = jax.jit(analysis.capture, static_argnames="names")
apply = jax.jit(jaxlm.apply)

BLOCK = ("attention.q", "attention.k", "attention.v", "attention.probs", "attention.heads", "attention.out", "mid",
         "mlp.hidden", "mlp.out", "out")  # fmt: skip


def test_names_are_every_block_between_the_ends(cfg):
    expected = ["embed", *(f"blocks.{i}.{part}" for i in range(2) for part in BLOCK)]
    expected += (["final_norm"] if cfg.final_norm else []) + ["logits"]
    assert list(analysis.names(cfg)) == expected


@pytest.fixture(scope="module")
def everything(weights, tokens):
    """everything(cfg): all there is to capture, as numpy, and the logits of the model itself; each computed once."""

    @cache
    def both(cfg):
        found = capture(cfg, weights(cfg), tokens, names=analysis.names(cfg))
        return {name: np.asarray(found[name]) for name in found}, np.asarray(apply(cfg, weights(cfg), tokens))

    return both


@pytest.fixture
def seen(cfg, everything):
    return everything(cfg)[0]


def test_every_value_has_the_shape_of_the_table(cfg, seen):
    b, t, h = 2, 6, cfg.d_head
    shapes = {
        "attention.q": (b, cfg.n_heads, t, h), "attention.k": (b, cfg.kv_heads, t, h),
        "attention.v": (b, cfg.kv_heads, t, h), "attention.probs": (b, cfg.n_heads, t, t),
        "attention.heads": (b, cfg.n_heads, t, h), "mlp.hidden": (b, t, cfg.ff), "logits": (b, t, cfg.vocab_size),
    }  # fmt: skip
    assert set(seen) == set(analysis.names(cfg))
    for name, value in seen.items():
        part = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        assert value.shape == shapes.get(part, (b, t, cfg.d_model)), name


def test_the_values_are_those_of_the_model(cfg, seen, weights, tokens):
    """The arithmetic that connects them, done again in numpy: Vaswani et al. (arXiv 1706.03762), section 3."""
    params = jax.tree.map(np.asarray, weights(cfg))
    for i in range(2):
        one = {part: seen[f"blocks.{i}.{part}"] for part in BLOCK}
        before = seen["embed"] if i == 0 else seen["blocks.0.out"]
        q, v = one["attention.q"], np.repeat(one["attention.v"], cfg.n_heads // cfg.kv_heads, axis=1)
        k = np.repeat(one["attention.k"], cfg.n_heads // cfg.kv_heads, axis=1)
        scores = np.where(np.tril(np.ones((6, 6), bool)), q @ k.swapaxes(-1, -2) * cfg.d_head**-0.5, -np.inf)
        probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(one["attention.probs"], probs, atol=2e-5)
        np.testing.assert_allclose(one["attention.heads"], probs @ v, atol=2e-4)
        joined = one["attention.heads"].swapaxes(1, 2).reshape(2, 6, -1)
        weight = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
        out = joined @ weight["attn"]["o"]["kernel"] + weight["attn"]["o"].get("bias", 0)
        np.testing.assert_allclose(one["attention.out"], out, atol=2e-4)
        out = one["mlp.hidden"] @ weight["mlp"]["down"]["kernel"] + weight["mlp"]["down"].get("bias", 0)
        np.testing.assert_allclose(one["mlp.out"], out, rtol=1e-3, atol=2e-3)
        if cfg.norm_position == "pre":
            np.testing.assert_allclose(one["mid"], before + one["attention.out"], atol=1e-5)
            np.testing.assert_allclose(one["out"], one["mid"] + one["mlp.out"], rtol=1e-5, atol=1e-5)
        else:  # LayerNorm after each sum
            for place, total in (("mid", before + one["attention.out"]), ("out", one["mid"] + one["mlp.out"])):
                norm = weight["norm1" if place == "mid" else "norm2"]
                unit = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + cfg.norm_eps)
                np.testing.assert_allclose(one[place], unit * norm["scale"] + norm["bias"], atol=1e-4)
    if cfg.tie_embeddings:
        np.testing.assert_allclose(seen["logits"], seen["final_norm"] @ params["embed"]["tokens"].T, atol=1e-3)


def test_capturing_changes_no_bit_of_the_logits(cfg, everything):
    found, expected = everything(cfg)
    np.testing.assert_array_equal(found["logits"], expected)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        pytest.param("gpt2", "apply", marks=pytest.mark.slow),
        pytest.param("lesson_sinusoidal", "gradient", marks=pytest.mark.slow),
        pytest.param("qwen3", "decode", marks=pytest.mark.slow),
        ("nano", "gradient"),
        ("nano", "decode"),
    ],
)
def test_marks_leave_the_program_as_it_is_without_them(models, weights, tokens, monkeypatch, name, what):
    """The lowered program, text for text: so no result and no time can differ."""
    cfg, params = models[name], weights(models[name])

    def text() -> str:
        if what == "apply":
            # A new function each time, for nothing traced before to be used again.
            return jax.jit(lambda p, x: jaxlm.apply(cfg, p, x)).lower(params, tokens).as_text()
        if what == "gradient":
            loss = lambda p, x: jax.nn.logsumexp(jaxlm.apply(cfg, p, x)).sum()  # noqa: E731
            return jax.jit(jax.grad(loss)).lower(params, tokens).as_text()
        cache = model.init_cache(cfg, 2, 8, stacked=False)
        step = jax.jit(lambda p, x, c: jaxlm.forward(cfg, p, x, cache=c))
        return step.lower(prepare(cfg, params), tokens[:, :1], cache).as_text()

    with_marks = text()
    for module in (attention, blocks, transformer):
        monkeypatch.setattr(module, "checkpoint_name", lambda x, name: x)
    assert "stablehlo" in with_marks
    assert with_marks == text()


@pytest.mark.slow
def test_scanned_and_rematerialised_models_can_be_looked_into(models, weights, tokens, everything):
    cfg = models["gpt2"]
    names = ("blocks.0.attention.probs", "blocks.1.out")
    expected = everything(cfg)[0]
    got = capture(cfg.replace(scan_layers=True, remat=True), weights(cfg), tokens, names=names)
    for name in names:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6)


@pytest.mark.slow
def test_parameters_laid_out_for_decoding_will_do(models, weights, tokens, everything):
    cfg = models["nano"]
    got = capture(cfg, prepare(cfg, weights(cfg)), tokens, names="blocks.1.out")["blocks.1.out"]
    np.testing.assert_allclose(got, everything(cfg)[0]["blocks.1.out"], rtol=1e-4, atol=1e-5)


def test_segments_and_positions_reach_the_model(models, weights, tokens):
    cfg = models["gpt2"]
    segments = np.array([[1, 1, 1, 2, 2, 2]] * 2, np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2]] * 2, np.int32)
    names = ("embed", "blocks.0.attention.probs")
    found = capture(cfg, weights(cfg), tokens, names=names, segment_ids=segments, positions=positions)
    probs, embed = np.asarray(found["blocks.0.attention.probs"]), found["embed"]
    assert probs[:, :, 3:, :3].max() == 0
    assert probs[:, :, 3:, 3].min() > 0
    table = np.asarray(weights(cfg)["embed"]["tokens"])[tokens]
    expected = table + np.asarray(weights(cfg)["embed"]["positions"])[positions]
    np.testing.assert_array_equal(embed, expected)


def test_wildcards_stand_for_one_part_of_a_name_and_the_order_is_the_models(models, weights, tokens):
    cfg = models["gpt2"]

    def found(names):
        order = []
        jax.eval_shape(lambda p: order.extend(analysis.capture(cfg, p, tokens, names)), weights(cfg))
        return order

    assert found(("blocks.*.out", "embed", "blocks.1.out")) == ["embed", "blocks.0.out", "blocks.1.out"]
    assert found("blocks.1.mlp.*") == ["blocks.1.mlp.hidden", "blocks.1.mlp.out"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.1.attn.probs", "blocks.1.attention.probs"),
        ("blocks.2.out", "blocks.1.out"),  # this model has blocks 0 and 1
        ("logit", "logits"),
        ("blocks.*.norm", "blocks.1.mlp.out"),
        ("blocks.*", "blocks.0.out"),
        ("", "embed"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_nearest(models, weights, tokens, name, nearest):
    with pytest.raises(InputError) as error:
        analysis.capture(models["gpt2"], weights(models["gpt2"]), tokens, (name,))
    assert repr(name) in str(error.value)
    if name and "*" not in name:
        assert nearest in str(error.value)
    assert "analysis.names(cfg)" in str(error.value)


ROWS = np.zeros((2, 6), int)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": ROWS[0]}, r"tokens: expected \[B, T\], found shape \(6,\)"),
        ({"tokens": ROWS * 1.0}, "tokens: expected whole numbers, found float32"),
        ({"tokens": [[1, 2], [3]]}, "tokens: expected an array of whole numbers, .* pad the rows"),
        ({"tokens": "a text"}, "tokens: expected an array of whole numbers"),
        ({"tokens": ROWS + 2**20}, f"tokens: id {2**20} is outside the vocabulary of 11 tokens"),
        ({"tokens": ROWS - 1}, "tokens: id -1 is outside the vocabulary of 11 tokens"),
        ({"names": 3}, "names: expected a text or several, found 3"),
        ({"names": ("embed", 3)}, "names: expected a text or several, found 3"),
        ({"positions": ROWS[0]}, r"positions: .* shape \(2, 6\), found \(6,\)"),
        ({"segment_ids": ROWS[:, 1:]}, r"segment_ids: .* shape \(2, 6\), found \(2, 5\)"),
        ({"segment_ids": ROWS * 1.0}, "segment_ids: expected whole numbers, found float32"),
    ],
)
def test_what_cannot_be_run_is_refused(models, weights, given, message):
    cfg = models["gpt2"]
    with pytest.raises(InputError, match=message):
        analysis.capture(cfg, weights(cfg), **{"tokens": ROWS, "names": "embed", **given})


@pytest.mark.parametrize("call", [analysis.names, lambda cfg: analysis.capture(cfg, {}, ROWS, "embed")])
def test_a_name_is_no_configuration(call):
    with pytest.raises(InputError, match=r"cfg: expected a ModelConfig, found 'gpt2'; jaxlm\.preset"):
        call("gpt2")


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("form", [lambda cfg, params: params, prepare])
def test_parameters_of_another_configuration_are_refused(models, weights, form, traced):
    """More layers than the configuration has would otherwise be left out without a word."""
    cfg = models["gpt2"]
    params = form(cfg, weights(cfg))
    call = jax.eval_shape if traced else (lambda f, p: f(p))
    for other in (cfg.replace(n_layers=1), cfg.replace(tie_embeddings=False)):
        with pytest.raises(InputError, match=r"params: .*, but the configuration has"):
            call(lambda p, other=other: analysis.capture(other, p, ROWS, "embed"), params)
    found = jax.eval_shape(lambda p: analysis.capture(cfg, p, ROWS.tolist(), "embed"), params)
    assert found["embed"].shape == (2, 6, 16)


@pytest.mark.parametrize("params", [{}, None, {"blocks": ()}])
def test_what_are_no_parameters_is_refused(models, params):
    with pytest.raises(InputError, match=r"params: .* no such weight"):
        analysis.capture(models["gpt2"], params, ROWS, "embed")


def test_a_model_without_a_final_norm_says_so(models, weights, tokens):
    cfg = models["lesson_sinusoidal"]
    with pytest.raises(InputError, match="final_norm"):
        analysis.capture(cfg, weights(cfg), tokens, "final_norm")


def test_a_bigram_table_has_logits_only(weights, tokens):
    cfg = preset("bigram", vocab_size=11)
    params = weights(cfg)
    assert analysis.names(cfg) == ("logits",)
    np.testing.assert_array_equal(
        capture(cfg, params, tokens, names="logits")["logits"], params["bigram"]["table"][tokens]
    )


@pytest.mark.slow
def test_capture_is_a_function_to_differentiate_and_map(models, weights, tokens, everything):
    """Causality by gradient: what a place of the stream depends on ends with the place itself."""
    cfg = models["gpt2"]
    params = weights(cfg)

    def place_two(table: jax.Array) -> jax.Array:
        own = {**params, "embed": {**params["embed"], "positions": table}}
        return analysis.capture(cfg, own, tokens[:1], "blocks.1.out")["blocks.1.out"][0, 2].sum()

    by_place = jnp.abs(jax.jit(jax.grad(place_two))(params["embed"]["positions"])).sum(-1)
    assert (by_place[:3] > 0).all()
    assert (by_place[3:] == 0).all()
    by_row = jax.jit(jax.vmap(lambda row: analysis.capture(cfg, params, row[None], "logits")["logits"][0]))
    np.testing.assert_allclose(by_row(tokens), everything(cfg)[1], atol=1e-5)
