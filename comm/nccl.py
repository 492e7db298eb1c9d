"""NCCL: NVIDIA GPUs, one per rank."""

import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.torch_transport import TorchBackend
from bagualu.comm.world import World


class NcclBackend(TorchBackend):
    torch_name = "nccl"

    def __init__(self, world: World, timeout_seconds: float) -> None:
        count = torch.cuda.device_count()
        if world.local_rank >= count:
            raise RecipeError(
                f"comm.backend=nccl needs one GPU per worker, but this node has {count} for local rank {world.local_rank}; "
                f"give comm.backend=gloo or at most {count} workers per node"
            )
        self.device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(self.device)
        super().__init__(world, timeout_seconds)
