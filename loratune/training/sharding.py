"""A base cut over several devices: torch's FSDP2 by Lightning's strategy, under the name fsdp2."""

from __future__ import annotations

from collections.abc import Collection

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

NAME = "fsdp2"


class Sharded(ModelParallelStrategy):
    """Lightning's strategy with every process in the same data-parallel group and checkpoints in one file."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Only now is it known how many processes there are."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()


StrategyRegistry.register(NAME, Sharded, description="the base cut over the devices (FSDP2)")


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether weights are cut, so that every process has to take part where the network is called."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def draws(trainer: L.Trainer) -> bool:
    """Whether this process computes what one alone could: the first does, and all where weights are cut."""
    return trainer.is_global_zero or is_sharded(trainer)


def shard(part: nn.Module, mesh: DeviceMesh, blocks: Collection[str]) -> None:
    """Cut a component's weights over a mesh, block by block, so that one block at a time is whole in the forward pass.

    Args:
        part: changed in place; the channels of its convolutions come first again, as FSDP takes no others.
        mesh: of the data-parallel group.
        blocks: names of the classes of its blocks.
    """
    for parameter in part.parameters():
        parameter.data = parameter.data.contiguous()
    for block in part.modules():
        if type(block).__name__ in blocks:
            fully_shard(block, mesh=mesh)
    # By default what is in no block stays whole after a forward pass, and is then no longer what the optimizer holds.
    fully_shard(part, mesh=mesh, reshard_after_forward=True)
