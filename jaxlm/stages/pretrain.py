"""Stage 4: the parameters of the base model, from scratch or from earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm import parallel, train
from jaxlm.checkpoint import restore, restore_step_dir
from jaxlm.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig, TrainOptions
from jaxlm.errors import InputError
from jaxlm.stages import process, saved
from jaxlm.stages.fitting import fit_stage, open_rows, resolved_model, tokenizer_of
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.tokenizers import Tokenizer
from jaxlm.train import loop


def run(spec: Spec, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Trains on the rows of the tokenize stage."""
    parallel.connect()
    parallel.use_all_cores()
    tokenizer = tokenizer_of(inputs)
    options = spec.section("train", TrainOptions)
    model = resolved_model(spec.section("model", ModelConfig), tokenizer)
    cfg = TrainConfig(model=model, **options.model_dump())
    seq_len = spec.section("data", DataConfig).seq_len
    rows = open_rows(inputs["tokenize"], "train", seq_len=seq_len, drop_tail=True)
    val_rows = open_rows(inputs["tokenize"], "val", seq_len=seq_len)
    seed = int(spec.settings["seed"])
    origin = spec.section("pretrain", PretrainConfig)

    def start(cfg: TrainConfig) -> train.TrainState:
        if origin.init_from is None:
            return train.init_state(cfg, seed)
        return start_from(cfg, seed, Path(origin.init_from), tokenizer, with_optimizer=origin.init_optimizer)

    return fit_stage(
        spec, cfg, seed=seed, tokenizer=tokenizer, rows=rows, val_rows=val_rows, start=start, prompt=""
    )  # fmt: skip


def start_from(
    cfg: TrainConfig, seed: int, path: Path, tokenizer: Tokenizer, *, with_optimizer: bool
) -> train.TrainState:
    """A state at step 0 whose parameters are those at `path`.

    Args:
        cfg: options and model of the new training.
        seed: of the new training.
        path: a fitting stage's directory or one of its checkpoints.
        tokenizer: of the new training.
        with_optimizer: take the optimizer's state too, its count of updates included; the learning-rate schedule then
            goes on from there.

    Raises:
        InputError: another model shape or tokenizer, or another optimizer when its state is asked for.
    """
    found = saved.load(path)
    if found.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"pretrain.init_from={path}: that model's tokenizer is not this run's; tokenize the data as there."
        )
    ours, theirs = cfg.model.identity(), found.cfg.identity()
    different = [name for name in ours if ours[name] != theirs[name] and name not in _FREE]
    if different:
        name = different[0]
        raise InputError(
            f"pretrain.init_from={path}: model.{name} is {theirs[name]!r} there and {ours[name]!r} here; "
            "make them equal."
        )
    state = train.init_state(cfg, seed, params=found.params)
    if not with_optimizer:
        return state
    wanted = {"rest": jax.eval_shape(lambda: loop.items(state))["rest"]}
    single = path.parent.name == saved.CHECKPOINTS
    rest = (
        restore_step_dir(path, wanted) if single else restore(path / saved.CHECKPOINTS, wanted, step=found.step)
    )  # fmt: skip
    assert rest is not None  # saved.load has just read this checkpoint
    return state._replace(opt_state=rest.items["rest"].opt_state)


# Fields of a model that leave its weights' shapes and meaning alone.
_FREE = {
    "dropout",
    "compute_dtype",
    "scan_layers",
    "remat",
    "init_std",
    "init_scheme",
    "tie_qk_init",
    "zero_init_out",
    "zero_init_head",
}

if __name__ == "__main__":
    process.main(run)
