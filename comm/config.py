"""What a recipe says about communication. Free of torch, so that a wrong recipe is refused at once."""

from dataclasses import dataclass

from bagualu.comm.errors import RecipeError

AUTO = "auto"
"""The backend that fits the machine, chosen before workers start (trainer/choose_backend.py)."""


@dataclass
class CommConfig:
    """`comm.*` of a recipe."""

    backend: str = AUTO
    """gloo | nccl | simulated | auto: nccl where the workers have GPUs, else gloo | any name registered under the entry point group
    `bagualu.backends`."""
    device: str = "cpu"
    """Where the ranks of `simulated` have their tensors: cpu | cuda, one GPU for all of them. The other backends know their own."""
    timeout_seconds: float = 600.0
    """A collective that has not finished by then fails on every rank."""

    @property
    def on_cpu(self) -> bool:
        """Whether ranks surely have no accelerator; a vendor's backend may bring one, and `auto` may turn out as nccl."""
        return self.backend == "gloo" or (self.backend == "simulated" and self.device == "cpu")

    def validate(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise RecipeError(f"comm.device={self.device} is unknown; give cpu or cuda")
        if self.device != "cpu" and self.backend != "simulated":
            raise RecipeError(f"comm.device={self.device} is for comm.backend=simulated; comm.backend={self.backend} knows its own "
                              "device: leave comm.device out, or give comm.backend=nccl for one GPU a worker")  # fmt: skip
        if self.timeout_seconds <= 0:
            raise RecipeError(f"comm.timeout_seconds={self.timeout_seconds} must be positive, e.g. comm.timeout_seconds=600")
