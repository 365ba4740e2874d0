"""Generation against the naive loop over full forward passes."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import apply
from jaxlm.sample import Sampling, drive, generate, prepare, requests, speculate

QUICK_COMPILE = True

V = 60
# With slots, lengths and `top_log_probs` as in test_engine.py, whose programs are used.
CFG = ModelConfig(
    vocab_size=V, n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, max_seq_len=32, tie_embeddings=False, embed_mix=2,
    key_offset=True,
)  # fmt: skip
SMALL = ModelConfig(vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=16, tie_embeddings=False)
GREEDY = Sampling(temperature=0)


class Letters:
    """Ids 0 .. 25 are the letters; later ids of the model's vocabulary are padding."""

    vocab_size = 26

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


class Wide(Letters):
    vocab_size = V


@pytest.fixture(scope="module")
def params(random_params):
    return prepare(CFG, random_params(CFG, 0.04, head=40))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in (1, 5, 16, 17, 23)]


def run(params, prompts, **more):
    return generate(
        CFG, params, prompts, **{"max_new_tokens": 9, "slots": 4, "sampling": GREEDY, "top_log_probs": 2, **more}
    )


def test_greedy_is_the_naive_loop_and_compilations_are_bounded(params, prompts, compiled):
    def count():
        return np.array([compiled.count("prefill"), compiled.count("decode")])

    before = count()
    out = run(params, prompts)
    assert (count() - before <= 2).all()  # lengths 1 .. 23 fall into two buckets, 16 and 32
    assert (count() >= 2).all()  # the counter counts
    before = count()
    # Token for token the naive loop: what comes after each prefix of the answer is its next token.
    whole = np.array(
        [[*prompt, *got.tokens, *[0] * (23 - len(prompt))] for prompt, got in zip(prompts, out, strict=True)]
    )
    scores = np.asarray(jax.jit(lambda tokens: jax.nn.log_softmax(apply(CFG, params, tokens)))(whole))
    for prompt, got, score in zip(prompts, out, scores, strict=True):
        score = score[len(prompt) - 1 :][:9]
        assert got.tokens == score.argmax(-1).tolist()
        np.testing.assert_allclose(got.log_probs, score.max(-1), atol=1e-4)
        assert got.finish_reason == "length"
        assert got.text is None

    # Other options and limits compile nothing new ...
    varied = [
        Sampling(top_k=i, top_p=0.9, typical_p=0.9, repetition_penalty=1 + i / 9, banned_ids=(i,), seed=i)
        for i in range(1, 4)
    ]
    run(params, [[1], [2] * 9, [3] * 20], sampling=varied, max_new_tokens=[3, 16, 1], stop_ids=(5, 6))
    run(params, [[1]], tokenizer=Letters(), stop=("some", "text"), n=3, sampling=Sampling(no_repeat_ngram=2))
    assert (count() == before).all()
    # ... and neither do all other lengths that the context of 32 has room for: log2(32 / 16) + 2 are promised.
    run(params, [[1] * n for n in range(1, 31)], max_new_tokens=2)
    assert (count() == before).all()


def test_draws_follow_key_request_and_position(params):
    prompt = [1, 2, 3]
    a, b, c = run(params, [prompt] * 3, sampling=Sampling(), max_new_tokens=12)
    assert len({tuple(g.tokens) for g in (a, b, c)}) == 3  # one stream a request
    again = run(params, [prompt] * 2, sampling=Sampling(), max_new_tokens=12, key=jax.random.key(0))
    assert [g.tokens for g in again] == [a.tokens, b.tokens]
    other = run(params, [prompt], sampling=Sampling(), max_new_tokens=12, key=jax.random.key(1))
    assert other[0].tokens != a.tokens
    x, y = run(params, [prompt] * 2, sampling=Sampling(seed=3), max_new_tokens=12)
    assert x.tokens == y.tokens
    # Position, not step: going on from what was drawn draws what would have come.
    rest = run(params, [prompt + x.tokens[:5]], sampling=Sampling(seed=3), max_new_tokens=7)
    assert rest[0].tokens == x.tokens[5:]


def test_stop_ids_limits_and_bans(params, prompts):
    whole = [g.tokens for g in run(params, prompts[:3], max_new_tokens=12)]
    stop = whole[0][4]
    first = whole[0].index(stop)
    stopped, short = run(params, prompts[:2], max_new_tokens=[12, 2], stop_ids=(stop, 59))
    assert stopped.tokens == whole[0][: first + 1]
    assert stopped.finish_reason == "stop"
    assert short.tokens == whole[1][:2]
    later = run(params, prompts[:1], max_new_tokens=12, stop_ids=(stop,), sampling=Sampling(0, min_new_tokens=10))[0]
    assert stop not in later.tokens[:10]
    banned = run(params, prompts[:1], max_new_tokens=12, sampling=Sampling(0, banned_ids=tuple(whole[0])))[0]
    assert not set(banned.tokens) & set(whole[0])
    forced = run(params, prompts[:1], max_new_tokens=12, sampling=Sampling(0, logit_bias={7: 1e4}))[0]
    assert forced.tokens == [7] * 12
    varied = run(params, prompts[:1], max_new_tokens=12, sampling=Sampling(0, presence_penalty=1e4))[0]
    assert len(set(varied.tokens)) == 12


def test_text_stop_strings_and_padding_of_the_vocabulary(params):
    tokenizer = Letters()
    whole = run(params, [[1, 2]], tokenizer=tokenizer, max_new_tokens=14, sampling=Sampling(seed=2))[0]
    assert max(whole.tokens) < 26
    assert whole.text == tokenizer.decode(whole.tokens)
    stop = whole.text[9:12]  # of three tokens, across a look for it
    place = whole.text.index(stop)
    got = run(params, [[1, 2]], tokenizer=tokenizer, max_new_tokens=14, sampling=Sampling(seed=2), stop=("!", stop))[0]
    assert got.text == whole.text[:place]
    assert got.tokens == whole.tokens[: place + 3]
    assert len(got.log_probs) == place + 3
    assert got.finish_reason == "stop"
    ended = run(params, [[1, 2]], tokenizer=tokenizer, sampling=Sampling(seed=2), stop_ids=(whole.tokens[0],))[0]
    assert (ended.text, ended.tokens) == ("", whole.tokens[:1])


def test_a_stop_string_is_the_first_to_be_complete(params):
    # "bcd" starts before "c" and ends after it: what was decoded while nobody looked must not decide.
    whole = run(params, [[1, 2]], tokenizer=Letters(), max_new_tokens=14, sampling=Sampling(seed=2))[0]
    for place in range(1, 12):
        stops = (whole.text[place - 1 : place + 2], whole.text[place])
        got = run(params, [[1, 2]], tokenizer=Letters(), max_new_tokens=14, sampling=Sampling(seed=2), stop=stops)[0]
        end = whole.text.index(whole.text[place])
        assert (got.text, got.tokens, got.finish_reason) == (whole.text[:end], whole.tokens[: end + 1], "stop")


def test_bad_rows_end_alone(params):
    poisoned = {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"].at[59].set(jnp.nan)}}
    clean = [[1, 2, 3], [4, 5]]
    options = Sampling(seed=1, banned_ids=(59,))
    want = run(params, clean, sampling=options)
    got = run(poisoned, [clean[0], [6, 59, 7], clean[1]], sampling=options)
    assert [got[0], got[2]] == want
    assert (got[1].finish_reason, got[1].tokens, got[1].log_probs) == ("error", [], [])
    # No token left: of 26 letters 12 are in the prompt, 6 are banned, and the rest come once each.
    once = Sampling(no_repeat_ngram=1, banned_ids=tuple(range(12, 18)))
    first, left, last = run(
        params, [clean[0], list(range(12)), clean[1]], max_new_tokens=16, tokenizer=Letters(),
        sampling=[options, once, options],
    )  # fmt: skip
    assert left.finish_reason == "error"
    assert sorted(left.tokens) == list(range(18, 26))
    alone = run(params, [clean[0]], max_new_tokens=16, tokenizer=Letters(), sampling=options)
    assert (first, last.finish_reason) == (alone[0], "length")
    (everything,) = run(params, [clean[0]], sampling=Sampling(seed=1, banned_ids=(59,), top_k=10**6))
    assert everything == want[0]


def test_no_pair_of_tokens_comes_twice(params):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    options = [Sampling(0, no_repeat_ngram=n, logit_bias={7: 3}) for n in (0, 1)]
    free, bound = run(params, [prompt] * 2, max_new_tokens=16, sampling=options)
    assert len(set(free.tokens)) < 16  # greedy repeats itself
    assert len(set(prompt) | set(bound.tokens)) == 7 + 16
    pairs = run(params, [[7, 8, 7]], max_new_tokens=16, sampling=Sampling(0, no_repeat_ngram=2, logit_bias={7: 50}))[0]
    assert pairs.tokens[0] == 7  # (7, 7) is new, and then it is not
    both = [7, 8, 7, *pairs.tokens]
    assert len(set(pairwise(both))) == len(both) - 1


def test_samples_of_a_prompt_have_draws_of_their_own(params):
    prompts, options = [[1, 2, 3], [4, 5]], [Sampling(), Sampling(seed=3)]
    one = run(params, prompts, sampling=options, max_new_tokens=12)
    three = run(params, prompts, sampling=options, max_new_tokens=12, n=3)
    assert [three[0], three[3]] == one  # the first is the one that there would be alone
    assert len({tuple(g.tokens) for g in three}) == 6
    assert run(params, prompts, sampling=options, max_new_tokens=12, n=2)[2:] == three[3:5]
    same = run(params, prompts, n=2)
    assert [same[0], same[2]] == [same[1], same[3]] == run(params, prompts)


def test_crop_keeps_the_end_of_a_long_prompt():
    long = list(range(50))
    (cropped,) = requests.check(CFG, [long], None, 9, "crop")
    assert cropped.prompt == long[-(32 - 9) :]


def test_sliding_is_the_naive_loop_over_windows(random_params, windows):
    # A shift of keys and a mix of embeddings are what a window must begin anew with, besides its positions.
    cfg = SMALL.replace(position="learned", key_offset=True, embed_mix=2)
    params = random_params(cfg)
    full = jax.jit(lambda tokens: jax.nn.log_softmax(apply(cfg, params, tokens)))
    uniform = jax.jit(jax.vmap(lambda key, p: jax.random.bits(jax.random.fold_in(key, p), (), "uint32"), (None, 0)))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, V, n).tolist() for n in (3, 15, 16, 20)]
    options = [GREEDY, Sampling(seed=1), GREEDY, Sampling(temperature=0.7, seed=2)]

    def slide(prompts, options, **more):
        more = {"max_new_tokens": 30, "slots": 4, "overflow": "slide", "top_log_probs": 3, **more}
        return generate(cfg, params, prompts, sampling=options, **more)

    got = slide(prompts, options)
    for prompt, option, answer in zip(prompts, options, got, strict=True):
        seen, lengths = windows(16, prompt, answer.tokens)
        scores = np.asarray(full(seen))[np.arange(30), lengths - 1]
        if option is GREEDY:
            assert answer.tokens == scores.argmax(-1).tolist()
        else:  # the inverse CDF in vocabulary order; positions count on while windows are cut
            u = np.asarray(uniform(jax.random.key(option.seed), lengths[0] + np.arange(30))) / 2**32
            prob = np.exp(scores.astype(np.float64) / option.temperature)
            cumulative = np.cumsum(prob, axis=-1) / prob.sum(-1, keepdims=True)
            assert answer.tokens == (cumulative > u[:, None]).argmax(-1).tolist()
        most_likely = np.array(answer.top_log_probs)
        assert np.array_equal(most_likely[..., 0], np.argsort(-scores)[:, :3])
        np.testing.assert_allclose(most_likely[..., 1], -np.sort(-scores)[:, :3], atol=2e-5)
        np.testing.assert_allclose(answer.log_probs, scores[np.arange(30), answer.tokens], atol=2e-5)
    assert slide(prompts[1:2], options[1]) == [got[1]]
    watched = slide(prompts[1:], options[1:], tokenizer=Wide(), stop="...")
    assert [g.tokens for g in watched] == [g.tokens for g in got[1:]]


def test_what_fits_does_not_slide():
    short, long = requests.check(CFG, [[5], [5] * 3], None, [31, 30], "slide")
    assert (short.slides, long.slides) == (False, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1: is empty"),
        ({"prompts": [[1, V]]}, f"prompt 0: id {V} is outside"),
        ({"prompts": ["text"]}, "prompt 0: expected token ids"),
        ({"prompts": [[1] * 30]}, "exceed the model's context of 32"),
        ({"prompts": [[1]], "max_new_tokens": 32, "overflow": "crop"}, "exceed the model's context"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"prompts": [[1]], "sampling": [GREEDY, GREEDY]}, "sampling: 2 given for 1 prompts"),
        ({"prompts": [[1]], "sampling": Sampling(banned_ids=(V,))}, f"id {V} is outside"),
        ({"prompts": [[1]], "stop_ids": (-1,)}, "stop_ids: -1 is outside"),
        ({"prompts": [[1]], "stop": "x"}, "need a tokenizer"),
        ({"prompts": [[1]], "stop": ("a", ""), "tokenizer": Letters()}, "a stop string is empty"),
        ({"prompts": [[1]], "stop": ""}, "a stop string is empty"),
        ({"prompts": [[1]], "n": 0}, "n: must be at least 1"),
        ({"prompts": [[1]], "top_log_probs": -1}, "top_log_probs: must be between 0 and 60"),
        ({"prompts": [[1]], "top_log_probs": V + 1}, "top_log_probs: must be between 0 and 60"),
        ({"prompts": [[1]], "overflow": "wrap"}, "overflow: must be refuse, crop or slide"),
        ({"prompts": [[1]], "slots": 0}, "slots: must be at least 1"),
        ({"prompts": [[1]], "key": np.zeros(2, np.uint32)}, "key: expected one typed key"),
    ],
)
def test_bad_input_is_one_clear_error(params, change, message):
    with pytest.raises(InputError, match=message):
        run(params, **change)


def test_a_cache_ends_where_the_context_does(monkeypatch):
    """Widths are powers of two, and no cache may be longer than the learned positions are."""
    cfg = ModelConfig(vocab_size=V, n_layers=1, d_model=8, n_heads=1, max_seq_len=40, position="learned")
    made = []
    monkeypatch.setattr(drive.decoding, "prefill", lambda *_, **sizes: made.append(sizes["capacity"]))
    for length, new, want in ((20, 20, 40), (3, 16, 32), (3, 20, 40), (33, 7, 40)):
        (request,) = requests.check(cfg, [[1] * length], None, new, "refuse")
        drive.start(cfg, {}, [request], slots=2, key=jax.random.key(0), stop_ids=(), n_vocab=V)
        assert made.pop() == want


def test_decoding_takes_over_the_cache(params):
    group = requests.check(CFG, [[1, 2]], GREEDY, 9, "refuse")
    run = {"slots": 4, "key": jax.random.key(0), "stop_ids": (), "n_vocab": V, "n_top": 2}
    asked, state = drive.start(CFG, params, group, **run)
    drive.advance(CFG, params, asked, state, 1, slides=False)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


@pytest.mark.slow
def test_numbers_of_64_bits_change_no_answer():
    cfg, table = ModelConfig(kind="bigram", vocab_size=9, max_seq_len=32), np.random.default_rng(0).normal(size=(9, 9))
    mine = Sampling(top_k=4, no_repeat_ngram=2, repetition_penalty=1.2)

    def answers():
        given = cfg, {"bigram": {"table": table.astype(np.float32)}}, [[1, 2]]
        (guessed,) = speculate(*given, max_new_tokens=8, sampling=mine).generations
        return generate(*given, max_new_tokens=8, sampling=mine)[0].tokens, guessed.tokens

    want = answers()
    jax.config.update("jax_enable_x64", True)
    try:
        assert answers() == want
    finally:
        jax.config.update("jax_enable_x64", False)


def test_no_prompts_give_no_results(params):
    assert run(params, []) == []
