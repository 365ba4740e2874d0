"""The real pretrain stage; each process notes the training rows it reads in rows-<process>.part, a line a step."""

from __future__ import annotations

import os
import time

from jaxlm.launch.protocol import process_id
from jaxlm.parallel import mesh
from jaxlm.stages import pretrain, process


class Noted:
    def __init__(self, rows, read):
        self.rows, self.read = rows, read

    def batch(self, indices):
        self.read += [int(index) for index in indices]
        return self.rows.batch(indices)


def run(spec, inputs):
    put_rows = mesh.Layout.put_rows

    def noting(layout, rows, indices):
        time.sleep(float(os.environ.get("COUNT_SLEEP", "0")))
        read = []
        batch = put_rows(layout, Noted(rows, read), indices)
        with open(spec.directory / f"rows-{process_id()}.part", "a") as file:
            file.write(" ".join(map(str, read)) + "\n")
        return batch

    mesh.Layout.put_rows = noting
    try:
        return pretrain.run(spec, inputs)
    finally:
        mesh.Layout.put_rows = put_rows


if __name__ == "__main__":
    process.main(run)
