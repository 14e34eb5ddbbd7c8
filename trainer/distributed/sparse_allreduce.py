"""Summing sparse gradients over workers: NCCL and gloo have no sparse all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainer.distributed.world import World


def sum_rows(ids: torch.Tensor, gradient: torch.Tensor, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum row gradients over all workers.

    Every worker adds the same numbers in the same order, so all get the same bits.

    Args:
        ids: int64 `[U]`, this worker's distinct rows.
        gradient: float32 `[U, C]`.
        world: the workers.

    Returns:
        The distinct rows of all workers in rising order, and the sums of their gradients.
    """
    if world.size == 1:
        return ids, gradient
    counts = torch.zeros(world.size, dtype=torch.int64, device=ids.device)
    counts[world.global_rank] = len(ids)
    dist.all_reduce(counts)
    longest = int(counts.max())
    all_ids = [ids.new_empty(longest) for _ in range(world.size)]
    all_gradients = [gradient.new_empty(longest, gradient.shape[1]) for _ in range(world.size)]
    dist.all_gather(all_ids, torch.nn.functional.pad(ids, (0, longest - len(ids))))
    dist.all_gather(all_gradients, torch.nn.functional.pad(gradient, (0, 0, 0, longest - len(ids))))
    kept = [int(count) for count in counts]
    union, place = torch.unique(torch.cat([i[:n] for i, n in zip(all_ids, kept, strict=True)]), return_inverse=True)
    total = gradient.new_zeros(len(union), gradient.shape[1])
    for part, rows in zip(place.split(kept), zip(all_gradients, kept, strict=True), strict=True):
        total[part] += rows[0][: rows[1]]  # rows of one worker are distinct: no two additions meet
    return union, total
