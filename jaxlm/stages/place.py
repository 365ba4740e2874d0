"""Where in what the user named a text lies that a tokenizer cannot express. Loads no jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.tokenizers import UnknownTextError


def unknown_text(
    spec: Spec, download: Manifest, texts: Mapping[str, Sequence[str]], split: str, error: UnknownTextError
) -> InputError:
    """The one sentence: the option, the file, the document and line, and what the tokenizer found.

    Args:
        spec: the tokenize stage's.
        download: the stage that it reads.
        texts: its documents by split.
        split: "train" or "val", where `error.document` lies.
        error: from `encode`.
    """
    data, cfg = spec.section("data", DataConfig), spec.section("tokenizer", TokenizerConfig)
    option = f"name={cfg.name}" if cfg.kind == "named" else "unk=false"
    field = "source" if data.source != "file" else "url" if data.path is None else "path"
    before = texts["train"] if split == "val" else []
    line = texts[split][error.document].count("\n", 0, error.offset) + 1
    if str(download.results["splits"][split]["file"]).endswith(".txt"):  # one text, cut in two
        where = f"line {line + sum(text.count(chr(10)) for text in before)} of the text"
    else:
        where = f"document {len(before) + error.document + 1}, line {line} of it"
    return InputError(f"tokenizer.{option}: data.{field}={getattr(data, field)}, {where} ({split} split): {error}")
