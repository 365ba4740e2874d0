"""Which text, and which tokenizer: the options of the data. Loads no jax."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from jaxlm._frozen import Frozen, Positive


class DataConfig(Frozen):
    """Where the text comes from and how it is cut into rows."""

    source: str = Field("storyworld", description="storyworld, a name from jaxlm.data.sources, or file")
    path: str | None = Field(
        None, description="source=file: a UTF-8 text file (or .jsonl with a text field), or a directory"
    )
    url: str | None = Field(None, description="source=file: fetch it from here instead of path")
    size: Positive | None = Field(None, description="bytes of the download at url")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="digest of the file at url or path")
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="last share of the characters kept for validation; storyworld: n_val_stories"
    )
    world: Literal["small", "rich"] = Field("small", description="storyworld: which world")
    n_stories: Positive = Field(20000, description="storyworld: training stories")
    n_val_stories: Positive = Field(500, description="storyworld: validation stories")
    pack: Literal["stream", "documents"] = Field(
        "stream", description="documents: no row attends across a document's edge"
    )
    seq_len: Positive = Field(128, description="T, tokens per row")

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        return known_source(source, "text")

    @model_validator(mode="after")
    def _source_fits(self) -> Self:
        if self.source == "file" and (self.path is None) == (self.url is None):
            raise ValueError("source=file needs one of path and url")
        if self.source != "file" and (self.path is not None or self.url is not None):
            raise ValueError(f"path and url belong to source=file, not to source={self.source}")
        if self.url is not None and (self.sha256 is None or self.size is None):
            raise ValueError("url needs size and sha256, so that what arrives can be checked")
        if self.size is not None and self.url is None:
            raise ValueError(f"size={self.size} is that of a download; give its url, or leave size out")
        if self.sha256 is not None and self.source != "file":
            raise ValueError(f"sha256 is that of a file of yours; leave it out with source={self.source}")
        default = type(self).model_fields["val_fraction"].default
        if self.source == "storyworld" and self.val_fraction != default:
            raise ValueError(
                f"val_fraction={self.val_fraction} is of a text, and source=storyworld makes its validation stories "
                "apart; set n_val_stories instead"
            )
        return self


class TokenizerConfig(Frozen):
    """Which tokenizer, and how it is made from the training text."""

    kind: Literal["char", "word", "bpe", "named"] = Field(
        "word", description="named: a published encoding or a directory"
    )
    name: str | None = Field(None, description="kind=named: gpt2, cl100k_base, a directory or a tokenizer.json")
    vocab_size: Positive = Field(4096, description="kind=bpe: merges are learned up to this size")
    unk: bool = Field(True, description="kind=char or word: unknown pieces become [UNK]; false: they are an error")

    @field_validator("name")
    @classmethod
    def _there(cls, name: str | None) -> str | None:
        if name is not None:
            from jaxlm.tokenizers.load import is_there
            from jaxlm.tokenizers.named import PUBLISHED

            if not is_there(name):
                raise ValueError(f"expected {', '.join(PUBLISHED)}, or a directory or file that holds a tokenizer")
        return name

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if self.kind == "named" and self.name is None:
            raise ValueError("kind=named needs a name, such as name=gpt2")
        if self.kind != "named" and self.name is not None:
            raise ValueError(f"name={self.name} goes with kind=named, found kind={self.kind}; leave one of them out")
        if self.kind != "bpe" and self.vocab_size != type(self).model_fields["vocab_size"].default:
            raise ValueError(
                f"vocab_size={self.vocab_size} goes with kind=bpe, found kind={self.kind}, which takes all that the "
                "text or the name gives; leave vocab_size out"
            )
        return self


def known_source(source: str, kind: Literal["text", "examples"]) -> str:
    """The same name, when it is of something that `kind` reads.

    Raises:
        ValueError: it is not; names those that are.
    """
    if source not in ("storyworld", "file"):
        from jaxlm.data.sources import SOURCES

        names = [name for name, item in SOURCES.items() if item.kind == kind]
        if source not in names:
            what = "text to train on" if kind == "text" else "prompts with responses"
            raise ValueError(f"expected {what}: storyworld, file, {', '.join(names)}")
    return source
