"""Stage 6: figures, samples and the report of a run.

Results: the figures of report.json, without its texts. Files: report.json, report.md with `report-files/`, report.html.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from jaxlm import evaluate, metrics_log, model, parallel
from jaxlm.config import EvalConfig, SftConfig
from jaxlm.data import encode_prompt, storyworld
from jaxlm.data.storyworld import ngram
from jaxlm.errors import InputError
from jaxlm.evaluate.perplexity import SplitLoss, bits_per_byte, perplexity, split_loss
from jaxlm.evaluate.report import Example, ReportData, Sample, to_json, write_report
from jaxlm.sample import Sampling, generate, prepare
from jaxlm.stages import process, provenance, saved
from jaxlm.stages.download import read_split
from jaxlm.stages.fitting import open_rows
from jaxlm.stages.runner import say
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.tokenizers import Tokenizer

N_KNOWN = 600  # training questions that the "most frequent" baseline learns from
N_EXAMPLES = 8  # questions shown in the report
_ORDER = 5


@dataclass(frozen=True)
class _Run:
    spec: Spec
    inputs: Mapping[str, Manifest]
    source: str
    world: str  # empty for a text of the user's
    eval: EvalConfig
    sft: SftConfig
    seed: int


def run(spec: Spec, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Measures the base model on the validation split, and both models on the held-out questions."""
    parallel.use_all_cores()
    clock = time.perf_counter()
    given = spec.settings["data"]
    job = _Run(
        spec, inputs, given["source"], given.get("world", ""), spec.section("eval", EvalConfig), _sft_of(spec),
        int(spec.settings["seed"]),
    )  # fmt: skip
    base = saved.load(inputs["pretrain"].directory)
    say("evaluate: loss on the whole validation split")
    loss = _validation_loss(job, base)
    data: ReportData = {
        "name": str(spec.settings.get("name", spec.name)),
        "val_loss": loss.loss,
        "perplexity": perplexity(loss.loss),
        "bits_per_byte": bits_per_byte(loss.nats, inputs["download"].results["splits"]["val"]["bytes"]),
        "history": metrics_log.history(inputs["pretrain"].directory),
        "seconds": {name: inputs[name].seconds for name in inputs},
        "model": {"parameters": model.count(base.params), "shape": _shape(base)},
        "data": _data_info(job, loss),
        "config": {name: dict(manifest.spec.settings) for name, manifest in inputs.items()},
        "environment": _environment(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": base.notes + _notes(inputs),
    }
    if job.source == "storyworld":
        say(f"evaluate: floor, and an order-{_ORDER} model beside it")
        data["floor"] = -inputs["download"].results["splits"]["val"]["log_prob"] / loss.tokens
        data["order5_loss"] = _order5(job, base)
    if job.eval.n_samples:
        say("evaluate: samples")
        data["samples"] = _samples(job, base)
    if "sft" in inputs:
        say("evaluate: questions before and after fine-tuning")
        data["sft_history"] = metrics_log.history(inputs["sft"].directory)
        answered = _questions(job, base, saved.load(inputs["sft"].directory))
        if answered.pop("n_questions") < job.eval.n_questions:
            data["notes"] = [
                *data["notes"],
                f"fewer than eval.n_questions={job.eval.n_questions} questions are held out",
            ]
        data |= answered  # type: ignore[typeddict-item]
    # But for the drawing of the report that says it.
    data["seconds"] = {**data["seconds"], "evaluate": time.perf_counter() - clock}
    write_report(data, spec.directory)
    return {
        key: value for key, value in to_json(data).items()
        if key not in ("history", "sft_history", "samples", "examples", "config", "environment")
    }  # fmt: skip


def _sft_of(spec: Spec) -> SftConfig:
    section = {key: value for key, value in spec.settings["sft"].items() if key in ("enabled", "template")}
    return SftConfig(**section)


def _validation_loss(job: _Run, base: saved.Saved) -> SplitLoss:
    layout = parallel.layout_for(job.eval.batch_size)
    rows = open_rows(job.inputs["tokenize"], "val", seq_len=_seq_len(job))
    params = jax.device_put(base.params, layout.whole)
    return split_loss(base.cfg, params, rows, job.eval.batch_size, place=layout.put_batch)


def _seq_len(job: _Run) -> int:
    return int(job.inputs["pretrain"].spec.settings["data"]["seq_len"])


def _order5(job: _Run, base: saved.Saved) -> float:
    """Loss of an n-gram model on the same validation targets, nats per token."""
    eot = base.tokenizer.eot_id
    assert eot is not None  # a story world's tokenizer has one
    train, val = (
        [[*base.tokenizer.encode(text), eot] for text in read_split(job.inputs["download"], name)]
        for name in ("train", "val")
    )
    fitted = ngram.fit(train, _ORDER, vocab_size=base.tokenizer.vocab_size)
    return fitted.nats(val) / sum(map(len, val))


def _samples(job: _Run, base: saved.Saved) -> list[Sample]:
    tokenizer, cfg = base.tokenizer, base.cfg
    eot = tokenizer.eot_id
    start = [eot] if eot is not None else _line_end(tokenizer)
    options = Sampling(temperature=job.eval.temperature, top_p=job.eval.top_p)
    length = min(job.eval.sample_tokens, cfg.max_seq_len - len(start))
    outs = generate(
        cfg, prepare(cfg, base.params), [start] * job.eval.n_samples, sampling=options, max_new_tokens=length,
        stop_ids=() if eot is None else (eot,), key=jax.random.key(job.seed),
    )  # fmt: skip
    label = f"base model, temperature {options.temperature:g}, top-p {options.top_p:g}"
    return [{"prompt": "", "text": tokenizer.decode([t for t in o.tokens if t != eot]), "label": label} for o in outs]


def _line_end(tokenizer: Tokenizer) -> list[int]:
    """What a sample starts from where no token ends a text: a line end, or the first token if there is none."""
    try:
        return tokenizer.encode("\n")[:1] or [0]
    except InputError:  # a character outside the alphabet
        return [0]


def _questions(job: _Run, base: saved.Saved, tuned: saved.Saved) -> dict[str, Any]:
    with open(job.inputs["tokenize_sft"].path("test.jsonl"), encoding="utf-8") as file:
        asked = [json.loads(line) for line in islice(file, job.eval.n_questions)]
    if not asked:
        raise InputError(
            f"{job.inputs['tokenize_sft'].directory}: test.jsonl holds no question; delete it and run again."
        )
    answers = [_answers(job, each, [q["prompt"] for q in asked]) for each in (base, tuned)]
    right = [evaluate.exact_match(given, [q["answer"] for q in asked]) for given in answers]
    types = [q["type"] for q in asked]
    baselines = None
    if job.source == "storyworld" and "story" in asked[0]:
        known = storyworld.questions(storyworld.WORLDS[job.world], job.seed, "train", N_KNOWN)
        baselines = storyworld.baselines(known, [storyworld.Question(**q) for q in asked])
    examples: list[Example] = [
        {"type": q["type"], "prompt": q["prompt"], "expected": q["answer"], "before": before, "after": after}
        for q, before, after in zip(asked[:N_EXAMPLES], *(given[:N_EXAMPLES] for given in answers), strict=True)
    ]
    return {
        "accuracy_before": evaluate.fraction_right(right[0]),
        "accuracy_after": evaluate.fraction_right(right[1]),
        "accuracy_by_type": evaluate.by_type(types, before=right[0], after=right[1], baselines=baselines),
        "examples": examples,
        "n_questions": len(asked),
    }


def _answers(job: _Run, asked: saved.Saved, prompts: Sequence[str]) -> list[str]:
    """What a model answers, greedily; its answer ends with the end-of-text token or at eval.max_new_tokens."""
    tokenizer, cfg = asked.tokenizer, asked.cfg
    eot = tokenizer.eot_id
    assert eot is not None  # fine-tuning needs one
    ids = [[eot, *encode_prompt(tokenizer, prompt, job.sft.template)] for prompt in prompts]
    outs = generate(
        cfg, prepare(cfg, asked.params), ids, sampling=Sampling(temperature=0.0),
        max_new_tokens=job.eval.max_new_tokens, stop_ids=(eot,),
    )  # fmt: skip
    # An answer that never ends is not an answer: its mark is that no end-of-text token closes it.
    ended = [out.finish_reason == "stop" for out in outs]
    texts = [tokenizer.decode([t for t in out.tokens if t != eot]) for out in outs]
    return [text if done else f"{text} …" for text, done in zip(texts, ended, strict=True)]


def _shape(found: saved.Saved) -> str:
    cfg = found.cfg
    if cfg.kind == "bigram":
        return f"bigram table, V = {cfg.vocab_size}"
    return f"{cfg.n_layers} layers, D = {cfg.d_model}, {cfg.n_heads} heads, V = {cfg.vocab_size}"


def _data_info(job: _Run, loss: SplitLoss) -> Any:
    splits, tokens = job.inputs["download"].results["splits"], job.inputs["tokenize"].results
    tokenizer = job.inputs["tokenize"].spec.settings["tokenizer"]
    world = f" ({job.world} world)" if job.source == "storyworld" else ""
    return {
        "source": job.source + world,
        "chars": splits["train"]["characters"],
        "tokens": tokens["tokens"]["train"],
        "stories": splits["train"]["documents"],
        "val_tokens": loss.tokens,
        "val_bytes": splits["val"]["bytes"],
        "vocab_size": tokens["vocab_size"],
        "tokenizer": tokenizer.get("name") or tokenizer["kind"],
    }


def _environment() -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in provenance.environment().items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": item for key, item in value.items() if not isinstance(item, (dict, list))}
        elif not isinstance(value, (list, Path)):
            flat[name] = value
    return flat


def _notes(inputs: Mapping[str, Manifest]) -> list[str]:
    return [note for name in ("pretrain", "sft") if name in inputs for note in inputs[name].results.get("notes", [])]


if __name__ == "__main__":
    process.main(run)
