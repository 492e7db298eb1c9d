"""The communication settings of a recipe."""

from dataclasses import dataclass

from bagualu.comm.errors import RecipeError

AUTO = "auto"
"""Value of `comm.backend` that stands for the backend that fits the machine; it is replaced before workers start
(trainer/recipe/choose_backend.py)."""


@dataclass
class CommConfig:
    """`comm.*` of a recipe."""

    backend: str = AUTO
    """gloo | nccl | simulated | auto: nccl where the workers have GPUs, else gloo | any name registered under the entry point group
    `bagualu.backends`."""
    device: str = "cpu"
    """Device of the ranks of the backend `simulated`: cpu | cuda, where all ranks share one GPU. Every other backend determines its
    own device."""
    timeout_seconds: float = 600.0
    """Seconds after which an unfinished communication between ranks, or an unfinished attempt to connect them, fails."""

    @property
    def on_cpu(self) -> bool:
        """Whether the ranks certainly use no accelerator. False for `auto`, which may become nccl, and for a backend of another
        package, which may use an accelerator."""
        return self.chip == "cpu"

    @property
    def chip(self) -> str | None:
        """The type of the ranks' device, cpu or cuda; None for `auto` and for a backend of another package."""
        return self.device if self.backend == "simulated" else {"gloo": "cpu", "nccl": "cuda"}.get(self.backend)

    def validate(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise RecipeError(f"comm.device={self.device} is unknown; give cpu or cuda")
        if self.device != "cpu" and self.backend != "simulated":
            raise RecipeError(f"comm.device={self.device} applies only to comm.backend=simulated; comm.backend={self.backend} has "
                              "its own device: leave comm.device out, or give comm.backend=nccl for a GPU per worker")  # fmt: skip
        if self.timeout_seconds <= 0:
            raise RecipeError(f"comm.timeout_seconds={self.timeout_seconds} must be positive, e.g. comm.timeout_seconds=600")
