"""Character-level Tiny Shakespeare, beside an eager PyTorch model of the same shape on this machine, in one run.

The peer is the shape and the budget of nanoGPT's CPU recipe (4 layers, 4 heads, D=128, windows of 64, batches of 12,
2000 steps of AdamW, no dropout): GPT-2 blocks without biases, written here from that description. Its time for all
steps is its median step, measured before and after ours so that a drift of the machine's speed shows, times 2000.
Ours is the pretrain stage of `configs/shakespeare_char.yaml`, from process start to its last checkpoint.

Usage (needs the `bench` extra, and shakespeare in the download cache or JAXLM_MIRROR):

    python benchmarks/shakespeare_char.py [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

B, T, D, H, L, V = 12, 64, 128, 4, 4, 65
PEER_STEPS, PEER_LOSS = 2000, 1.898


def peer_step_seconds(steps: int) -> list[float]:
    """Seconds of each of `steps` training steps of the peer, after five to warm up."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, t, _ = x.shape
            q, k, v = (y.view(b, t, H, D // H).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, D))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.norm = nn.LayerNorm(D, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.tokens.weight.T

    torch.manual_seed(0)
    model = Peer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    seconds = []
    for step in range(steps + 5):
        ids = torch.randint(V, (B, T + 1))
        started = time.perf_counter()
        loss = F.cross_entropy(model(ids[:, :-1]).reshape(-1, V), ids[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 5:
            seconds.append(time.perf_counter() - started)
    return seconds


def ours(root: Path) -> tuple[float, float]:
    """Wall seconds of the pretrain stage as a process, and its loss on the whole validation split."""
    command = [sys.executable, "-m", "jaxlm.cli"]
    where = ["configs/shakespeare_char.yaml", "--root", str(root)]
    subprocess.run([*command, "prepare", *where], check=True)
    started = time.perf_counter()
    subprocess.run([*command, "pretrain", *where], check=True)
    seconds = time.perf_counter() - started
    subprocess.run([*command, "evaluate", *where], check=True)
    report = json.loads((root / "runs" / "shakespeare_char" / "report.json").read_text())
    return seconds, report["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of the peer, before and after our run")
    steps = parser.parse_args().steps
    before = peer_step_seconds(steps)
    with tempfile.TemporaryDirectory() as folder:
        seconds, loss = ours(Path(folder))
    after = peer_step_seconds(steps)
    peer = statistics.median(before + after) * PEER_STEPS
    print(f"peer   {statistics.median(before) * 1e3:.1f} ms a step before, {statistics.median(after) * 1e3:.1f} after")
    print(f"peer   {PEER_STEPS} steps in {peer:.0f} s (published loss on the whole split: {PEER_LOSS})")
    print(f"jaxlm  loss {loss:.4f} on the whole validation split in {seconds:.0f} s, compilation and start included")
    print(f"ratio  {peer / seconds:.2f} times the peer's speed")


if __name__ == "__main__":
    main()
