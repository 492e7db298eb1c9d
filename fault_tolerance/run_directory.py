"""Names every file and folder that a run leaves in its directory."""

from pathlib import Path

MODEL, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
"""Names that Hugging Face gives to the files of a model: its configuration; how texts are generated; its tokenizer; special tokens,
and perhaps a chat template; a chat template in a file of its own."""

BEGUN = "begun"
"""Name of a file in a launch's scratch folder. The file exists once workers of this launch have taken over the run's folder of
checkpoints."""


JOB_SCRIPT_BEGINS = "#!/bin/bash\n# Bagualu run "
"""The first bytes of `job_script`, by which the folder of a job that has not started yet is recognised."""


class RunDirectory:
    """The paths in the run directory `path`. The constructor neither creates nor reads anything."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """File with the resolved recipe."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """File with the tokenizer of the run's text; none if its tokens stand for no text. Beside it lie the files that belong to
        it, by the names above, if the tokenizer was given and has them."""
        return self.path / TOKENIZER

    @property
    def metrics(self) -> Path:
        """File with a line of JSON for each step (trainer/output/metric_writers.py)."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """File that describes how the latest start ended (trainer/output/summary.py)."""
        return self.path / "summary.json"

    @property
    def ledger(self) -> Path:
        """File with the times at which the run's activities began (fault_tolerance/ledger)."""
        return self.path / "ledger.jsonl"

    @property
    def operators(self) -> Path:
        """File with the variants by which the run computes its operators (trainer/operators/choice.py)."""
        return self.path / "operators.json"

    @property
    def pipeline(self) -> Path:
        """File with the times of the forward and backward passes of one step (trainer/output/pipeline_timeline.py)."""
        return self.path / "pipeline.jsonl"

    @property
    def faults(self) -> Path:
        """File with the planned faults that have struck (fault_tolerance/injection)."""
        return self.path / "faults.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints (fault_tolerance/checkpoint)."""
        return self.path / "checkpoints"

    @property
    def hugging_face(self) -> Path:
        """The folder with configuration and tokenizer of the model of Hugging Face that the run began with (trainer/conversion)."""
        return self.path / "hugging_face"

    @property
    def logs(self) -> Path:
        """The folder with the output of the ranks and of the batch job."""
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        """File that the job that uses the directory locks (run_lock.py)."""
        return self.path / ".lock"

    @property
    def secret(self) -> Path:
        """File with the secret that the agents of several nodes use to sign their messages (launch/workers/secret.py)."""
        return self.path / ".secret"

    @property
    def wandb_id(self) -> Path:
        """File with the id of the run in Weights & Biases."""
        return self.path / "wandb-id"

    @property
    def job_script(self) -> Path:
        """The script that was submitted to SLURM (launch/verbs/slurm.py)."""
        return self.path / "job.sbatch"

    def job_log(self, job: str) -> Path:
        """Returns the path of the output of a SLURM job, given its number or SLURM's pattern for it (%j)."""
        return self.logs / f"slurm-{job}.log"

    def log(self, rank: int) -> Path:
        """Returns the path of the file with the output of `rank`."""
        return self.logs / f"rank-{rank}.log"

    def has_begun(self) -> bool:
        """Returns whether the run has completed steps, that is, whether metrics.jsonl is not empty. Raises OSError."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0
