"""The model that a person means by a name: a run of ours, a directory or a repository of Hugging Face, a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import jax

from jaxlm import interop
from jaxlm._json import read_json
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.interop import gguf, hf, hub
from jaxlm.model import Params
from jaxlm.sample import arguments, prepare
from jaxlm.stages import runs, saved
from jaxlm.tokenizers import Tokenizer

FITTING = ("sft", "pretrain")  # of a run, the first of these stages that it has
_REPO_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # owner/name, or owner/name@revision


class Loaded(NamedTuple):
    """A model to talk to.

    Attributes:
        cfg: its shape.
        params: its weights, laid out for decoding.
        tokenizer: its own.
        stop_ids: what ends an answer.
        template: for a run of ours that was fine-tuned, the text that questions were put into (`sft.template`).
        notes: sentences to show the person, such as about a damaged checkpoint that was passed over.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    template: str | None = None
    notes: tuple[str, ...] = ()


def load_model(
    name: str | Path,
    root: str | Path = ".",
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    prepared: bool = True,
) -> Loaded:
    """The model that a person means: a .gguf file, a Hugging Face directory, a run, or a repository id.

    What a name means is the first of these:

    1. a path that ends in `.gguf`;
    2. a path of a Hugging Face directory (one with `config.json`);
    3. `owner/name` or `owner/name@revision` (a commit, tag or branch) on the hub, where neither a path, nor a run, nor
       a place in the store has that name;
    4. in `root`: the run `runs/<name>`, or `runs/<run>/<stage>`; the stage `store/<name>`;
    5. the path of a run's directory, a stage's, or one that `jaxlm import-hf` made, as it is or below `root`.

    So a run's name comes before a directory of ours here that is called the same, unless its whole path is given. Of
    a run, the fine-tuned model is taken where there is one; of a stage, its newest undamaged checkpoint.

    Args:
        name: what was typed.
        root: the directory that holds store/ and runs/.
        dtype: of imported weights; float32 when empty. Runs have the type that they were saved in.
        tokenizer: instead of the one with imported weights, which may then have none.
        prepared: lay the weights out for decoding; False leaves them as `jaxlm.init` has them.

    Raises:
        InputError: there is no such model, it is damaged, or it has no tokenizer or one that exceeds its vocabulary.
        UnavailableError: a repository is neither in the cache nor reachable.
    """
    if tokenizer is not None:
        arguments.check_tokenizer(tokenizer, "encode")
    kind, place, revision = _found(name, root)
    if kind == "gguf":
        return _imported(name, gguf.load_gguf(place, dtype=dtype), tokenizer, prepared)
    if kind == "hf":
        return _imported(name, interop.load_hf(place, dtype=dtype, revision=revision), tokenizer, prepared)
    found = saved.load(Path(place))
    params = _laid_out(found.cfg, found.params) if prepared else found.params
    return Loaded(
        found.cfg, params, found.tokenizer, _stop_ids(found.tokenizer, found.cfg),
        _sft_template(runs.resolve(name, root)), tuple(found.notes),
    )  # fmt: skip


def read_shape(name: str | Path, root: str | Path = ".") -> ModelConfig:
    """The shape of the model that a person means; its weights and its tokenizer are neither needed nor read.

    Args:
        name: as `load_model`.
        root: as `load_model`.

    Raises:
        InputError: there is no such model, or what describes it is damaged.
        UnavailableError: a repository is neither in the cache nor reachable.
    """
    kind, place, revision = _found(name, root)
    if kind == "gguf":
        return gguf.read_config(place)
    if kind == "hf":
        return hf.read_config(hub.locate(place, revision, only=(hf.CONFIG,)))[1]
    return saved.read_config(_home(Path(place)))


def _found(name: str | Path, root: str | Path) -> tuple[str, str | Path, str | None]:
    """What kind of thing a name stands for (gguf, hf or run), where it is, and the revision of a repository."""
    for what, value in (("name", name), ("root", root)):
        if not isinstance(value, str | Path):
            raise InputError(f"{what}: expected a name or a path, found {arguments.found(value)}.")
    if not str(name):
        raise InputError("name: is empty; give a run, a Hugging Face directory or a .gguf file.")
    path, root = Path(name), Path(root)
    if max(map(len, path.parts), default=0) > 255:
        raise InputError(f"name: {str(name)[:40]}... is too long for a path; give a run, a directory or a .gguf file.")
    if path.suffix == ".gguf":
        return "gguf", path, None
    if (path / "config.json").is_file() or path.is_file():
        return "hf", path, None
    local = any(place.exists() for place in (path, root / "runs" / path, root / "store" / path, root / path))
    a_run = (root / "runs" / str(name).partition("/")[0] / "run.json").is_file()  # then what follows is a stage of it
    if not local and not a_run and (repository := _REPO_ID.fullmatch(str(name))):
        return "hf", repository[1], repository[2]
    place = runs.resolve(name, root, stages=FITTING)
    if not (_home(place) / "model.json").is_file():
        single = next(iter(sorted(place.glob("*.gguf"))), None)
        hint = f"give its {single.name}" if single else "give a run, a Hugging Face directory or a .gguf file"
        raise InputError(f"{place}: holds no model (neither model.json nor config.json); {hint}.")
    return "run", place, None


def _home(place: Path) -> Path:
    """The directory with a model's description: of a checkpoint, the one above all checkpoints."""
    return place.parent.parent if place.parent.name == saved.CHECKPOINTS else place


def _imported(name: str | Path, found: interop.Loaded, instead: Tokenizer | None, prepared: bool) -> Loaded:
    cfg, params, own = found
    tokenizer = own if instead is None else instead
    if tokenizer is None:
        raise InputError(
            f"{name}: there is no tokenizer with these weights; put its tokenizer.json beside them (transformers makes "
            "one of a tokenizer.model)."
        )
    if tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} entries, but the model embeds {cfg.vocab_size:,}; "
            "take the tokenizer that belongs to the weights."
        )
    notes = tuple(
        f"{name}: its files name the end token {i}, which is not among the model's {cfg.vocab_size:,}; it is ignored."
        for i in getattr(tokenizer, "stop_ids", ())
        if i >= cfg.vocab_size
    )
    params = _laid_out(cfg, params) if prepared else params
    return Loaded(cfg, params, tokenizer, _stop_ids(tokenizer, cfg), notes=notes)


def _laid_out(cfg: ModelConfig, params: Params) -> Params:
    """`prepare` without a second copy: cuts one stacked weight after the other out of `params`, which is used up."""
    if cfg.kind != "transformer" or isinstance(params["blocks"], tuple):
        return prepare(cfg, params)
    layers: list[Params] = [{} for _ in range(cfg.n_layers)]
    _cut(params["blocks"], layers)
    for i, layer in enumerate(layers):
        layers[i] = jax.block_until_ready(prepare(cfg, {"blocks": (layer,)})["blocks"][0])
    return prepare(cfg, {**params, "blocks": tuple(layers)})  # which leaves layers that are prepared as they are


def _cut(stacked: Params, layers: list[Params]) -> None:
    """Moves weights out of `stacked`, a slice into each of `layers`."""
    for name in list(stacked):
        weight = stacked.pop(name)
        if isinstance(weight, dict):
            for layer in layers:
                layer[name] = {}
            _cut(weight, [layer[name] for layer in layers])
        else:
            for i, layer in enumerate(layers):
                layer[name] = weight[i]
            jax.block_until_ready([layer[name] for layer in layers])  # before the next: the whole is freed by then


def _stop_ids(tokenizer: Tokenizer, cfg: ModelConfig) -> tuple[int, ...]:
    """What ends an answer: what the model's own files say, and its end of text."""
    ends = [*getattr(tokenizer, "stop_ids", ()), *([] if tokenizer.eot_id is None else [tokenizer.eot_id])]
    return tuple(dict.fromkeys(i for i in ends if i < arguments.real_vocab(cfg, tokenizer)))


def _sft_template(place: Path) -> str | None:
    if not (place / "run.json").is_file() or "sft" not in runs.stages_of(place):
        return None
    found = read_json(place / "run.json").get("config", {}).get("sft", {}).get("template")
    return found if isinstance(found, str) else None


def start_ids(tokenizer: Tokenizer, *, empty: bool) -> list[int]:
    """What comes before a text: bos_token where the model was trained with one, `<|endoftext|>` for our own models.

    Args:
        tokenizer: the model's.
        empty: there is no text, so some token has to stand there.
    """
    found = list(getattr(tokenizer, "start_ids", ()))
    own = not hasattr(tokenizer, "start_ids")
    if not found and (own or empty):
        candidates = (getattr(tokenizer, "bos_id", None), tokenizer.eot_id)
        found = [i for i in candidates if i is not None][:1]
    return found
