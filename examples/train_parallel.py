"""Train a layer whose sequences are shared by all ranks, to give back the token before last; rank 0 prints the loss.

chunkc build specs/parallel_hybrid.spec -o build
torchrun --nproc-per-node 4 examples/train_parallel.py build/parallel_hybrid
"""

from __future__ import annotations

import argparse
import importlib
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="what chunkc made of specs/parallel_hybrid.spec")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a rank waits for another one")
    args = parser.parse_args()
    sys.path.insert(0, str(args.package.resolve().parent))
    made = importlib.import_module(args.package.name)

    torch.set_num_threads(1)
    timeout = timedelta(seconds=args.timeout)
    dist.init_process_group("gloo", timeout=timeout)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ring",))
    plan = made.Plan(mesh, timeout=timeout)

    torch.manual_seed(0)  # all ranks draw the same weights and the same batches
    layer = made.ParallelHybrid(d_model=32, heads=2, window=64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(args.steps):
        whole = torch.randn(2, args.tokens, 32)
        x, wanted = plan.shard(whole), plan.shard(whole.roll(2, 1))
        square = (layer(x, plan=plan) - wanted).square()
        loss = plan.mean(square.sum(), square.numel())  # this rank's share: the shares add up to the mean
        optimizer.zero_grad()
        loss.backward()
        plan.reduce_gradients(layer)
        optimizer.step()
        mean = plan.total(loss.detach())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.4f}", flush=True)
    plan.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
