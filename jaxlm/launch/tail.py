"""What has been added to a text file, line by line: the log of a job that runs elsewhere."""

from __future__ import annotations

from pathlib import Path


class Tail:
    """Reads the lines added to a file since the last call, from the file's end at the time of construction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[str]:
        """The whole lines added; a missing file has none."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()
