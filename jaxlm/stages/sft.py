"""Stage 5: the base model fine-tuned on prompt/response pairs, the loss on the response only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm import parallel, train
from jaxlm.config import TrainConfig, TrainOptions
from jaxlm.stages import process, saved
from jaxlm.stages.fitting import fit_stage, open_rows, tokenizer_of
from jaxlm.stages.spec import Manifest, Spec


def run(spec: Spec, inputs: Mapping[str, Manifest]) -> dict[str, Any]:
    """Starts from the parameters of the pretrain stage, with a fresh optimizer."""
    parallel.use_all_cores()
    base = saved.load(inputs["pretrain"].directory)
    cfg = TrainConfig(model=base.cfg, **spec.section("sft.train", TrainOptions).model_dump())
    seed = int(spec.settings["seed"])
    results = fit_stage(
        spec,
        cfg,
        seed=seed,
        tokenizer=tokenizer_of(inputs),
        rows=open_rows(inputs["tokenize_sft"], "train"),
        val_rows=open_rows(inputs["tokenize_sft"], "val"),
        start=lambda cfg: train.init_state(cfg, seed, params=base.params),
        prompt="",
    )
    return results | {"notes": base.notes + results["notes"]}


if __name__ == "__main__":
    process.main(run)
