"""kill -9 at random moments of every stage's life: each must continue, and end in what an unbroken run ends in.

    python benchmarks/kill_everything.py --kills 100

A tiny run is made once without any fault, and its stages are timed. Then the same run is made in another directory,
where each stage's process is killed at times drawn uniformly from the whole life of an unbroken one (start-up,
compilation, steps, saves, evaluations, the last lines), and started again, until its share of the kills is done and it
has been left to finish. Compared are the digests of all arrays of the final state, the losses of every step as
hexadecimal floats, the files of the other stages and the results. Prints a row for every kill: its stage, its time in
the stage's life, the training step that the log had come to, and the phase that the directory tells; then the phases
counted, and whether the compiler's cache has been left with programs that would fail to load.

A whole run of 100 kills takes about five minutes on two free cores (a second or so for each start of a stage without
jax, three to five for one with it); `--kills 6`, one for each stage, takes about one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the stages get: a state is read where it was laid out

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "faults")]

import harness  # noqa: E402, beside the tests that share it

from jaxlm._compiled import whole  # noqa: E402

_ROW = "{:>4}  {:<13} {:>8} {:>8} {:>5}  {}"
STAGES = ("download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate")


@dataclass
class Found:
    """What came of it. `lost`: a stage that did not continue; `silent`: one that ended in something else."""

    kills: int = 0
    lost: int = 0
    silent: int = 0
    cached_programs: int = 0
    damaged_programs: list[str] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)


def run(root: Path, *, kills: int, seed: int | None, say: Callable[[str], Any] = print) -> Found:
    """Kills `kills` times in all, in stages that take turns by the length of their lives; see the module.

    Args:
        root: an empty directory.
        seed: of the times; None: drawn, and told.
        say: takes the lines.
    """
    seed = random.randrange(2**32) if seed is None else seed
    say(f"seed {seed}")
    say(_ROW.format("kill", "stage", "after", "life", "step", "phase"))
    rng, found, programs = random.Random(seed), Found(), root / "compiled"
    programs.mkdir()
    env = {
        "JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }  # fmt: skip
    # The unbroken run has a cache of its own: the killed one writes its entries, and dies in the middle of that too.
    unbroken = harness.Chain(root / "unbroken", env | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled unbroken")})
    (root / "compiled unbroken").mkdir()
    killed = harness.Chain(root / "killed", env)
    for place, share in zip(STAGES, _shares(kills), strict=True):
        life = _finish(unbroken, place)
        expected = harness.outcome(unbroken.directory(place))
        _kill(killed, place, share, life, expected, rng, found, say)
    entries = sorted(programs.glob("*-cache"))
    found.cached_programs = len(entries)
    found.damaged_programs = [entry.name for entry in entries if not whole(entry.read_bytes())]
    return found


def _shares(kills: int) -> list[int]:
    return [kills // len(STAGES) + (i < kills % len(STAGES)) for i in reversed(range(len(STAGES)))]


def _finish(chain: harness.Chain, stage: str) -> float:
    """Lets a stage run to its end; seconds that it took."""
    with chain.process(stage) as process:
        began = time.monotonic()
        code, error = process.end()
        if code != 0:
            raise RuntimeError(f"{stage} ended with {code}: {error}")
        return time.monotonic() - began


def _kill(
    chain: harness.Chain, stage: str, kills: int, life: float, expected: dict[str, Any], rng: random.Random,
    found: Found, say: Callable[[str], Any],
) -> None:  # fmt: skip
    directory, left = chain.directory(stage), kills
    while left:
        at, anew, began = rng.uniform(0, life), not directory.exists(), time.monotonic()
        with chain.process(stage) as process:
            try:
                code, error = process.end(timeout=at)
            except subprocess.TimeoutExpired:
                process.kill()
                left -= 1
                found.kills += 1
                phase, step = harness.phase(directory), harness.last_step(directory)
                found.phases[phase] += 1
                say(_ROW.format(found.kills, stage, f"{at:.2f} s", f"{life:.2f} s", step, phase))
                continue
        if anew:  # what is compiled already makes a life shorter: the next times are drawn from the whole of that
            life = min(life, time.monotonic() - began)
        if code != 0:
            found.lost += 1
            say(f"{stage}: LOST, ended with {code}: {error.strip()}")
        elif _differs(directory, expected, say):
            found.silent += 1
        _start_over(directory)
    try:
        _finish(chain, stage)
    except RuntimeError as error:
        found.lost += 1
        say(f"{stage}: LOST, {error}")
        _start_over(directory)
        _finish(chain, stage)
    if _differs(directory, expected, say):
        found.silent += 1


def _differs(directory: Path, expected: dict[str, Any], say: Callable[[str], Any]) -> bool:
    actual = harness.outcome(directory)
    for name in [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)][:5]:
        say(f"{directory.name}: {name} is {actual.get(name)}, and {expected.get(name)} in the unbroken run")
    return actual != expected


def _start_over(directory: Path) -> None:
    """A stage that ended before its time came: the next one begins anew."""
    shutil.rmtree(directory)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = run(Path(root), kills=arguments.kills, seed=arguments.seed)
    print("\nphases: " + ", ".join(f"{name} {count}" for name, count in found.phases.most_common()))
    print(f"{found.kills} kills, {found.lost} lost, {found.silent} silent;", end=" ")
    print(f"{found.cached_programs} compiled programs kept, {len(found.damaged_programs)} of them damaged")
    raise SystemExit(1 if found.lost or found.silent or found.damaged_programs else 0)


if __name__ == "__main__":
    main()
