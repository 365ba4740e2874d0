"""From a name or a file to numbered rows of tokens: downloads, documents, packing, shards on disk, and their order."""

from jaxlm.data.download import Resource, fetch
from jaxlm.data.order import host_slice, rows, rows_for_step
from jaxlm.data.packing import PackedRows, pack_documents, pack_sequences
from jaxlm.data.sft_examples import (
    Example,
    encode_example,
    encode_examples,
    encode_prompt,
    load_examples,
    pack_examples,
)
from jaxlm.data.shard_writer import write_rows, write_stream
from jaxlm.data.shards import RowSet
from jaxlm.data.sources import SOURCES, Source, source
from jaxlm.data.text import read_documents, split_documents, split_text

__all__ = [
    "SOURCES",
    "Example",
    "PackedRows",
    "Resource",
    "RowSet",
    "Source",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "fetch",
    "host_slice",
    "load_examples",
    "pack_documents",
    "pack_examples",
    "pack_sequences",
    "read_documents",
    "rows",
    "rows_for_step",
    "source",
    "split_documents",
    "split_text",
    "write_rows",
    "write_stream",
]
