"""The public files that are known by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import httpx
import pytest

from jaxlm.data.download import fetch
from jaxlm.data.sources import SOURCES, source
from jaxlm.errors import InputError

MIRROR = os.environ.get("JAXLM_MIRROR")


def test_the_known_files_are_well_described() -> None:
    for name, known in SOURCES.items():
        assert source(name) is known
        assert len(bytes.fromhex(known.resource.sha256)) == 32
        assert known.resource.size > 0
        assert httpx.URL(known.resource.url).scheme == "https"
        assert known.licence
        assert known.title
    assert len({known.resource.sha256 for known in SOURCES.values()}) == len(SOURCES)
    with pytest.raises(InputError, match="did you mean shakespeare"):
        source("shakespear")
    with pytest.raises(InputError, match="known names: shakespeare, verdict"):
        source("xyz")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_known_files_come_from_the_mirror(name: str, tmp_path: Path) -> None:
    if MIRROR is None:
        pytest.skip("JAXLM_MIRROR is not set: the public files are not at hand")
    resource = source(name).resource
    path = fetch(resource, cache_dir=tmp_path, mirrors=[MIRROR])
    assert path.stat().st_size == resource.size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == resource.sha256
