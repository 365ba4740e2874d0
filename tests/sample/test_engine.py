"""Continuous batching against `generate`, against itself in other orders, and what must not leak between requests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import apply
from jaxlm.sample import Request, Sampling, engine, generate, prepare
from jaxlm.sample.serve import serve

QUICK_COMPILE = True

V = 60
# D = 256: XLA computes a one-row product differently from a row of several only from D = 128 on. Token ids and keys
# that lie one place on must travel with a row.
CFG = ModelConfig(
    vocab_size=V, n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, max_seq_len=32, tie_embeddings=False, embed_mix=2,
    key_offset=True,
)  # fmt: skip
# One shape for all tests, also of test_generate.py. The capacity is the context, so that windows may slide.
SLOTS, CAPACITY, ROOM, TOP = 4, 32, 16, 2
SHAPE = {"slots": SLOTS, "capacity": CAPACITY, "n_new": ROOM}


class Letters:
    """Ids 0 .. 25 are the letters; later ids of the model's vocabulary are padding."""

    vocab_size = 26

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


class Wide(Letters):
    vocab_size = V


@pytest.fixture(scope="module", autouse=True)
def counted(compiled):
    """counted() -> compilations of the engine's functions since the first of these tests."""

    def now():
        return {name: compiled.count(name) for name in ("step", "_insert", "_free")}

    before = now()
    return lambda: {name: n - before[name] for name, n in now().items()}


@pytest.fixture(scope="module")
def params(random_params):
    return prepare(CFG, random_params(CFG, 0.04, head=40))


@pytest.fixture(scope="module")
def requests():
    """More than slots, ragged, each with options of its own."""
    rng = np.random.default_rng(1)
    options = [
        Sampling(temperature=0), Sampling(), Sampling(temperature=0.8, top_p=0.9), Sampling(seed=7, top_k=5),
        Sampling(repetition_penalty=1.4, frequency_penalty=0.3), Sampling(min_p=0.05, banned_ids=(3, 4)),
        Sampling(logit_bias={9: 2.0}, min_new_tokens=4), Sampling(temperature=1.3, seed=2),
        Sampling(presence_penalty=1.0),
    ]  # fmt: skip
    lengths, wanted = (11, 1, 17, 23, 5, 16, 8, 2, 25), (16, 5, 12, 9, 1, 14, 7, 16, 3)
    return [
        Request(rng.integers(0, V, n).tolist(), new, sampling, stop_ids=(50, 51))
        for n, new, sampling in zip(lengths, wanted, options, strict=True)
    ]


def run(params, requests, **more):
    return dict(serve(CFG, params, requests, **{**SHAPE, "top_log_probs": TOP, **more}))


def engine_of(params):
    return engine.init(CFG, params, **SHAPE, n_top=TOP)


def generated(params, requests, **more):
    return generate(
        CFG, params, [r.prompt for r in requests], sampling=[r.sampling for r in requests],
        max_new_tokens=[r.max_new_tokens for r in requests], stop_ids=(50, 51), slots=SLOTS, top_log_probs=TOP, **more,
    )  # fmt: skip


def assert_same(answers, want):
    """The same tokens, and the same log-probabilities but for rounding."""
    assert sorted(answers) == list(range(len(want)))
    for i, expected in enumerate(want):
        got = answers[i]
        assert (got.tokens, got.text, got.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
        np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-4)
        np.testing.assert_allclose(got.top_log_probs, expected.top_log_probs, atol=1e-4)  # ids, too


@pytest.fixture(scope="module")
def answers(params, requests):
    return run(params, requests)


def test_answers_are_those_of_generate(params, requests, answers):
    want = generated(params, requests)
    assert len(answers) == len(requests) > SLOTS
    assert {g.finish_reason for g in want} == {"stop", "length"}
    assert all(len(top) == TOP for top in want[0].top_log_probs)
    assert_same(answers, want)


def test_several_samples_are_those_of_generate(params, requests, answers):
    want = generated(params, requests[1:4], n=3)
    got = run(params, requests[1:4], n=3)
    assert_same(got, want)
    assert len({str(got[i].tokens) for i in range(9)}) > 6
    seeded = 2 * 3  # requests[3] has its own seed, so its number does not matter: the first sample is what n = 1 gives
    assert got[seeded] == answers[3]


def test_what_exceeds_the_context_slides_beside_what_does_not(params, requests, answers, windows):
    """As the naive loop over windows has it, which `generate` has as well."""
    rng = np.random.default_rng(5)
    long = [Request(rng.integers(0, V, n).tolist(), 16, Sampling(temperature=0)) for n in (28, 32, 38, 80)]
    mixed = [long[0], *requests[1:3], *long[1:]]
    got = run(params, mixed, overflow="slide")
    assert dict(serve(CFG, params, mixed, slots=SLOTS, n_new=ROOM, overflow="slide", top_log_probs=TOP)) == got
    assert [got[1], got[2]] == [answers[1], answers[2]]
    full = jax.jit(lambda tokens: jax.nn.log_softmax(apply(CFG, params, tokens)))
    for i in (0, 3, 4, 5):
        seen, lengths = windows(CFG.max_seq_len, mixed[i].prompt, got[i].tokens)
        scores = np.asarray(full(seen))[np.arange(16), lengths - 1]
        assert got[i].tokens == scores.argmax(-1).tolist()
        np.testing.assert_allclose(got[i].log_probs, scores.max(-1), atol=1e-4)

    state = engine.insert(CFG, params, engine_of(params), 0, long[1], index=0, overflow="slide")  # a full window
    state = engine.step(CFG, params, state, 3)
    assert state.rows.n_new[0] == 1
    state = engine.step(CFG, params, state, 3)  # does not move before it is cut
    assert (int(state.rows.n_new[0]), int(state.rows.cache.length[0])) == (1, 32)
    state = engine.step(CFG, params, engine.slide(CFG, params, state), 3)
    assert (int(state.rows.n_new[0]), int(state.rows.cache.length[0])) == (4, 15 + 3)


def test_order_slots_and_neighbours_change_no_bit(params, requests, answers):
    """Request i keeps its number, and with it its key; slots and orders are drawn at random."""
    rng = np.random.default_rng(2)
    for _ in range(3):
        state = engine_of(params)
        order, held = rng.permutation(len(requests)).tolist(), {}
        while order or held:
            free = [slot for slot in range(SLOTS) if slot not in held]
            for slot in rng.permutation(free)[: rng.integers(0 if held else 1, len(free) + 1)].tolist():
                if order:
                    held[slot] = order.pop()
                    state = engine.insert(CFG, params, state, slot, requests[held[slot]], index=held[slot])
            state = engine.step(CFG, params, state, int(rng.integers(1, 6)))
            for slot in [slot for slot in held if state.rows.finished[slot]]:
                assert engine.harvest(state, slot) == answers[held.pop(slot)]
                state = engine.free(state, slot)


def test_the_key_of_an_engine_is_that_of_a_call(params, requests):
    """Requests draw as in a `generate` with the key, each by its number, and an answer is seen as it grows."""
    state, mine = engine.init(CFG, params, **SHAPE, n_top=TOP, key=7), requests[1]
    for slot in range(3):
        state = engine.insert(CFG, params, state, slot, mine, index=slot)
    state = engine.step(CFG, params, state, 3)
    early = [engine.peek(state, slot, tokenizer=Wide()) for slot in range(3)]
    state = engine.step(CFG, params, state, 100)
    done = {slot: engine.harvest(state, slot, tokenizer=Wide()) for slot in range(3)}
    assert_same(done, generated(params, [mine] * 3, key=7, tokenizer=Wide()))
    assert len({str(answer.tokens) for answer in done.values()}) == 3
    for slot, answer in enumerate(early):
        assert (answer.tokens, answer.log_probs) == (done[slot].tokens[:3], done[slot].log_probs[:3])
        assert (answer.finish_reason, answer.text) == (None, done[slot].text[:3])


def test_compilations_are_bounded(params, counted):
    """Every length that fits: one step, one insertion for each power of two of the prompt, 16 and 32."""
    every = [Request([n % V] * n, 1 + n % 2, Sampling(top_k=n, seed=n), stop_ids=(n % 7,)) for n in range(1, 31)]
    assert len(run(params, every)) == 30
    assert counted() == {"step": 1, "_insert": 2, "_free": 1}  # in all that this module has run


def test_a_step_ends_with_the_first_request_that_does(params, requests):
    state = engine_of(params)
    for slot, (prompt, n) in enumerate((([1], 9), ([2, 3], 4))):
        state = engine.insert(CFG, params, state, slot, Request(prompt, n, Sampling(temperature=0)), index=slot)
    state = engine.step(CFG, params, state, 100)
    assert state.rows.n_new[:2].tolist() == [4, 4]
    assert state.rows.finished[:2].tolist() == [0, 2]
    state = engine.step(CFG, params, state, 100)
    assert state.rows.n_new[:2].tolist() == [9, 4]


def test_a_nan_ends_its_own_request_only_and_leaves_nothing_behind(params):
    poisoned = {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"].at[59].set(jnp.nan)}}
    mine = Sampling(seed=1, banned_ids=(59,))
    clean = [Request([1, 2, 3], 8, mine), Request([4, 5], 8, mine)]
    want = run(params, clean)
    nan = Request([6, 59, 7], 8, mine)
    got = run(poisoned, [nan, clean[0], nan, nan, clean[1]])  # the last one gets a row that held a NaN
    assert all((got[i].finish_reason, got[i].tokens) == ("error", []) for i in (0, 2, 3))
    assert [got[1], got[4]] == [want[0], want[1]]


def test_stop_strings_and_text(params):
    mine = Sampling(seed=3)
    (whole,) = run(params, [Request([1, 2], 16, mine)], tokenizer=Letters()).values()
    assert whole.text == Letters().decode(whole.tokens)
    assert len(whole.tokens) == 16
    stop = whole.text[8:11]
    place = whole.text.index(stop)
    several = [Request([1, 2], 16, mine, stop=("!", stop)), Request([1, 2], 16, mine), Request([1, 2], 4, mine)]
    several.append(Request([1, 2], 16, mine, stop=stop))  # the string itself, not each of its letters
    got = run(params, several, tokenizer=Letters(), steps=3)
    assert (got[0].text, got[0].finish_reason) == (whole.text[:place], "stop")
    assert got[0].tokens == whole.tokens[: place + 3]
    assert (got[1], got[2].tokens, got[3]) == (whole, whole.tokens[:4], got[0])


def test_more_stop_ids_than_any_before_make_room(params, requests):
    state = engine.insert(CFG, params, engine_of(params), 2, requests[0], index=0)
    state = engine.insert(CFG, params, state, 0, Request([1], 2, stop_ids=tuple(range(20, 45))), index=1)
    assert state.requests.stop_ids[0].tolist() == [*range(20, 45), *[-1] * 7]
    assert state.requests.stop_ids[2].tolist() == [50, 51, *[-1] * 30]
    assert state.requests.stop_ids[1].tolist() == state.idle.stop_ids[0].tolist() == [-1] * 32


@pytest.mark.slow
def test_more_stop_ids_than_any_before_change_no_other_answer(params, answers, requests):
    stop_ids = (*requests[0].stop_ids, *range(20, 45))
    many = Request(requests[0].prompt, 16, requests[0].sampling, stop_ids=stop_ids)
    got = run(params, [*requests[:3], many])
    assert [got[i] for i in range(3)] == [answers[i] for i in range(3)]
    tokens = answers[0].tokens
    first = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    assert got[3].tokens == tokens[: first + 1]


def test_an_iterator_is_taken_from_as_slots_come_free(params, requests, answers):
    taken = []

    def arriving():
        for i, request in enumerate(requests[:6]):
            taken.append(i)
            yield request

    out = serve(CFG, params, arriving(), **SHAPE, top_log_probs=TOP)
    assert taken == []
    first, _ = next(out)
    assert taken == [0, 1, 2, 3]
    assert sorted([first, *(i for i, _ in out)]) == list(range(6))

    wrong = iter([requests[0], Request([], 3), requests[1]])
    out = serve(CFG, params, wrong, **SHAPE, top_log_probs=TOP)
    assert next(out) == (0, answers[0])  # answered before the fault is reported
    with pytest.raises(InputError, match="request 1: prompt 0: is empty"):
        next(out)


def test_a_bigram_has_no_keys_to_copy():
    cfg = ModelConfig(kind="bigram", vocab_size=257, max_seq_len=32)  # and all sizes: the programs of test_bad_input.py
    params = {"bigram": {"table": jnp.zeros((257, 257))}}
    state = engine.init(cfg, params, slots=3, capacity=32, n_new=16)
    state = engine.insert(cfg, params, state, 1, Request([1, 3], 2), index=0)
    rows = state.rows
    assert [leaf.tolist() for leaf in (rows.last, rows.cache.length, rows.finished)] == [
        [0, 3, 0],
        [0, 1, 0],
        [2, 0, 2],
    ]
    assert engine.free(state, 1).used.tolist() == [False] * 3
    assert dict(serve(cfg, params, [], slots=3)) == {}


def test_bad_use_is_one_clear_error(params):
    state = engine_of(params)
    state = engine.insert(CFG, params, state, 1, Request([1], 2), index=0)
    for slot, request, message in (
        (1, Request([1], 2), "slot: 1 is in use"),
        (4, Request([1], 2), "slot: must be between 0 and 3, found 4"),
        (0, Request([], 2), "is empty"),
        (0, Request([1] * 30, 10), "exceed the model's context of 32; .* 'slide'"),
        (0, Request([1], 17), "exceeds a slot's room for 16"),
        (0, Request([1], 2, stop_ids=(V,)), f"stop_ids: {V} is outside"),
    ):
        with pytest.raises(InputError, match=message):
            engine.insert(CFG, params, state, slot, request, index=1)
    padded = state._replace(requests=state.requests._replace(n_vocab=np.int32(26)))
    with pytest.raises(InputError, match="stop_ids: 26 is never produced"):
        engine.insert(CFG, params, padded, 0, Request([1], 2, stop_ids=(26,)), index=1)
    small = engine.init(CFG, params, slots=1, capacity=24, n_new=ROOM)
    for length, way, message in (
        (20, "refuse", "20 tokens and 10 new ones exceed a slot's capacity of 24"),
        (30, "slide", "its window is to slide, which needs capacity=32"),
    ):
        with pytest.raises(InputError, match=message):
            engine.insert(CFG, params, small, 0, Request([1] * length, 10), index=0, overflow=way)
    for slot, message in ((0, "slot: 0 holds no request"), (1, "still runs")):
        with pytest.raises(InputError, match=message):
            engine.harvest(state, slot)
    with pytest.raises(InputError, match="slot: 0 holds no request"):
        engine.peek(state, 0)
    for sizes, message in (
        ({"slots": 0}, "slots: must be at least 1"),
        ({"capacity": 33}, "capacity: must be at most the model's context of 32"),
        (
            {"requests": [Request([1], 2), Request([1] * 23, 2)], "capacity": 24},
            "prompt 1: .* exceed a slot's capacity",
        ),
        ({"requests": [Request([1] * 30, 9)], "capacity": 24, "overflow": "slide"}, "prompt 0: its window is to slide"),
        ({"top_log_probs": V + 1}, "top_log_probs: must be between 0 and 60"),
        ({"n": 0}, "n: must be at least 1"),
        ({"overflow": "wrap"}, "overflow: must be refuse, crop or slide"),
        ({"requests": [Request([1], 2, stop=("a",))]}, "stop strings need a tokenizer"),
        ({"requests": [Request([1], 2, stop=("",))], "tokenizer": Letters()}, "a stop string is empty"),
        ({"requests": iter([Request([1], 2)]), "capacity": None}, "capacity: say how many"),
        ({"steps": 0}, "steps: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(params, **{"requests": [Request([1], 2)], **sizes})
