"""The points that a rank passes (`Monitor.at`), and the phase to which the time after each of them belongs."""

POINTS = {
    "fetch": "start",
    "load": "start",
    "verify": "start",
    "restore": "start",
    "data": "train",
    "forward": "train",
    "backward": "train",
    "bucket": "train",
    "reduce": "train",
    "agree": "train",
    "optimizer": "train",
    "discard": "discarded",
    "validate": "validation",
    "move": "balance",
    "moved": "balance",
    "write": "checkpoint",
    "commit": "checkpoint",
    "prune": "checkpoint",
    "replicate": "checkpoint",
    "mirror": "checkpoint",
    "publish": "checkpoint",
}
"""Point -> phase."""
