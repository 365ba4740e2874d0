"""Reading YAML strictly: a key that stands twice in a mapping is an error; YAML's readers let the last one win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jaxlm.errors import InputError


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        InputError: the file cannot be read, is not YAML, has another value at the top, or a key twice; names the line.
    """
    try:
        values = parse(file.read_text(encoding="utf-8"), where=str(file))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise InputError(f"{file}: not a readable YAML file ({' '.join(str(error).split())}); fix the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "a text" if isinstance(values, str) else repr(values)
        raise InputError(f"{file}: expected a mapping at the top, found {found}; write lines such as `seed: 0`.")
    return values


def parse(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: YAML.
        where: a file's name, for the message about a key that stands twice.

    Raises:
        InputError: a mapping has a key twice.
        yaml.YAMLError: not YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except _TwiceError as error:
        raise InputError(
            f"{where}: line {error.line}: {error.key} stands in this mapping already, at line {error.before}; keep one."
        ) from None
    finally:
        loader.dispose()


class _TwiceError(Exception):
    def __init__(self, key: str, line: int, before: int) -> None:
        super().__init__(key)
        self.key, self.line, self.before = key, line, before


class _Loader(yaml.SafeLoader):
    """Looks at a mapping as it is written: once its merge keys (<<) are filled in, a key may well be there twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in seen:
                raise _TwiceError(key.value, line, seen[name])
            seen[name] = line
        return node
