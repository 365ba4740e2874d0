"""What cannot be meant is one sentence, from every function that decodes, before anything is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import loading
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.loading import load_model
from jaxlm.sample import (
    Request,
    Sampling,
    beam_search,
    beam_searches,
    engine,
    filter_logits,
    generate,
    prepare,
    sample_token,
    serve,
    speculate,
    stream,
)  # fmt: skip
from jaxlm.sample.arguments import (
    check_ends,
    check_key,
    check_lengths,
    check_prompts,
    check_sampling,
    check_stops,
    real_vocab,
)  # fmt: skip

V = 9
CFG = ModelConfig(kind="bigram", vocab_size=V, max_seq_len=32)
PADDED = CFG.replace(vocab_size=V + 7)
PARAMS = {"bigram": {"table": jnp.zeros((V, V))}}
MANY = {"generate": generate, "speculate": speculate, "beam_searches": beam_searches}


class Letters:
    vocab_size = V

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch):
    """An argument that passes would come here."""

    def reached(*_, **__):
        raise AssertionError("the argument was taken")

    for place in ("drive.start", "decode.prefill", "engine._empty", "engine._insert", "beam._search"):
        monkeypatch.setattr(f"jaxlm.sample.{place}", reached)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompts": "text"},
            "prompts: expected a list of prompts, found text; give prompts=[tokenizer.encode(text)].",
        ),
        ({"prompts": ["text"]}, "prompt 0: expected token ids, found text; encode it with the tokenizer first."),
        (
            {"prompts": [1, 2]},
            "prompts: expected a list of prompts, each a list of token ids, found one list of ids ([1, 2]); put it "
            "into a list, as in prompts=[ids].",
        ),
        ({"prompts": 5}, "prompts: expected a list of prompts, each a list of token ids, found 5."),
        ({"prompts": None}, "prompts: expected a list of prompts, each a list of token ids, found None."),
        ({"prompts": {"a": [1]}}, "prompts: expected a list of prompts, each a list of token ids, found a dict."),
        ({"prompts": [[1, 2.5]]}, "prompt 0: expected a list of token ids, found 2.5 among them."),
        ({"prompts": [[1], None]}, "prompt 1: expected a list of token ids, found None."),
        ({"prompts": [[[1]]]}, "prompt 0: expected a list of token ids, found [1] among them."),
        ({"prompts": np.array([[1.0, 2.0]])}, "prompt 0: expected a list of token ids, found 1.0 among them."),
        ({"max_new_tokens": -1}, "max_new_tokens: must be at least 1, found -1."),
        ({"max_new_tokens": 2.0}, "max_new_tokens: must be an integer, found 2.0."),
        ({"max_new_tokens": "10"}, "max_new_tokens: must be an integer, found '10'."),
        ({"max_new_tokens": None}, "max_new_tokens: must be an integer, found None."),
        ({"max_new_tokens": True}, "max_new_tokens: must be an integer, found True."),
        ({"stop_ids": 5}, "stop_ids: expected a list of token ids, found 5; one id is stop_ids=(5,)."),
        ({"stop_ids": None}, "stop_ids: expected a list of token ids, found None; one id is stop_ids=(5,)."),
        ({"stop_ids": "ab"}, "stop_ids: expected a list of token ids, found 'ab'; one id is stop_ids=(5,)."),
        ({"stop_ids": [2.5]}, "stop_ids: expected token ids, found 2.5 among them."),
        (
            {"tokenizer": "gpt2"},
            "tokenizer: expected one as jaxlm.tokenizers.load(name) gives, found 'gpt2', which has no vocab_size.",
        ),
        ({"slots": "2"}, "slots: must be an integer, found '2'."),
        ({"cfg": "gpt2"}, "cfg: expected a ModelConfig, such as jaxlm.preset('nano'), found 'gpt2'."),
        ({"params": None}, "params: expected the model's weights, as jaxlm.init gives them, found None."),
        (
            {"params": {}},
            "params: expected the model's weights, as jaxlm.init gives them, found a dict without 'bigram'.",
        ),
        (
            {"params": (CFG, PARAMS)},
            "params: expected the model's weights, as jaxlm.init gives them, found (ModelConfig(",
        ),
    ],
)
def test_one_sentence(name, change, message):
    given = {"cfg": CFG, "params": PARAMS, "prompts": [[1]], "max_new_tokens": 4} | change
    more = {"n_beams": 2} if name == "beam_searches" else {}
    with pytest.raises(InputError) as error:
        MANY[name](given.pop("cfg"), given.pop("params"), given.pop("prompts"), **given, **more)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sampling": {"top_k": 3}},
            "sampling: expected jaxlm.Sampling or a list of them, found a dict; write Sampling(",
        ),
        ({"sampling": 0.7}, "sampling: expected jaxlm.Sampling or a list of them, found 0.7."),
        ({"sampling": [{"top_k": 3}]}, "sampling 0: expected jaxlm.Sampling, found a dict."),
        ({"stop": 5, "tokenizer": Letters()}, "stop: expected text or a list of texts, found 5."),
        ({"stop": None}, "stop: expected text or a list of texts, found None."),
        (
            {"stop": [5], "tokenizer": Letters()},
            "stop: expected texts, found 5 among them; token ids go into stop_ids.",
        ),
        ({"key": "a"}, "key: expected one typed key (jax.random.key) or a seed, found 'a'."),
        ({"key": 0.5}, "key: expected one typed key (jax.random.key) or a seed, found 0.5."),
        ({"key": -1}, "key: must be between 0 and 4294967295, found -1."),
        ({"key": jax.random.key_data(jax.random.key(0))}, "key: expected one typed key (jax.random.key) or a seed, "),
        ({"key": jax.random.split(jax.random.key(0))}, "key: expected one typed key (jax.random.key) or a seed, "),
        ({"top_log_probs": 1.5}, "top_log_probs: must be an integer, found 1.5."),
    ],
)
def test_one_sentence_about_how_to_sample(change, message):
    for decodes in (generate, speculate, stream):
        prompt = [1] if decodes is stream else [[1]]
        tokenizer = None if decodes is stream and "tokenizer" in change else change.get("tokenizer")
        if tokenizer is None and "tokenizer" in change:
            continue  # a stream needs more of a tokenizer
        with pytest.raises(InputError) as error:
            decodes(CFG, PARAMS, prompt, max_new_tokens=4, **change)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream(CFG, PARAMS, [1], max_new_tokens=4, tokenizer=Letters()), "tokenizer: .* which has no pieces"),
        (lambda: stream(CFG, None, [1], max_new_tokens=4), "params: expected the model's weights"),
        (lambda: beam_search(CFG, PARAMS, [1], n_beams=2, max_new_tokens=[4]), r"max_new_tokens: .* found \[4\]"),
        (lambda: beam_search(CFG, PARAMS, "text", n_beams=2, max_new_tokens=4), "prompt 0: .* found text"),
        (
            lambda: beam_search(CFG, PARAMS, [1], n_beams=2, max_new_tokens=4, length_penalty="1"),
            "length_penalty: must be a finite number, found '1'",
        ),
        (
            lambda: speculate(CFG, PARAMS, [[1]], max_new_tokens=4, draft=CFG),
            "draft: expected a pair|draft: expected the",
        ),
        (
            lambda: speculate(CFG, PARAMS, [[1]], max_new_tokens=4, draft=("nano", PARAMS)),
            r"draft\[0\]: expected a Model",
        ),
        (lambda: serve(CFG, PARAMS, Request([1], 4), slots=2), "requests: expected a list or an iterator .* a Request"),
        (
            lambda: serve(CFG, PARAMS, [[1]], slots=2),
            r"requests: expected jaxlm.sample.Request, found \[1\] among them",
        ),
        (lambda: serve(CFG, PARAMS, [Request([1], 4)], slots=2.0), r"slots: must be an integer, found 2\.0"),
        (lambda: serve(CFG, PARAMS, [Request([1], 4)], slots=2, capacity="a"), "capacity: must be an integer"),
        (lambda: serve(CFG, PARAMS, [Request([1], 4, {"top_k": 3})], slots=2), "sampling 0: expected jaxlm.Sampling"),
        (lambda: serve(CFG, PARAMS, [Request([1], 4, stop_ids=5)], slots=2), "stop_ids: expected a list"),
        (
            lambda: serve(PADDED, PARAMS, [Request([1], 4, stop_ids=(V,))], slots=2, tokenizer=Letters()),
            f"stop_ids: {V} is never produced",
        ),
        (lambda: engine.init("nano", PARAMS, slots=2, capacity=16, n_new=8), "cfg: expected a ModelConfig"),
        (lambda: engine.init(CFG, PARAMS, slots=2, capacity=16, n_new=8, key="a"), "key: expected one typed key"),
        (lambda: prepare(CFG, [1]), "params: expected the model's weights"),
        (lambda: Sampling(banned_ids=5), "sampling.banned_ids: expected a list of token ids, found 5"),
        (lambda: Sampling(logit_bias=5), "sampling.logit_bias: expected numbers by id"),
        (lambda: Sampling(logit_bias=[1, 2]), "sampling.logit_bias: expected numbers by id"),
        (
            lambda: filter_logits(np.zeros((2, V)), top_k="many"),
            r"top_k: must be a number or \(2,\) of them, found 'many'",
        ),
        (
            lambda: filter_logits(np.zeros((2, V)), top_k=2**31),
            r"top_k: must be a number or \(2,\) of them that int32 can hold, found 2147483648",
        ),
        (lambda: filter_logits(np.zeros((2, V)), top_p=np.ones(3)), r"top_p: .* found shape \(3,\)"),
        (lambda: sample_token(0, np.zeros((2, V))), r"keys: expected typed keys of shape \(2,\) .* found 0"),
        (lambda: load_model(None), "name: expected a name or a path, found None"),
        (lambda: load_model(""), "name: is empty"),
        (lambda: load_model("x.gguf", tokenizer="gpt2"), "tokenizer: expected one as"),
    ],
)
def test_one_sentence_of_each_its_own(call, message):
    with pytest.raises(InputError, match=f"^({message})"):
        call()


@pytest.mark.parametrize("name", MANY)
def test_a_stop_id_that_the_tokenizer_lacks_is_refused(name):
    """The model's vocabulary is padded, and what is beyond the tokenizer's is never produced."""
    given = {"max_new_tokens": 4, "stop_ids": (1, V)} | ({"n_beams": 2} if name == "beam_searches" else {})
    with pytest.raises(InputError, match=f"^stop_ids: {V} is never produced, for ids from {V} on"):
        MANY[name](PADDED, PARAMS, [[1]], tokenizer=Letters(), **given)
    assert check_ends(PADDED, (), (1, V), None) == ((), (1, V))


def test_a_loaded_model_ends_at_ids_that_can_be_produced():
    """Files may name more, and what one gets with a model must not be refused."""

    class Named(Letters):
        stop_ids, eot_id = (1, V, V + 9), 2

    assert loading._stop_ids(Named(), PADDED) == (1, 2)


def test_added_tokens_are_part_of_a_tokenizer():
    """transformers counts them in its length only."""

    class Added(Letters):
        def __len__(self):
            return V + 2

    assert real_vocab(PADDED, Letters()) == V
    assert real_vocab(PADDED, Added()) == V + 2
    assert real_vocab(CFG, Added()) == V
    assert check_ends(PADDED, (), (V + 1,), Added()) == ((), (V + 1,))


def test_what_may_be_given_in_more_than_one_way():
    assert check_key(7) == check_key(np.int64(7)) == jax.random.key(7)
    assert check_key(None) == jax.random.key(0)
    for prompts in ([[1, 2]], ((1, 2),), np.array([[1, 2]]), [np.array([1, 2])], jnp.array([[1, 2]]), iter([[1, 2]])):
        assert check_prompts(CFG, prompts) == [[1, 2]]
    assert check_prompts(CFG, []) == []
    assert check_lengths(np.int32(3), 2) == check_lengths(np.array([3, 3]), 2) == [3, 3]
    assert check_sampling((Sampling(), Sampling(top_k=1)), 2)[1].top_k == 1
    assert check_stops("ab", Letters()) == check_stops(["ab"], Letters()) == ("ab",)
