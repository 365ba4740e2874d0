"""`generate`: prompts in, texts out, requests in batches."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxlm.config import ModelConfig
from jaxlm.model import Params
from jaxlm.sample import answers, arguments, drive
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.answers import Generation
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Overflow

MAX_SLOTS = 64


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int | Sequence[int],
    n: int = 1,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    key: jax.Array | int | None = None,
    tokenizer: Decodes | None = None,
    slots: int | None = None,
    overflow: Overflow = "refuse",
    top_log_probs: int = 0,
) -> list[Generation]:
    """Continues prompts.

    Requests are decoded `slots` at a time. A request's prompt is padded to a power of two T >= 16 and its cache to T
    plus a power of two for the new tokens, both to the context at most, whatever its neighbours are, and only requests
    of one T share a batch. So at a fixed `slots` a request gets the same tokens alone, in any slot, with any
    neighbours; at another `slots` the last bits of its logits may differ, and with them, rarely, a token.

    Compilations: one prefill and one decoding loop for each pair of T and new-token bucket that occurs, per `slots`:
    at most log2(max_seq_len / 16) + 2 values of T. No option's value compiles anything; more than 16 stop ids, or
    biased and banned ids of one request, do, by powers of two, and so does each `top_log_probs`. Requests that slide
    compile their own, and one prefill of the window.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`, which is otherwise done on every call.
        prompts: token ids, any lengths from 1.
        sampling: options for all prompts, or one for each.
        max_new_tokens: for all prompts, or one for each; at least 1.
        n: samples of each prompt. Each is a row of its own, with its own prefill (which costs nothing where rows of the
            batch would stand empty otherwise).
        stop_ids: ids that end an answer.
        stop: strings that end an answer, found across token boundaries; they need a tokenizer.
        key: typed PRNG key, or the seed of one; by default `jax.random.key(0)`. Prompt i draws its token at position p
            with fold_in(fold_in(key, i), p), or with fold_in(key(seed), p) where `Sampling.seed` is set; positions
            count from the prompt's first token. Sample j of a prompt folds 2**32 - j into that key first, but for
            j = 0: more samples change none of those before.
        tokenizer: decodes the answers; ids from its vocab_size on are padding of the model's vocabulary and never
            produced.
        slots: rows decoded together; by default a power of two, at most 64, that holds all samples.
        overflow: what to do when prompt and new tokens together exceed C = cfg.max_seq_len, the last new one counted
            although the model never sees it. `refuse`: an error. `crop`: drop the prompt's first tokens. `slide`: see
            as many of the last tokens as fit; whenever they would be more than C, go on with the last C // 2, at
            positions from 0. A prompt of more than C tokens is cut to C // 2 at once, for the penalties too; they see
            all of the answer.
        top_log_probs: most likely tokens to report at each new one.

    Returns:
        One Generation a sample: n of the first prompt, n of the second, and so on.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a request longer than the context, lists whose
            lengths differ, a stop string without a tokenizer or an empty one, a number out of range, an argument of
            another type.
    """
    requests = asking.check(cfg, prompts, sampling, max_new_tokens, overflow, n)
    arguments.check_tokenizer(tokenizer)
    stops, stop_ids = arguments.check_ends(cfg, stop, stop_ids, tokenizer)
    slots = arguments.check_slots(slots, len(requests), MAX_SLOTS)
    arguments.check_count("top_log_probs", top_log_probs, 0, cfg.vocab_size)
    key, n_vocab = arguments.check_key(key), arguments.real_vocab(cfg, tokenizer)
    dparams = decoding.prepare(cfg, params)
    running = []
    for group in asking.groups(cfg, requests, slots):
        asked, state = drive.start(
            cfg, dparams, group, slots=slots, key=key, stop_ids=stop_ids, n_vocab=n_vocab, n_top=top_log_probs
        )
        state = drive.finish(cfg, dparams, asked, state, slides=group[0].slides, stops=stops, tokenizer=tokenizer)
        running.append((group, answers.arrays(state)))  # not the cache
        if len(running) > 1:  # keep the device busy, but hold no more than two caches
            jax.block_until_ready(running[-2][1])

    out: dict[tuple[int, int], Generation] = {}
    for group, rows in running:  # after all have been dispatched
        out |= answers.read_group(group, rows, stops, stop_ids, tokenizer)
    return [out[place] for place in sorted(out)]
