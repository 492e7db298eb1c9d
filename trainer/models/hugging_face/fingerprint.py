"""Tells models in directories apart."""

import hashlib
import os

from bagualu.trainer.models.hugging_face.directory import CONFIG, HuggingFaceModel
from bagualu.trainer.models.hugging_face.safetensors_file import read_bytes

_SAMPLE_BYTES = 2**10
"""The most bytes that are read of each tensor: training changes every tensor nearly everywhere."""


def fingerprint(model: HuggingFaceModel) -> str:
    """Returns a hash of the configuration and, for each tensor, of its name, dtype, shape and _SAMPLE_BYTES from its middle. Raises
    OSError, RecipeError."""
    whole = hashlib.blake2b((model.path / CONFIG).read_bytes(), digest_size=16)
    for path in sorted({tensor.path for tensor in model.tensors.values()}):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for name, tensor in model.tensors.items():
                if tensor.path == path:
                    sample = bytearray(min(tensor.bytes, _SAMPLE_BYTES))
                    read_bytes(descriptor, path, tensor.start + (tensor.bytes - len(sample)) // 2, memoryview(sample))
                    whole.update(f"{name} {tensor.kind} {tensor.shape}".encode() + sample)
        finally:
            os.close(descriptor)
    return whole.hexdigest()
