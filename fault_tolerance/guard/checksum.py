"""A checksum that reads a tensor once, at memory bandwidth, on the tensor's own device.

The tensor's bits are arranged as rows of 64-bit words; the sums of the rows are multiplied by odd weights and added up, modulo
2^64. A single flipped bit is always detected, because it changes a row's sum by a power of two, and that times an odd number is
never zero. Several flipped bits are detected unless they cancel within a row or, with a chance of 2^-64, between rows. The checksum
detects errors, not forgeries; checkpoints use a stronger hash.
"""

import torch

_ROW_WORDS = 512
_SPREAD = 0x5851F42D4C957F2D
"""An odd 63-bit number (Knuth's multiplier for 64-bit congruential generators): rows get weights that differ in all digits."""


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the checksum of the bits of a contiguous tensor of any dtype, as an int64 scalar on the tensor's device."""
    words = _words(tensor.detach().reshape(-1))
    whole = words.numel() // _ROW_WORDS * _ROW_WORDS
    return combine(torch.cat([words[:whole].view(-1, _ROW_WORDS).sum(1), words[whole:]]))


def combine(values: torch.Tensor) -> torch.Tensor:
    """Returns the checksum, an int64 scalar, of the int64 values [N]; it depends on the order of the values."""
    weights = torch.arange(values.numel(), dtype=torch.int64, device=values.device).mul_(2 * _SPREAD % 2**63).add_(_SPREAD)
    return (weights * values).sum()


def _words(flat: torch.Tensor) -> torch.Tensor:
    """Returns the bits of a flat tensor as int64 words. They are copied and padded with zeros if they do not start and end at word
    boundaries."""
    missing = -flat.numel() * flat.element_size() % 8
    if missing or flat.storage_offset() * flat.element_size() % 8:
        octets = flat.contiguous().clone().view(torch.uint8)
        return torch.nn.functional.pad(octets, (0, missing)).view(torch.int64)
    return flat.view(torch.int64)
