"""Every option of jaxlm: its type, default, range and one-line meaning. Loads no jax.

A run is one `RunConfig`. It comes from a YAML file plus `--set a.b=c` overrides (`load`), or is built in Python.
All models are frozen and hashable, so they serve as static arguments of jitted functions.

A field marked `cosmetic(...)` does not decide any result (log intervals, paths): it stays out of a stage's identity.
"""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from jaxlm._frozen import Fraction, Frozen, NonNegative, Positive, cosmetic, takes_text, validated
from jaxlm._yaml import parse, read_mapping
from jaxlm.data_config import DataConfig, TokenizerConfig, known_source
from jaxlm.errors import InputError
from jaxlm.guards_config import GuardOptions
from jaxlm.launch_config import OF_SFT, OF_STORYWORLD, FlowOptions, figure_of
from jaxlm.model_config import ModelConfig, RopeScaling

__all__ = [
    "DataConfig", "EvalConfig", "Frozen", "ModelConfig", "PretrainConfig", "RopeScaling", "RunConfig", "SftConfig",
    "TokenizerConfig", "TrainConfig", "TrainOptions", "find_config", "load", "validated",
]  # fmt: skip


class TrainOptions(Frozen):
    """How parameters are fitted: batch, optimizer, schedule, and how often to look."""

    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(16, description="rows of seq_len tokens per step, over all devices")
    grad_accum_steps: Positive = Field(1, description="microbatches per step, run one after another")

    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for the matrices, Adam for the rest")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW, or of Adam beside Muon")
    muon_learning_rate: float = Field(0.02, gt=0, description="peak rate of Muon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of the weights marked so in the weight table")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up from zero")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps spent in the final decay")
    final_lr_ratio: Fraction = Field(0.1, description="last rate over the peak rate")

    loss_chunk: NonNegative = Field(0, description="tokens per chunk of the cross-entropy; 0: all logits at once")
    on_nonfinite: Literal["halt", "skip"] = Field("halt", description="what a non-finite loss or gradient does")
    max_skips: Positive = Field(20, description="with on_nonfinite=skip: more skipped steps than this end the run")
    guards: GuardOptions = cosmetic(GuardOptions(), description="when to give up on a run that goes wrong")

    eval_every: NonNegative = cosmetic(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_rows: NonNegative = cosmetic(0, ge=0, description="validation rows per evaluation during training; 0: all")
    checkpoint_every: NonNegative = cosmetic(0, ge=0, description="steps between checkpoints; 0: by time alone")
    checkpoint_seconds: float = cosmetic(60.0, gt=0, description="save when this long since the last checkpoint")
    keep_checkpoints: Positive = cosmetic(2, gt=0, description="newest checkpoints kept, beside the best")
    log_every: Positive = cosmetic(10, gt=0, description="steps between lines of metrics.jsonl")
    sample_tokens: NonNegative = cosmetic(
        48, ge=0, description="length of the text sampled at each evaluation; 0: none"
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"grad_accum_steps={self.grad_accum_steps} must divide batch_size={self.batch_size}")
        return self


class TrainConfig(TrainOptions):
    """What `jaxlm.train` needs: the options and the model they are for."""

    model: ModelConfig = ModelConfig()


class PretrainConfig(Frozen):
    """Where pretraining starts from."""

    init_from: str | None = Field(
        None, description="a run, a stage directory or a checkpoint to start from; empty: scratch"
    )
    init_optimizer: bool = Field(False, description="take the optimizer state along with the parameters")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.init_optimizer and self.init_from is None:
            raise ValueError("init_optimizer=true takes the state of init_from; set init_from, or leave it out")
        return self


class SftConfig(Frozen):
    """Supervised fine-tuning on prompt/response pairs; the loss counts response tokens only."""

    enabled: bool = Field(True, description="false: the pipeline ends after pretraining and its evaluation")
    source: str = Field("storyworld", description="storyworld questions, a name from jaxlm.data.sources, or file")
    path: str | None = Field(
        None, description="source=file: .jsonl or .json of prompt/response, instruction/output or messages"
    )
    n_examples: Positive = Field(8000, description="storyworld: questions to train on")
    seq_len: Positive | None = Field(None, description="T, tokens per packed row; empty: data.seq_len")
    template: str = Field("{prompt} ", description="text before the response; {prompt} is replaced")
    train: TrainOptions = TrainOptions()

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        return known_source(source, "examples")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.source == "file") != (self.path is not None):
            raise ValueError("path goes with source=file, and only with it")
        if "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}")
        return self


class EvalConfig(Frozen):
    """What the evaluation measures."""

    batch_size: Positive = cosmetic(32, gt=0, description="rows per evaluation batch")
    n_questions: Positive = Field(400, description="held-out questions asked after sft, over all types")
    max_new_tokens: Positive = Field(16, description="longest answer")
    n_samples: NonNegative = Field(4, description="texts sampled for the report")
    sample_tokens: Positive = Field(80, description="length of each sampled text")
    temperature: float = Field(0.8, ge=0, description="of the samples; questions are answered greedily")
    top_p: Fraction = Field(0.95, description="of the samples")


class RunConfig(FlowOptions):
    """One run of the pipeline."""

    name: str = cosmetic("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names runs/<name>")
    root: str = cosmetic(".", description="directory that holds store/ and runs/")
    launcher: Literal["process", "inline"] = cosmetic(
        "process", description="inline: run stages in the calling process"
    )
    seed: NonNegative = Field(0, lt=2**32, description="decides initialisation, data order, dropout and samples")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainOptions = TrainOptions()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and "preset" in value:
            from jaxlm.presets import preset

            overrides = {str(key): item for key, item in value.items() if key != "preset"}
            return preset(str(value["preset"]), **overrides)
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model.kind == "transformer" and self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len={self.data.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        if self.sft.enabled and self.model.kind == "transformer" and (self.sft.seq_len or 0) > self.model.max_seq_len:
            raise ValueError(f"sft.seq_len={self.sft.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        if self.sft.enabled and self.sft.source == "storyworld" and self.data.source != "storyworld":
            raise ValueError(
                f"sft.source=storyworld needs data.source=storyworld, found {self.data.source}; "
                "set sft.enabled=false or another sft.source"
            )
        if self.tokenizer.kind == "bpe":
            least = 256 + (self.data.pack == "documents" or self.sft.enabled)  # every byte, and the end of a text
            if self.tokenizer.vocab_size < least:
                raise ValueError(
                    f"tokenizer.vocab_size={self.tokenizer.vocab_size}: kind=bpe needs at least {least}, one for every "
                    "byte and for the end of a text"
                )
        if self.launcher == "inline":
            for name, none in (("kind", "local"), ("processes", 1), ("timeout_hours", 0.0)):
                if getattr(self.launch, name) != none:
                    raise ValueError(
                        f"launch.{name}={getattr(self.launch, name)} needs launcher=process: with launcher=inline the "
                        "stages run in the calling process"
                    )
        self._bounds_can_be_met()
        return self

    def _bounds_can_be_met(self) -> None:
        """Every bound is of a figure that this run will have."""
        for bound in self.gate.bounds:
            name = figure_of(bound)
            head, *rest = name.split(".")
            if head in OF_STORYWORLD and self.data.source != "storyworld":
                raise ValueError(f"gate.bounds: {name} is known of data.source=storyworld alone; take val_loss")
            if head in OF_SFT and not self.sft.enabled:
                raise ValueError(f"gate.bounds: {name} is measured with sft.enabled=true; take val_loss")
            if head == "accuracy_by_type":
                types = self._types_of_question()
                if rest[0] not in types:
                    raise ValueError(f"gate.bounds: {name}: the types of question are {', '.join(types)}")

    def _types_of_question(self) -> tuple[str, ...]:
        if self.sft.source != "storyworld":
            return ("all",)
        from jaxlm.data.storyworld import WORLDS

        return WORLDS[self.data.world].questions


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `a.b=c` overrides (values are parsed as YAML).

    What is not said has its default, so that an empty file is a run of the defaults under the file's name. A field of
    text takes an override as it is written: `name=2024` needs no quotes.

    Args:
        path: the file. A bare name such as `quickstart` also finds `configs/quickstart.yaml`.
        overrides: strings such as `train.steps=500`.

    Raises:
        InputError: no such file, not YAML, an unknown key or one that stands twice, a value out of range, fields that
            do not fit together.
    """
    file = find_config(path)
    values = read_mapping(file)
    values.setdefault("name", file.stem)
    for override in overrides:
        _apply_override(values, override)
    if isinstance(values.get("model"), dict) and "vocab_size" in values["model"]:
        raise InputError(
            f"{file}: model.vocab_size: a run has the vocabulary of its tokenizer; leave it out (tokenizer.vocab_size "
            "is the size of kind=bpe)."
        )
    return validated(RunConfig, values, where=str(file))


def find_config(path: str | Path) -> Path:
    """The file for a path or for the bare name of a checked-in config.

    Raises:
        InputError: neither exists.
    """
    file = Path(path)
    if file.is_file():
        return file
    hint = "pass a path to a YAML file such as configs/quickstart.yaml."
    if os.sep not in str(path) and not file.suffix:
        here = Path(__file__).resolve().parent
        # Beside the package in a checkout, inside it in an installed wheel.
        folders = (Path("configs"), here.parent / "configs", here / "_configs")
        for folder in folders:
            if (folder / f"{path}.yaml").is_file():
                return folder / f"{path}.yaml"
        names = {item.stem for folder in folders for item in folder.glob("*.yaml")}
        if close := difflib.get_close_matches(str(path), sorted(names), n=1):
            hint = f"did you mean {close[0]}?"
    raise InputError(f"{path}: no such configuration file; {hint}")


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected section.field=value.")
    try:
        value = parse(text, where=f"--set {override}")
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not readable as YAML; quote it.") from None
    path = key.split(".")
    if takes_text(RunConfig, path):
        if isinstance(value, int | float | date):  # 2024, true, 12:00:00 (which YAML 1.1 reads as seconds)
            value = text.strip()
    elif isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):
            value = float(value)
    *parents, last = path
    node = values
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: {parent} is not a section.")
        node[parent] = dict(child)  # a copy: two sections of a file with anchors may be one object
        node = node[parent]
    node[last] = value
