"""What the tokenizer tests share: the lesson's corpus, a small trained BPE, the published files if there are any."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as decoding

from jaxlm import tokenizers
from jaxlm.tokenizers import BytePairTokenizer, NamedTokenizer
from jaxlm.tokenizers.gguf_vocab import PRE_TOKENIZERS

# Written for these tests. Repeats itself, so that merges form; has accents and an emoji, so that bytes matter.
PROSE = (
    "The gardener's well-known café opened at 12:30; it wasn't full. “Two coffees, please,” said the gardener.\n"
    "The price (1,000 crowns!) was well known, and the gardener's friend said: the café is the best café. 🚀\n"
) * 8


@pytest.fixture(scope="session")
def lesson_corpus() -> list[str]:
    """The three sentences of the source notebook on tokenization."""
    return [
        "The quick brown fox jumps over the lazy dog",
        "Tokenization converts text to numbers",
        "Large language models predict the next token",
    ]


@pytest.fixture(scope="session")
def prose() -> str:
    return PROSE


@pytest.fixture(scope="session")
def trained() -> BytePairTokenizer:
    return tokenizers.bpe(PROSE, 330)


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the published files; downloads resolve there, into a cache of their own."""
    needed = ["vocab.bpe", "encoder.json", "cl100k_base.tiktoken", "tinyshakespeare.txt"]
    for name in filter(None, os.environ.get("JAXLM_MIRROR", "").split(os.pathsep)):
        if all(any(Path(name).rglob(file)) for file in needed):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("JAXLM_MIRROR", name)
                patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
                yield Path(name)
            return
    pytest.skip(f"needs JAXLM_MIRROR to name a directory that holds {', '.join(needed)}")


@pytest.fixture(scope="session")
def gpt2(mirror: Path) -> NamedTokenizer:
    return tokenizers.named("gpt2")


@pytest.fixture(scope="session")
def cl100k(mirror: Path) -> NamedTokenizer:
    return tokenizers.named("cl100k_base")


HARD = [
    "", " ", "  ", "\n", "\t\t", " \n \n\n  x", "a  b   c    d", "x 1  22   333    4444", "12345678901", "3.14159e-10",
    "it's IT'S we'LL they\u2019d 'Re \u017ft '\u017f", "naïve café Ω≈ç√", "e\u0301 \u0301 n\u0303o", "ﬁ ﬂ Ⅳ ½ ²",
    "日本語 と English 混ぜ", "العربية עברית हिन्दी ไทย", "🚀👩\u200d👩\u200d👧\u200d👦🇫🇷 🏳\ufe0f\u200d🌈",
    "\x00\x01\x1c\x1f\x7f\x85\xa0\u2028\u3000x", "a\r\nb\rc\n\r\n d", "<|end|> <|im_start|>user",
    "def f(x):\n    return x**2  # ok\n\n\n", "https://a.b/c?d=e&f=%20", "\ufeffbom \u200b zero",
    "𝒳𝓎 𐍈 \U0010ffff", "!!! ??? ... ---", "x" * 300, " " * 1200 + "y",
]  # fmt: skip
GPT2 = {"pre": pre_tokenizers.ByteLevel(add_prefix_space=False)}
MAKERS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "smollm": {
        "pre": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    },
    **{
        name: {
            "pre": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(PRE_TOKENIZERS[name].pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "normalizer": normalizers.NFC() if name == "qwen2" else None,
            "ignore_merges": name == "llama-bpe",
        }
        for name in ("llama-bpe", "qwen2")
    },
}


def byte_level(prose: str, *, pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> Backend:
    """A tokenizer as the makers of published models train theirs, small."""
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre, decoding.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator([prose], trainer)
    backend.add_special_tokens(["<|start|>", "<|end|>", "<|pad|>"])
    return backend


@pytest.fixture(scope="session")
def hard() -> list[str]:
    """Texts on which tokenizers that differ would differ."""
    return HARD


@pytest.fixture(scope="session")
def make_backend() -> Callable[[str], Backend]:
    """make_backend(name): a small tokenizer of the kind gpt2, smollm, llama-bpe or qwen2, a new one at each call."""
    return lambda name: byte_level(PROSE, **MAKERS[name])


@pytest.fixture(scope="session")
def sentencepiece(prose: str) -> Backend:
    """Llama 2's kind: spaces as ▁, bytes for what is in no piece."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space, strip = decoding.Replace("▁", " "), decoding.Strip(" ", 1, 0)
    backend.decoder = decoding.Sequence([space, decoding.ByteFallback(), decoding.Fuse(), strip])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([line.replace(" ", "▁") for line in prose.splitlines()[:2]], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = Backend.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend
