"""Streaming against `generate`: the same tokens, text as soon as it is complete, and never a part of a stop string."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tokenizers
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.sample import Sampling, drive, generate
from jaxlm.sample.stream import stream

QUICK_COMPILE = True

TEXT = "né€!"  # characters of 1, 2, 3 and 1 bytes, no byte twice
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer of single bytes and the end of text."""
    return tokenizers.bpe("x", 257)


CFG = ModelConfig(kind="bigram", vocab_size=257, max_seq_len=32)  # and all else as in test_bad_input.py: one program


def table_of(tokenizer, text, scores):
    """A bigram table over the bytes of `text`, impossible elsewhere."""
    ids = tokenizer.encode(text)
    table = np.full((257, 257), -1e9, np.float32)
    table[np.ix_(ids, ids)] = scores
    return {"bigram": {"table": jnp.asarray(table)}}


@pytest.fixture(scope="module")
def chanter(bytewise):
    """Says TEXT over and over."""
    n = len(bytewise.encode(TEXT))
    return table_of(bytewise, TEXT, np.roll(np.eye(n), 1, axis=1) * 30)


@pytest.fixture(scope="module")
def letters(bytewise):
    """Draws five letters in any order."""
    return table_of(bytewise, "abcde", np.random.default_rng(0).normal(size=(5, 5)))


def together(pieces):
    pieces = list(pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    tokens = [token for piece in pieces for token in piece.tokens]
    log_probs = [value for piece in pieces for value in piece.log_probs]
    return tokens, "".join(piece.text for piece in pieces), log_probs, pieces[-1].finish_reason


def whole(answer):
    return answer.tokens, answer.text, answer.log_probs, answer.finish_reason


def test_pieces_are_whole_characters(chanter, bytewise):
    start = bytewise.encode("!")
    options = {"sampling": GREEDY, "max_new_tokens": 12, "tokenizer": bytewise}
    pieces = list(stream(CFG, chanter, start, **options))
    assert [piece.text for piece in pieces] == ["n", "é", "€", "!", "n", "é", "\ufffd", ""]  # 12 = 7 + 3 + 2 of 3 bytes
    assert [len(piece.tokens) for piece in pieces] == [1, 2, 3, 1, 1, 2, 2, 0]
    assert together(pieces) == whole(generate(CFG, chanter, [start], **options)[0])


def test_the_first_piece_comes_after_one_step(chanter, bytewise, monkeypatch):
    asked, advance = [], drive.advance

    def watched(cfg, params, requests, state, steps, **more):
        asked.append(steps)
        return advance(cfg, params, requests, state, steps, **more)

    monkeypatch.setattr(drive, "advance", watched)
    pieces = stream(CFG, chanter, bytewise.encode("!"), sampling=GREEDY, max_new_tokens=12, tokenizer=bytewise)
    assert asked == []  # nothing is decoded before it is asked for
    assert next(pieces).text == "n"
    assert asked == [1]
    list(pieces)
    assert max(asked[1:]) > 1


@pytest.mark.parametrize("stop", ["€!n", "!", "é", ("x", "!né€!"), "n"])
def test_no_part_of_a_stop_string_is_shown(chanter, bytewise, stop):
    options = {"sampling": GREEDY, "max_new_tokens": 16, "tokenizer": bytewise, "stop": stop}
    got = together(stream(CFG, chanter, bytewise.encode("!"), **options))
    assert got == whole(generate(CFG, chanter, [bytewise.encode("!")], **options)[0])
    assert got[1] == (TEXT * 2)[: min((TEXT * 2).index(s) for s in ([stop] if isinstance(stop, str) else stop[1:]))]
    assert got[3] == "stop"


def test_an_unfinished_stop_string_is_shown_at_the_end(chanter, bytewise):
    options = {"sampling": GREEDY, "max_new_tokens": 7, "tokenizer": bytewise, "stop": "é€!!"}
    pieces = list(stream(CFG, chanter, bytewise.encode("!"), **options))
    assert [piece.text for piece in pieces] == ["n", "é€!"]
    assert pieces[-1].finish_reason == "length"


def test_drawn_text_with_stops_is_that_of_generate(letters, bytewise):
    rng = np.random.default_rng(1)
    reasons = set()
    for seed in range(25):
        stop = tuple("".join(rng.choice(list("abcde"), n)) for n in (2, 3, 4))
        start = bytewise.encode("abcde"[seed % 5])
        options = {"sampling": Sampling(seed=seed), "max_new_tokens": 14, "tokenizer": bytewise, "stop": stop}
        pieces = list(stream(CFG, letters, start, **options))
        assert together(pieces) == whole(generate(CFG, letters, [start], **options)[0])
        assert not any(s in together(pieces)[1] for s in stop)
        reasons.add(pieces[-1].finish_reason)
    assert reasons == {"stop", "length"}


def test_stop_ids_errors_and_no_tokenizer(letters, bytewise):
    start, c = bytewise.encode("a"), bytewise.encode("c")[0]
    bare = list(stream(CFG, letters, start, sampling=Sampling(seed=4), max_new_tokens=14))
    assert [len(piece.tokens) for piece in bare] == [1] * 14 + [0]
    assert {piece.top_log_probs for piece in bare} == {None}
    (answer,) = generate(CFG, letters, [start], sampling=Sampling(seed=4), max_new_tokens=14)
    assert together(bare) == (answer.tokens, "", answer.log_probs, "length")
    assert answer.top_log_probs is None
    assert c in answer.tokens[1:]

    options = {"sampling": Sampling(seed=4), "max_new_tokens": 14, "tokenizer": bytewise}
    got = together(stream(CFG, letters, start, stop_ids=(c,), **options))
    assert got == whole(generate(CFG, letters, [start], stop_ids=(c,), **options)[0])
    assert (got[0][-1], got[3]) == (c, "stop")
    assert "c" not in got[1]

    spoilt = {"bigram": {"table": letters["bigram"]["table"].at[c].set(jnp.nan)}}
    got = together(stream(CFG, spoilt, start, **options))
    assert (got[0][-1], got[3]) == (c, "error")


@pytest.mark.slow
def test_a_sliding_transformer_streams_with_the_programs_of_generate(random_params, compiled):
    cfg = ModelConfig(vocab_size=26, n_layers=1, d_model=16, n_heads=2, max_seq_len=16)
    params, tokenizer = random_params(cfg), tokenizers.char("abcdefghijklmnopqrstuvwxyz")
    options = {"sampling": Sampling(typical_p=0.8), "key": jax.random.key(3), "tokenizer": tokenizer}
    options |= {"max_new_tokens": 30, "overflow": "slide", "top_log_probs": 2}
    (answer,) = generate(cfg, params, [[1, 2, 3]], **options)
    before = compiled.count("prefill"), compiled.count("decode")
    pieces = list(stream(cfg, params, [1, 2, 3], **options))
    assert together(pieces) == whole(answer)
    assert [list(top) for piece in pieces for top in piece.top_log_probs] == answer.top_log_probs
    assert len(answer.top_log_probs[0]) == 2
    assert (compiled.count("prefill"), compiled.count("decode")) == before


def test_bad_input_is_reported_at_the_call(bytewise):
    for change, message in (
        ({"prompt": []}, "prompt 0: is empty"),
        ({"prompt": [257]}, "prompt 0: id 257 is outside"),
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": "x", "tokenizer": None}, "need a tokenizer"),
        ({"max_new_tokens": CFG.max_seq_len}, "exceed the model's context"),
        ({"top_log_probs": 258}, "top_log_probs: must be between 0 and 257"),
    ):
        options = {"prompt": [0], "max_new_tokens": 3, "tokenizer": bytewise, **change}
        with pytest.raises(InputError, match=message):
            stream(CFG, {}, options.pop("prompt"), **options)
