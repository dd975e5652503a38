"""One run carried out by several processes, as torchrun starts them: replicas (DDP) or shards (FSDP2) of its model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from widthwise.derive.errors import DeriveError, unknown_name

STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this one is. Each has its share of every batch."""

    rank: int = 0
    size: int = 1
    strategy: str = "ddp"

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch [B, ...]: [B / size, ...]."""
        return batch[self.rank :: self.size]

    def sharded(self, model: nn.Module) -> None:
        """Where models are sharded, shard one that is on the meta device: layer by layer, then the rest."""
        if self.size == 1 or self.strategy != "fsdp":
            return
        from torch.distributed.fsdp import fully_shard

        for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer)
        fully_shard(model)

    def replicated(self, model: nn.Module) -> nn.Module:
        """What is called in the model's place: where models are replicated, what averages gradients."""
        if self.size == 1 or self.strategy != "ddp":
            return model
        return nn.parallel.DistributedDataParallel(model)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of values that each of them has."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size


ALONE = Team()


@contextmanager
def joined(strategy: str) -> Iterator[Team]:
    """The team that this process belongs to: those that torchrun started, or itself alone.

    Raises:
        DeriveError: for a strategy that there is not, or more processes on a machine than it has GPUs.
    """
    if strategy not in STRATEGIES:
        raise unknown_name("strategy", strategy, list(STRATEGIES))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= gpus:
            raise DeriveError(f"there are {gpus} GPUs for more processes", cure=f"torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    yield Team(dist.get_rank(), size, strategy)
    _part()


def _part() -> None:
    """End a team whose work is done."""
    dist.barrier()
    if dist.get_backend() == "gloo":  # taking its group down can abort or hang (torch 2.13)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    dist.destroy_process_group()


def description(team: Team) -> dict[str, Any]:
    """What an outcome says of the processes that made it; nothing of one alone."""
    return {} if team.size == 1 else {"processes": team.size, "strategy": team.strategy}
