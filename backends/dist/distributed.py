"""A parallel layout at run time: how a batch is cut and put together again, and what belongs to the whole of it.

Copied into each package with a parallel layout as `_distributed.py`; its operations are in the package's `_plan.py`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from chunkc.backends.dist.ranks import Ranks, gathered
from chunkc.backends.dist.segments import Segments, pieces, place_of


BUCKET = 1 << 24  # elements of gradients that are added up at once, about


class Distributed:
    """What all plans have. A loss is the sum of the ranks' own; so what all ranks hold whole, as weights and initial
    states, has on each rank the gradient of that rank's part, and `reduce_gradients` adds these up."""

    names: tuple[str, ...]  # of the mesh's axes, by the spec
    over: str  # the axis whose ranks share a sequence
    layout: str

    def __init__(self, mesh: DeviceMesh, timeout: timedelta) -> None:
        have = mesh.mesh_dim_names or ()
        if strange := [n for n in have if n not in self.names]:
            raise ValueError(f"the mesh has an axis '{strange[0]}', the spec's are {', '.join(self.names)}; "
                             "name its axes by mesh_dim_names")  # fmt: skip
        if self.over not in have:
            raise ValueError(f"the mesh has no axis '{self.over}': name it by mesh_dim_names=('{self.over}',)")
        self.ranks = Ranks(mesh, self.over, timeout)

    def close(self) -> None:
        """Stop looking for failures of other ranks; a plan that is not used any more may be closed."""
        self.ranks.close()

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return self.ranks.size

    def shard(self, x: Tensor) -> Tensor:
        """This rank's part [B, T / ranks, ...] of a whole batch [B, T, ...], packed or not."""
        own = pieces(self.ranks.rank, self.size, self.layout)
        count = len(own) * self.size
        if x.dim() < 2 or x.shape[1] == 0 or x.shape[1] % count:
            raise ValueError(f"a {self.layout} layout over {self.size} ranks wants [B, T, ...] with T a multiple of "
                             f"{count}, not {list(x.shape)}: pad the batch")  # fmt: skip
        parts = x.reshape(x.shape[0], count, x.shape[1] // count, *x.shape[2:])
        return torch.cat([parts[:, p] for p in own], 1)

    def unshard(self, x: Tensor) -> Tensor:
        """The whole batch [B, T, ...] on each rank, from the ranks' parts."""
        every = gathered(self.ranks, x, "unshard").flatten(0, 2)
        places = [place_of(r, self.size, self.layout, x.shape[0], x.shape[1], x.device) for r in range(self.size)]
        return every[torch.cat(places).argsort()].view(x.shape[0], self.size * x.shape[1], *x.shape[2:])

    def segments(self, x: Tensor, cu_seqlens: Tensor | None, like: Tensor, start: Tensor | None) -> Segments:
        """Where this rank's tokens stand; `cu_seqlens` and `start` are those of the whole batch."""
        return Segments(self.ranks, self.layout, x.shape[0], x.shape[1], cu_seqlens, like, start)

    def reduce_gradients(self, weights: torch.nn.Module | Iterable[Tensor]) -> None:
        """Add up over the ranks the gradients of what each holds whole. Not for modules in DDP or FSDP over this axis,
        which do it themselves, and divide by the number of ranks."""
        held = weights.parameters() if isinstance(weights, torch.nn.Module) else weights
        bucket: list[Tensor] = []
        for w in held:
            if w.requires_grad:
                w.grad = torch.zeros_like(w) if w.grad is None else w.grad
                if bucket and (bucket[0].dtype != w.dtype or sum(g.numel() for g in bucket) > BUCKET):
                    self._add_up(bucket)
                    bucket = []
                bucket.append(w.grad)
        self._add_up(bucket)

    def _add_up(self, grads: list[Tensor]) -> None:
        """Their sums over the ranks, in one message."""
        if grads and self.size > 1:
            flat = self.ranks.total(torch.cat([g.flatten() for g in grads]), "reduce_gradients")
            for g, new in zip(grads, torch.split(flat, [g.numel() for g in grads])):
                g.copy_(new.view_as(g))

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what each has, without a gradient."""
        return self.ranks.total(x.detach().clone(), "total")

    def mean(self, total: Tensor, count: int | Tensor) -> Tensor:
        """A rank's share of the mean over all ranks' tokens, from its own sum and count: the shares add up to it."""
        return total / self.total(torch.as_tensor(count, dtype=total.dtype, device=total.device)).clamp(min=1)
