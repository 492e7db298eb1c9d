"""A checksum that reads a tensor once, at memory bandwidth, on whatever device it lies.

The tensor's bits are 64-bit words in rows; the rows' sums are weighted with odd numbers and added up, modulo 2^64. One flipped bit
changes a row's sum by a power of two, and an odd number times that is never zero: it is always seen. So are several, unless they
cancel within a row or by a chance of 2^-64. It finds errors, not forgeries: checkpoints have a stronger hash.
"""

import torch

_ROW_WORDS = 512
_SPREAD = 0x5851F42D4C957F2D
"""An odd 63-bit number (Knuth's multiplier for 64-bit congruential generators): rows get weights that differ in all digits."""


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit integer, as a scalar tensor on the tensor's device, of the bits of a contiguous tensor of any dtype."""
    words = _words(tensor.detach().reshape(-1))
    whole = words.numel() // _ROW_WORDS * _ROW_WORDS
    return combine(torch.cat([words[:whole].view(-1, _ROW_WORDS).sum(1), words[whole:]]))


def combine(values: torch.Tensor) -> torch.Tensor:
    """One 64-bit integer of several [N], in their order."""
    weights = torch.arange(values.numel(), dtype=torch.int64, device=values.device).mul_(2 * _SPREAD % 2**63).add_(_SPREAD)
    return (weights * values).sum()


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The bits of a flat tensor as int64; filled up with zeros, in a copy, when they are no whole number of words."""
    missing = -flat.numel() * flat.element_size() % 8
    if missing or flat.storage_offset() * flat.element_size() % 8:
        octets = flat.contiguous().clone().view(torch.uint8)
        return torch.nn.functional.pad(octets, (0, missing)).view(torch.int64)
    return flat.view(torch.int64)
