"""Text to token ids and back: characters, words, byte-level BPE, and the published encodings. Loads no jax."""

from jaxlm.tokenizers.base import EOT, PAD, UNK, Tokenizer, UnknownTextError, stream_text
from jaxlm.tokenizers.bpe import BytePairTokenizer, bpe
from jaxlm.tokenizers.build import build
from jaxlm.tokenizers.char import CharTokenizer, char
from jaxlm.tokenizers.hf_json import HFTokenizer
from jaxlm.tokenizers.load import load
from jaxlm.tokenizers.named import NamedTokenizer, named
from jaxlm.tokenizers.to_tiktoken import to_tiktoken
from jaxlm.tokenizers.word import WordTokenizer, word

__all__ = [
    "EOT",
    "PAD",
    "UNK",
    "BytePairTokenizer",
    "CharTokenizer",
    "HFTokenizer",
    "NamedTokenizer",
    "Tokenizer",
    "UnknownTextError",
    "WordTokenizer",
    "bpe",
    "build",
    "char",
    "load",
    "named",
    "stream_text",
    "to_tiktoken",
    "word",
]
