"""The chain of stages, declared once: which results each stage reads and which settings decide it. Loads no jax.

`plan(cfg)` turns a configuration into the specs of its stages. Ids follow from the ids of the inputs, so all of them
are known before anything has run.

To add a stage: its version in `VERSIONS`, its inputs and settings in `_CHAIN`, and a module `jaxlm/stages/<name>.py`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm._digests import MANIFEST as CHECKPOINT_MANIFEST
from jaxlm.config import Frozen, RunConfig
from jaxlm.errors import InputError
from jaxlm.stages.runs import resolve
from jaxlm.stages.spec import ID_LENGTH, Spec
from jaxlm.stages.store import digest, read_manifest

# Raise a stage's number when its behaviour changes: results made before are then made again.
VERSIONS: dict[str, int] = {
    "download": 3,
    "tokenize": 2,
    "tokenize_sft": 2,
    "pretrain": 1,
    "sft": 1,
    "evaluate": 4,
}


class Settings(NamedTuple):
    """What a stage is given, by section: what decides its result, and what does not."""

    config: dict[str, Any]
    options: dict[str, Any]


class _Stage(NamedTuple):
    name: str
    inputs: Callable[[RunConfig], Sequence[str]]
    settings: Callable[[RunConfig], Settings]
    wanted: Callable[[RunConfig], bool] = lambda cfg: True


def plan(cfg: RunConfig, *, modules: Mapping[str, str] | None = None) -> list[Spec]:
    """The stages of a run, in an order in which each finds its inputs done.

    Args:
        cfg: the run. Files that it names are read, for their digests.
        modules: stage -> Python module, for stages other than `jaxlm.stages.<stage>`.

    Raises:
        InputError: a file that the configuration names is missing, or is not the one that its sha256 says.
    """
    specs: dict[str, Spec] = {}
    for stage in _CHAIN:
        if not stage.wanted(cfg):
            continue
        config, options = stage.settings(cfg)
        specs[stage.name] = Spec(
            stage=stage.name,
            version=VERSIONS[stage.name],
            config=config,
            inputs={name: specs[name].as_input() for name in stage.inputs(cfg)},
            options=options,
            root=cfg.root,
            module=(modules or {}).get(stage.name, ""),
        )
    return list(specs.values())


def until(specs: Sequence[Spec], last: str) -> list[Spec]:
    """The spec of `last` and of all that it needs, directly or not, in the same order.

    Raises:
        InputError: the plan has no such stage.
    """
    by_name = {spec.stage: spec for spec in specs}
    if last not in by_name:
        close = difflib.get_close_matches(last, by_name, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(by_name)}."
        if last in VERSIONS:
            hint = "set sft.enabled=true."
        raise InputError(f"stage {last}: this run has no such stage; {hint}")
    needed: set[str] = set()
    ask = [last]
    while ask:
        name = ask.pop()
        if name not in needed:
            needed.add(name)
            ask += [item["stage"] for item in by_name[name].inputs.values()]
    return [spec for spec in specs if spec.stage in needed]


def _download(cfg: RunConfig) -> Settings:
    """Text of the training and validation splits."""
    data = cfg.data
    if data.source == "storyworld":
        decides = {"data": ("source", "world", "n_stories", "n_val_stories")}
        return _split({"data": data}, decides, {"seed": cfg.seed, "world": _world(data.world)})
    files = _file("data.path", data.path)
    if data.path is not None and data.sha256 not in (None, files["data.path"]):
        raise InputError(
            f"data.path={data.path}: its SHA-256 is {files['data.path'][:12]}…, and data.sha256 says "
            f"{str(data.sha256)[:12]}…; get the right file, or correct data.sha256."
        )
    if data.url is not None:
        files = {"data.path": str(data.sha256), "data.format": _format(data.url.partition("?")[0])}
    return _split({"data": data}, {"data": ("source", "val_fraction")}, {"files": files})


def _tokenize(cfg: RunConfig) -> Settings:
    """Token ids of both splits, in rows where documents are packed."""
    documents, tokenizer = cfg.data.pack == "documents", cfg.tokenizer
    fields: tuple[str, ...] = {
        "char": ("kind", "unk"),
        "word": ("kind", "unk"),
        "bpe": ("kind", "vocab_size"),
        "named": ("kind", "name"),
    }[tokenizer.kind]
    files: dict[str, str] = {}
    if tokenizer.name is not None and Path(tokenizer.name).exists():
        files, fields = _file("tokenizer.name", tokenizer.name), ("kind",)
    return _split(
        {"data": cfg.data, "tokenizer": tokenizer},
        {"data": ("pack", "seq_len") if documents else ("pack",), "tokenizer": fields},
        {"eot": documents or cfg.sft.enabled, "files": files},
        # Rows of a stream are cut when they are read: a length here would be one that decides and is not in the id.
        hide=() if documents else ("data.seq_len",),
    )


def _tokenize_sft(cfg: RunConfig) -> Settings:
    """Packed rows of prompt/response pairs."""
    sections = {"data": cfg.data, "sft": cfg.sft}
    if cfg.sft.source == "storyworld":
        decides = {"data": ("seq_len", "world"), "sft": ("source", "template", "n_examples", "seq_len")}
        extra = {"seed": cfg.seed, "world": _world(cfg.data.world)}
        return _split(sections, decides, extra, hide=("sft.train",))
    decides = {"data": ("seq_len",), "sft": ("source", "template", "seq_len")}
    return _split(sections, decides, {"files": _file("sft.path", cfg.sft.path)}, hide=("sft.train",))


def _pretrain(cfg: RunConfig) -> Settings:
    """Parameters of the base model."""
    options: dict[str, Any] = {"eval": _cosmetic(cfg.eval)}
    config: dict[str, Any] = {
        "model": cfg.model.identity(),
        "train": cfg.train.identity(),
        "pretrain": {"init_optimizer": cfg.pretrain.init_optimizer},
        "seed": cfg.seed,
        "data": {"seq_len": cfg.data.seq_len},
    }
    if cfg.pretrain.init_from is not None:
        start = resolve(cfg.pretrain.init_from, cfg.root, stages=("pretrain",))
        config["files"] = {"pretrain.init_from": parameters_digest(start)}
        options["pretrain"] = {"init_from": str(start.resolve())}
    return Settings(config, options | {"train": _cosmetic(cfg.train)})


def _sft(cfg: RunConfig) -> Settings:
    """Parameters after fine-tuning."""
    config = {"sft": {"train": cfg.sft.train.identity()}, "seed": cfg.seed}
    return Settings(config, {"sft": {"train": _cosmetic(cfg.sft.train)}, "eval": _cosmetic(cfg.eval)})


def _evaluate(cfg: RunConfig) -> Settings:
    """Figures, samples and the report."""
    sft: dict[str, Any] = {"enabled": cfg.sft.enabled}
    if cfg.sft.enabled:
        sft |= {"source": cfg.sft.source, "template": cfg.sft.template}
    data = {"source": cfg.data.source} | ({"world": cfg.data.world} if cfg.data.source == "storyworld" else {})
    config = {"eval": cfg.eval.identity(), "seed": cfg.seed, "sft": sft, "data": data}
    return Settings(config, {"eval": _cosmetic(cfg.eval), "name": cfg.name})


def _world(name: str) -> str:
    """What a story world is made of: tuning its words or probabilities makes the stories anew."""
    from jaxlm.data.storyworld import WORLDS  # numpy comes with it, which the frame of a stage does without

    return hashlib.sha256(repr(WORLDS[name]).encode()).hexdigest()[:ID_LENGTH]


def _with_sft(cfg: RunConfig) -> bool:
    return cfg.sft.enabled


_CHAIN: tuple[_Stage, ...] = (
    _Stage("download", lambda cfg: (), _download),
    _Stage("tokenize", lambda cfg: ("download",), _tokenize),
    _Stage("tokenize_sft", lambda cfg: ("download", "tokenize"), _tokenize_sft, wanted=_with_sft),
    _Stage("pretrain", lambda cfg: ("tokenize",), _pretrain),
    _Stage("sft", lambda cfg: ("tokenize", "tokenize_sft", "pretrain"), _sft, wanted=_with_sft),
    _Stage(
        "evaluate",
        lambda cfg: ("download", "tokenize", "pretrain", *(("tokenize_sft", "sft") if cfg.sft.enabled else ())),
        _evaluate,
    ),
)


def parameters_digest(path: Path) -> str:
    """What identifies the parameters at `path`.

    Args:
        path: the directory of a finished stage (its identity counts), of a checkpoint or of imported weights (their
            digest counts).

    Raises:
        InputError: nothing is there, it cannot be read, or the stage has not finished.
    """
    if (path / "manifest.json").is_file():
        return read_manifest(path).spec.name
    if (path / "spec.json").is_file():
        raise InputError(f"{path}: this stage has not finished; finish it, or name one of its checkpoints.")
    if (path / CHECKPOINT_MANIFEST).is_file():
        return digest(path / CHECKPOINT_MANIFEST)
    return digest(path)


def _file(field: str, path: str | None) -> dict[str, str]:
    """What of a file of the user's enters an identity: its content, and the suffix by which it is read."""
    if path is None:
        return {}
    try:
        return {field: digest(Path(path)), f"{field.partition('.')[0]}.format": _format(path)}
    except InputError as error:
        raise InputError(f"{field}={error}") from None


def _format(path: str) -> str:
    return Path(path).suffix.lower()


def _split(
    sections: Mapping[str, Frozen],
    decides: Mapping[str, Sequence[str]],
    extra: Mapping[str, Any],
    hide: Sequence[str] = (),
) -> Settings:
    """Sections as settings: the fields named in `decides` with what is in `extra`, and all others as options.

    An empty value of `extra` and a hidden `section.field` are left out; paths of files are made absolute.
    """
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, section in sections.items():
        values = section.model_dump(mode="json")
        config[name] = {field: values[field] for field in decides[name]}
        options[name] = {
            field: value
            for field, value in values.items()
            if field not in decides[name] and value is not None and f"{name}.{field}" not in hide
        }
        for field in ("path", "name"):
            if f"{name}.{field}" in extra.get("files", {}) and field in options[name]:
                options[name][field] = str(Path(options[name][field]).absolute())
    return Settings(config | {name: value for name, value in extra.items() if value != {}}, options)


def _cosmetic(section: Frozen) -> dict[str, Any]:
    """The fields that decide nothing, as plain JSON values."""
    values = section.model_dump(mode="json")
    decides = section.identity()
    return {name: value for name, value in values.items() if name not in decides}
