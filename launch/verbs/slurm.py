"""`bagualu slurm`: writes a readable batch script for a recipe and submits it."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import JOB_SCRIPT_BEGINS, RunDirectory
from bagualu.launch.batch import setup_lines
from bagualu.launch.verbs.command_line import SEVERAL, CommandLine
from bagualu.trainer.process.failure import DONE, FAILED
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import as_dict, compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.keys import keys
from bagualu.trainer.recipe.override_text import typed

_PORT = 29400
_NO_KILL = "--no-kill"
"""Option of sbatch that keeps the job running after SLURM has lost a node. Without it, srun kills the agents of the other nodes."""


def slurm(request: CommandLine) -> tuple[int, Any]:
    """Write the script of a recipe into the run directory and submit it, if this machine has sbatch; with --print, only print it.
    Returns the exit code and the object that --json prints. Raises RecipeError."""
    recipe = compose(request.overrides, SEVERAL[request.verb])
    _check(recipe)
    text = script(recipe, request.overrides)
    if request.print_script:
        if not request.json:
            print(text, end="")
        return DONE, {"script": text}
    run = RunDirectory(recipe.run.dir)
    run.logs.mkdir(parents=True, exist_ok=True)
    path = run.job_script
    path.write_text(text, encoding="utf-8")
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        print(f"written {path}; this machine has no sbatch, submit it on one that has: sbatch {shlex.quote(str(path))}",
              file=sys.stderr)  # fmt: skip
        return DONE, {"script": str(path), "job": None}
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"bagualu: failed: sbatch refused {path}: {reason}; correct launch.slurm.* and try again", file=sys.stderr)
        return FAILED, {"script": str(path), "job": None, "cause": reason}
    job = done.stdout.strip().split(";")[0]
    if not request.json:
        print(f"submitted {path} as job {job}; its output goes to {run.job_log(job)}")
    return DONE, {"script": str(path), "job": job}


def _check(recipe: Recipe) -> None:
    workers, gpus = preflight.workers_per_node(recipe), recipe.launch.slurm.gpus_per_node
    if recipe.comm.backend == "nccl" and gpus is not None and gpus < workers:
        raise RecipeError(f"launch.slurm.gpus_per_node={gpus} are fewer than the {workers} workers of a node, and "
                          f"comm.backend=nccl needs one each; give launch.slurm.gpus_per_node={workers}")  # fmt: skip
    preflight.check(recipe, recipe.world_size())
    preflight.check_run_directory(recipe)
    if recipe.comm.backend == "simulated":
        raise RecipeError("comm.backend=simulated runs in one process; use bagualu train, or comm.backend=nccl or gloo here")
    slurm = recipe.launch.slurm
    if "\\" in str(Path(recipe.run.dir).absolute()):
        raise RecipeError(f"run.dir={recipe.run.dir} contains a backslash, and SLURM then does not put the job's number into "
                          "the name of its log; give another run.dir")  # fmt: skip
    header = [slurm.partition, slurm.account, slurm.time, *slurm.directives]
    for line in [*header, *slurm.setup, recipe.run.dir, recipe.run.name]:
        if line is not None and "\n" in line:
            raise RecipeError(f'{line!r} must be one line; give a list, e.g. launch.slurm.setup=["module load cuda"]')
    for directive in recipe.launch.slurm.directives:
        if not directive.startswith("-"):
            raise RecipeError(f"launch.slurm.directives: {directive!r} is not an option, and sbatch would ignore it; give it "
                              "without #SBATCH, e.g. --exclusive")  # fmt: skip
        if directive == "--no-requeue":
            raise RecipeError("launch.slurm.directives: --no-requeue alone does not stop the script from requeueing the job; "
                              "give launch.slurm.requeue=false")  # fmt: skip
    setup_lines.check(recipe.launch.slurm.setup)


def script(recipe: Recipe, overrides: list[str]) -> str:
    """Returns the batch script. The run that it starts has checkpoint.resume=true: it starts from step 0 if there is no
    checkpoint."""
    folder = Path(recipe.run.dir).absolute()
    own = [text for text in overrides if not re.match(r"(checkpoint\.resume|run\.dir)=", text)]
    arguments = [*(_settled(text, recipe) for text in own), f"run.dir={typed(str(folder))}", "checkpoint.resume=true"]
    slurm = recipe.launch.slurm
    run = RunDirectory(folder)
    header = _HEADER.format(
        begins=JOB_SCRIPT_BEGINS,
        name=recipe.run.name,
        command=shlex.join(["bagualu", "slurm", *overrides]).replace("\n", " "),
        directives="\n".join(f"#SBATCH {directive}" for directive in _directives(recipe, folder)),
        ledger=shlex.quote(str(run.ledger)),
        metrics=shlex.quote(str(run.metrics)),
        logs=shlex.quote(str(run.logs)),
        no_kill=_NO_KILL if recipe.restart.elastic else "",
        requeue="yes" if slurm.requeue else "no",
        setup=setup_lines.shell(slurm.setup),
        python=shlex.quote(sys.executable),
        port=recipe.launch.port or f"$(({_PORT} + SLURM_JOB_ID % 10000))",
        overrides=" \\\n        ".join(map(shlex.quote, arguments)),
    )
    return header + (files("bagualu.launch.batch") / "job.sh").read_text(encoding="utf-8")


def _settled(override: str, recipe: Recipe) -> str:
    """Returns an override of a key with ${...} in its value replaced by what it stands for now, so that it is the same on all nodes
    and in all starts of the job. Other overrides are returned unchanged."""
    key, _, value = override.partition("=")
    if "${" not in value or key.lstrip("+") not in keys():
        return override
    section: Any = as_dict(recipe)
    for name in key.lstrip("+").split("."):
        section = section[name]
    return f"{key}={typed(section)}"


def _header_value(text: str) -> str:
    """Returns `text` as a value in the header of a batch script, quoted if needed."""
    escaped = re.sub(r'(["\\])', r"\\\1", text)
    return text if re.fullmatch(r"[A-Za-z0-9_./:,@+=-]*", text) else f'"{escaped}"'


def _directives(recipe: Recipe, folder: Path) -> list[str]:
    slurm = recipe.launch.slurm
    log = _header_value(str(RunDirectory(str(folder).replace("%", "%%")).job_log("%j")))  # %% is a plain % for SLURM
    options = {
        "partition": slurm.partition, "account": slurm.account, "time": slurm.time,
        "gpus-per-node": slurm.gpus_per_node, "cpus-per-task": slurm.cpus_per_task,
    }  # fmt: skip
    return [
        "--job-name=bagualu-" + re.sub(r"[^A-Za-z0-9._-]+", "_", recipe.run.name),
        f"--nodes={recipe.launch.nodes}",
        "--ntasks-per-node=1",
        f"--output={log}",
        "--open-mode=append",
        "--requeue" if slurm.requeue else "--no-requeue",
        *([_NO_KILL] if recipe.restart.elastic else []),
        *(f"--{name}={_header_value(str(value))}" for name, value in options.items() if value is not None),
        *slurm.directives,
    ]


_HEADER = """\
{begins}{name}, written by: {command}
{directives}

# The agents of this start sign their messages with this secret. It is only in the environment, not in this file.
BAGUALU_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export BAGUALU_SECRET

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export head=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export port={port}
ledger={ledger} metrics={metrics} logs={logs}
export no_kill={no_kill} requeue={requeue}

# One agent on every node starts the workers there; the agents meet on the first node.
start_agent() {{
    exec {python} -m bagualu.launch.node \\
        --meet "$head:$port" --id "$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" --job "$SLURM_JOB_ID" \\
        {overrides}
}}
export -f start_agent

agent() {{
    asked_to_stop=
    trap asked_to_stop=yes TERM USR1  # the agent process receives the signal too
{setup}    if [ -n "$asked_to_stop" ]; then exit 75; fi
    (start_agent) || agent_ended $?
    agent_ended 0
}}
export -f agent

"""
