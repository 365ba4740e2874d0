"""What has been added to a text file, line by line: the log or the metrics of a job that runs elsewhere."""

from __future__ import annotations

import os
from pathlib import Path


class Tail:
    """Reads the whole lines added to a file since the last call; from its start when the file is a new one.

    Args:
        path: the file, which need not be there.
        from_end: leave out what the file holds by now.
    """

    def __init__(self, path: Path, *, from_end: bool = True) -> None:
        self._path = path
        self._offset, self._inode = 0, -1
        if from_end and path.exists():
            status = path.stat()
            self._offset, self._inode = status.st_size, status.st_ino

    def new(self) -> list[str]:
        """The whole lines added; a missing file has none."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line.decode(errors="replace") for line in whole.splitlines()]  # bytes end lines at \n and \r alone
