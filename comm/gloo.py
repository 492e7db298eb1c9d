"""Gloo: CPU tensors over TCP; the backend that runs everywhere."""

import torch

from bagualu.comm.torch_transport import TorchBackend


class GlooBackend(TorchBackend):
    torch_name = "gloo"
    device = torch.device("cpu")
