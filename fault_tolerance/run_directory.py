"""The files and folders of a run, each by its name: everything that a run leaves in its directory is listed here."""

from pathlib import Path

BEGUN = "begun"
"""File of a launch's scratch folder: workers of this launch have opened the run's checkpoints."""


class RunDirectory:
    """The paths in the run directory `path`; nothing is created or read by making one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line for each step (trainer/output/metric_writers.py)."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """How the latest start ended (trainer/output/summary.py)."""
        return self.path / "summary.json"

    @property
    def ledger(self) -> Path:
        """When the run began to do what (fault_tolerance/ledger)."""
        return self.path / "ledger.jsonl"

    @property
    def pipeline(self) -> Path:
        """The passes of one step (trainer/output/pipeline_timeline.py)."""
        return self.path / "pipeline.jsonl"

    @property
    def faults(self) -> Path:
        """The planned faults that have struck (fault_tolerance/injection)."""
        return self.path / "faults.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints (fault_tolerance/checkpoint)."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """The folder of the ranks' and the batch job's output."""
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        """Locked by the job that uses the directory (run_lock.py)."""
        return self.path / ".lock"

    @property
    def secret(self) -> Path:
        """With which the agents of several nodes sign their messages (launch/workers/secret.py)."""
        return self.path / ".secret"

    @property
    def wandb_id(self) -> Path:
        """The id of the run in Weights & Biases."""
        return self.path / "wandb-id"

    @property
    def job_script(self) -> Path:
        """The script that was submitted to SLURM (launch/verbs/slurm.py)."""
        return self.path / "job.sbatch"

    def job_log(self, job: str) -> Path:
        """The output of a SLURM job, by its number or SLURM's pattern for that."""
        return self.logs / f"slurm-{job}.log"

    def log(self, rank: int) -> Path:
        """The output of a rank."""
        return self.logs / f"rank-{rank}.log"

    def has_begun(self) -> bool:
        """Whether steps were done, so that there are checkpoints somewhere: judged by what a run writes after it has taken them.
        Raises OSError."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0
