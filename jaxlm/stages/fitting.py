"""What pretraining and fine-tuning share: start or resume, train, report, stop on a signal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxlm import model, parallel, tokenizers, train
from jaxlm.checkpoint import Checkpointer, restore
from jaxlm.config import EvalConfig, ModelConfig, TrainConfig
from jaxlm.data import RowSet
from jaxlm.errors import InputError
from jaxlm.evaluate.perplexity import split_loss
from jaxlm.metrics_log import MetricsLog, Unwritten
from jaxlm.stages import provenance, saved
from jaxlm.stages.runner import say
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.stopping import end_hung, stop_requested
from jaxlm.tokenizers import Tokenizer
from jaxlm.train import loop
from jaxlm.train.stopping import Stop, nothing_to_save

Start = Callable[[TrainConfig], train.TrainState]


def fit_stage(
    spec: Spec,
    cfg: TrainConfig,
    *,
    seed: int,
    tokenizer: Tokenizer,
    rows: RowSet,
    val_rows: RowSet,
    start: Start,
    prompt: str,
) -> dict[str, Any]:
    """Trains in `spec.directory`, from its newest good checkpoint where there is one.

    Args:
        spec: the stage.
        cfg: options and model, its vocabulary the tokenizer's.
        seed: of data order and dropout.
        tokenizer: saved beside the checkpoints, and used for samples.
        rows, val_rows: the splits.
        start: makes the state before the first step.
        prompt: what the samples during training continue.

    Returns:
        The stage's results: `steps`, `tokens`, `train_loss`, `val_loss`, `parameters`, `tokens_per_s`, `devices`,
        `notes`.

    Raises:
        InputError: the rows were made by another tokenizer, or the checkpoints are of another configuration.
        DivergedError, Preempted: as `jaxlm.train.fit` says.
    """
    for split in (rows, val_rows):
        if split.tokenizer_fingerprint != tokenizer.fingerprint:
            raise InputError(f"{spec.name}: its rows were made by another tokenizer; delete the store and run again.")
    directory = spec.directory
    layout = parallel.layout_for(cfg.batch_size // cfg.grad_accum_steps)
    first = parallel.is_first()  # of the processes that train together, the one that writes
    if first:
        saved.write_description(directory, cfg.model, tokenizer)
    evaluation = spec.section("eval", EvalConfig)
    meta = {"spec": spec.id, "tokenizer": tokenizer.fingerprint, "model": cfg.model.identity()}

    if first:
        provenance.add(directory, devices=provenance.devices(), layout=provenance.layout(layout.mesh))
    hung = end_hung(directory)

    with ExitStack() as stack:
        alone = jax.process_count() == 1
        stop = stack.enter_context(stop_requested(directory)) if alone else Stop(parallel.asked_together())
        stop.leave_with(nothing_to_save)  # reading or making a large state may take minutes
        checkpointer = stack.enter_context(
            Checkpointer(directory / saved.CHECKPOINTS, keep_latest=cfg.keep_checkpoints)
        )
        state, before, notes = _start_or_resume(cfg, layout, directory, meta, lambda: start(cfg))
        resumed = int(state.step) or None
        log = stack.enter_context(MetricsLog(directory, resume_step=resumed) if first else Unwritten(directory))
        bar = stack.enter_context(_progress_bar(spec.stage, cfg.steps))
        for note in notes:
            say(note)
        if resumed:
            say(f"{spec.stage}: continuing after step {resumed} of {cfg.steps}")

        def place(batch: dict[str, Any]) -> Any:
            stop.check()
            return layout.put_batch(batch)

        def evaluate(params: model.Params) -> float:
            return split_loss(
                cfg.model, params, val_rows, _divisible(evaluation.batch_size, layout.devices),
                max_rows=cfg.eval_rows, chunk=cfg.loss_chunk, place=place,
            ).loss  # fmt: skip

        hooks = loop.Hooks(
            log=log,
            checkpointer=checkpointer,
            meta=meta,
            evaluate=evaluate,
            sample=_sampler(cfg, tokenizer, prompt, seed) if cfg.sample_tokens and first else None,
            stop=stop,
            hung=hung,
            progress=bar,
        )
        loss = before.get("train_loss")
        fitted = loop.fit(
            cfg, state, rows, layout, hooks, tokens=int(before.get("tokens", 0)),
            train_loss=math.nan if loss is None else float(loss), losses=before.get("losses", ()),
        )  # fmt: skip
    return {
        "steps": int(fitted.state.step),
        "tokens": fitted.tokens,
        "train_loss": fitted.train_loss if math.isfinite(fitted.train_loss) else None,
        "val_loss": fitted.val_loss,
        "parameters": model.count(fitted.state.params),
        "tokens_per_s": round(fitted.tokens_per_s, 1),
        "skipped": int(fitted.state.skipped),
        "devices": layout.devices,
        "notes": notes,
    }


def open_rows(manifest: Manifest, name: str, *, seq_len: int | None = None, drop_tail: bool = False) -> RowSet:
    """A split of a tokenize stage.

    Args:
        manifest: of the stage.
        name: train or val.
        seq_len: T, for a stream, whose rows are cut when they are read.
        drop_tail: leave out the last, ragged row of a stream, so that batches need no mask.

    Raises:
        InputError: the split is shorter than one window.
    """
    index = dict(manifest.results["indexes"][name])
    if index["layout"] == "stream" and seq_len is not None:
        index["seq_len"] = seq_len
        if drop_tail and index["count"] < seq_len + 1:
            raise InputError(
                f"{name}: found {index['count']} tokens, {seq_len + 1} needed for one window of "
                f"data.seq_len={seq_len}; use a longer text or a smaller data.seq_len."
            )
    return RowSet(manifest.directory, index, drop_tail=drop_tail)


def tokenizer_of(inputs: Mapping[str, Manifest]) -> Tokenizer:
    """The tokenizer of a stage's tokenize input."""
    return tokenizers.load(inputs["tokenize"].directory)


def _start_or_resume(
    cfg: TrainConfig, layout: parallel.Layout, directory: Path, meta: dict[str, Any], start: Callable[[], Any]
) -> tuple[train.TrainState, dict[str, Any], list[str]]:
    """The state to go on from, what the loop stored beside it (nothing at the start), and notes on damage."""
    abstract = jax.eval_shape(lambda: train.init_state(cfg, 0))
    shardings = layout.of_state(abstract)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    found = restore(directory / saved.CHECKPOINTS, loop.items(abstract), expect=meta)
    if found is None:
        return layout.put_state(start()), {}, []
    notes = [f"damaged checkpoint passed over: {damage}" for damage in found.damaged]
    return loop.from_items(found.items), found.meta, notes


def _divisible(rows: int, devices: int) -> int:
    return -(-rows // devices) * devices


def _sampler(cfg: TrainConfig, tokenizer: Tokenizer, prompt: str, seed: int) -> Callable[[model.Params], str]:
    """Continues `prompt`, always with the same randomness: what changes between samples is the model."""
    from jaxlm.sample import Sampling, generate

    start = [tokenizer.eot_id] if tokenizer.eot_id is not None else []
    ids = start + tokenizer.encode(prompt) or [0]
    room = cfg.model.max_seq_len - len(ids)
    stop_ids = (tokenizer.eot_id,) if tokenizer.eot_id is not None else ()

    def sample(params: model.Params) -> str:
        local = jax.device_put(jax.tree.map(lambda whole: whole.addressable_data(0), params), jax.local_devices()[0])
        out = generate(
            cfg.model, local, [ids], sampling=Sampling(temperature=0.8, top_p=0.95), stop_ids=stop_ids,
            max_new_tokens=min(cfg.sample_tokens, room), key=jax.random.key(seed),
        )  # fmt: skip
        return tokenizer.decode(tokenizer.encode(prompt) + [t for t in out[0].tokens if t not in stop_ids])

    return sample


@contextmanager
def _progress_bar(label: str, steps: int) -> Iterator[loop.Progress]:
    """A bar with loss, speed and time left; a line now and then where there is no terminal."""
    if not sys.stdout.isatty():
        yield _Lines(label, steps)
        return
    columns = (
        TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(), transient=True) as bar:
        task = bar.add_task(label, total=steps, loss=float("nan"), rate=0.0)

        def update(step: int, *, loss: float, tokens_per_s: float) -> None:
            bar.update(task, completed=step, loss=loss, rate=tokens_per_s)

        yield update


class _Lines:
    """Prints a line at every tenth of the way."""

    def __init__(self, label: str, steps: int) -> None:
        self._label, self._steps, self._every = label, steps, max(1, steps // 10)

    def __call__(self, step: int, *, loss: float, tokens_per_s: float) -> None:
        if step % self._every == 0 or step == self._steps:
            say(f"{self._label}: step {step}/{self._steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s")


def resolved_model(cfg: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configured model with the tokenizer's vocabulary."""
    return cfg.replace(vocab_size=tokenizer.vocab_size)
