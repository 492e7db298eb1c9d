"""The batch script: readable, quoted, and what it does on a real SLURM of two nodes on this machine (marker slurm)."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.layout.format import step_of
from bagualu.launch import cli
from bagualu.launch.verbs.slurm import script
from bagualu.trainer.recipe.compose import compose
from tests.standing import assert_names_rank_phase_and_cause

BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def script_of(*overrides):
    return script(compose(overrides), list(overrides))


def test_the_header_says_what_the_recipe_says():
    text = script_of("recipe=llama3_8b", "launch.nodes=16", "launch.slurm.partition=gpu",
                     "launch.slurm.directives=[--exclusive]", "launch.slurm.setup=[\"module load cuda\"]")  # fmt: skip
    for line in ("--nodes=16", "--ntasks-per-node=1", "--partition=gpu", "--gpus-per-node=8", "--time=24:00:00",
                 "--requeue", "--exclusive", "--job-name=bagualu-llama3_8b"):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    assert "\n    setup='module load cuda'; eval \"$setup\" || setup_failed $?\n" in text


@BASH
def test_each_start_of_a_job_has_a_secret_that_the_script_does_not_hold():
    text = script(compose(["recipe=tiny", "launch.nodes=2"]), ["recipe=tiny"])
    start = text.index("BAGUALU_SECRET=")
    lines = text[start : text.index("\n\n", start)] + "\nprintenv BAGUALU_SECRET"
    drawn = [subprocess.run(["bash", "-c", lines], capture_output=True, text=True).stdout.strip() for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in drawn)
    assert drawn[0] != drawn[1]


def test_overrides_reach_the_trainer_as_they_were_typed():
    odd = ["run.name=it", "data.source=\"/a b/$HOME/'x'\"", "parallel.balance=[3,1]", 'launch.slurm.setup=["true # a; b"]']
    text = script_of(*odd)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    words = words_of(text)
    assert words[:-2] == odd
    assert words[-1] == "checkpoint.resume=true"
    assert compose(words).data.source == "/a b/$HOME/'x'"


def words_of(text):
    """The overrides that a script gives to the agents."""
    call = text[text.index("exec ") : text.index("\n}\nexport")].replace("\\\n", " ")
    words = shlex.split(call)
    return words[words.index("--job") + 2 :]


def test_text_reaches_the_trainer_whatever_else_it_looks_like():
    odd = ["run.name=2024_01_01", "data.source=八卦炉/1e3", 'launch.slurm.setup=[true, 007, it\'s, "a, b"]', "data.cache=null"]
    recipe = compose(words_of(script_of(*odd)))
    assert (recipe.run.name, recipe.data.source, recipe.data.cache) == ("2024_01_01", "八卦炉/1e3", None)
    assert recipe.launch.slurm.setup == ["true", "007", "it's", "a, b"]


def test_a_time_in_a_value_is_that_of_the_submission_on_every_node(monkeypatch):
    monkeypatch.setenv("WHERE", "here, or there")
    typed = [
        "run.name=${oc.env:WHERE}",
        "run.seed=${train.steps}",
        "data.cache=/${run.name}",
        'launch.slurm.setup=["echo \\${HOME}"]',
    ]
    words = words_of(script_of(*typed, "run.dir=runs/${run.name}"))
    monkeypatch.delenv("WHERE")
    recipe = compose(words)
    assert (recipe.run.name, recipe.run.seed, recipe.data.cache) == ("here, or there", 300, "/here, or there")
    assert recipe.run.dir == str(Path.cwd() / "runs/here, or there")
    assert recipe.launch.slurm.setup == ["echo ${HOME}"]


@pytest.mark.parametrize(
    ("folder", "spelled"), [("50%", "50%%"), ("a%j", "a%%j"), ("%%", "%%%%"), ('a"b', 'a\\"b'), ("a b", "a b"), ("é#x", "é#x")]
)
def test_the_folder_of_the_log_is_no_pattern_of_slurms(tmp_path, folder, spelled):
    """As a SLURM of version 22.05 reads it: it was seen to write each of these where it belongs."""
    text = script_of(f"run.dir='{tmp_path}/{folder}'")
    assert f'#SBATCH --output="{tmp_path}/{spelled}/logs/slurm-%j.log"\n' in text
    assert compose(words_of(text)).run.dir == f"{tmp_path}/{folder}"


def test_a_folder_that_slurm_cannot_name_a_log_in_is_refused(capsys):
    assert cli.main(["slurm", "--print", "run.dir=a\\b"]) == 2
    assert "contains a backslash" in capsys.readouterr().err


def test_a_value_in_the_header_is_kept_together():
    assert '\n#SBATCH --account="a b"\n' in script_of("launch.slurm.account=a b")


@pytest.mark.parametrize(
    "override", ['launch.slurm.setup=["a\nb"]', 'run.name="x\nrm -rf y"', 'run.dir="x\ny"', 'launch.slurm.account="x\ny"']
)
def test_a_line_break_cannot_smuggle_a_command_in(capsys, override):
    assert cli.main(["slurm", "--print", override]) == 2
    assert "must be one line" in capsys.readouterr().err


def test_print_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["slurm", "recipe=llama3_8b", "launch.nodes=16", "--print"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_it_says_how_to_submit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cli.main(["slurm", f"run.dir={tmp_path}/run"]) == 0
    assert f"sbatch {tmp_path}/run/job.sbatch" in capsys.readouterr().err


def test_a_wrong_recipe_is_not_submitted(tmp_path):
    assert cli.main(["slurm", "recipe=llama3_8b", "launch.nodes=16", "parallel.tensor=3", f"run.dir={tmp_path}/run"]) == 2
    assert not (tmp_path / "run").exists()


CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
ReturnToService=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=3,bf_interval=3
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=cancelled Nodes=ALL State=UP PriorityTier=1 GraceTime=60 PreemptMode=CANCEL
PartitionName=short Nodes=ALL State=UP PriorityTier=1 DefaultTime=2
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


class Nodes:
    """The daemons of a SLURM of two nodes."""

    def __init__(self) -> None:
        self.daemons = {name: subprocess.Popen(command.split()) for name, command in COMMANDS.items()}

    def lose(self, job, node):
        """As when the machine has lost power, and SLURM has waited for it long enough."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for process in processes_of(job, node):
            with contextlib.suppress(psutil.Error):
                if (parent := process.parent()) and parent.name() == "slurmstepd":
                    parent.kill()
                process.kill()
        called("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def bring_back(self, node):
        self.daemons[node] = subprocess.Popen(COMMANDS[node].split())
        until(lambda: "DOWN" not in called("scontrol", "show", "node", node))


COMMANDS = {"slurmctld": "slurmctld -D", "n1": "slurmd -D -N n1", "n2": "slurmd -D -N n2"}


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A SLURM of two nodes, both this machine; SLURM_CONF names it."""
    sockets = [socket.create_server(("", 0)) for _ in range(3)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports, user=user, cpus=os.cpu_count()))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    nodes = Nodes()
    try:
        until(lambda: "2 " in called("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D %T"))
        yield nodes
    finally:
        for job in called("squeue", "-h", "-o", "%A").split():
            called("scancel", "--signal=KILL", "--full", job)
            called("scancel", job)
        time.sleep(1)
        for daemon in reversed(nodes.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def called(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def steps(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def submitted(capsys, *words):
    """The number of the job."""
    assert cli.main(["slurm", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["job"]


def processes_of(job, node):
    """What the job runs on the node."""
    found, wanted = [], {"SLURM_JOB_ID": job, "SLURMD_NODENAME": node, "SLURM_CONF": os.environ["SLURM_CONF"]}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if wanted.items() <= process.environ().items():
                found.append(process)
    return found


def agent_of(job, node):
    for process in processes_of(job, node):
        with contextlib.suppress(psutil.Error):
            if "bagualu.launch.node" in process.cmdline():
                return process
    raise AssertionError(f"job {job} has no agent on {node}")


def state(job, expected):
    """Whether the job is in a state that matches."""
    return re.search(f"JobState=({expected})", called("scontrol", "show", "job", job)) is not None


def log_of(folder, job):
    path = folder / "logs" / f"slurm-{job}.log"
    return path.read_text() if path.exists() else ""


SMALL = ["recipe=tiny_dense", "parallel.data=2", "parallel.pipeline=1", "launch.nodes=2", "launch.workers=1", "model.layers=2",
         "data.source=random", "train.validation_sequences=0", "train.steps=100000", "launch.threads=1"]  # fmt: skip
FIRST = 'launch.slurm.setup=["[ $SLURMD_NODENAME = n1 ] || sleep 3"]'
"""The first node holds the store: here, where both have one address, whoever comes first would."""


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_that_loses_an_agent_ends_with_the_cause_and_goes_on_when_it_is_submitted_again(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["recipe=tiny_dense", "parallel.data=2", "parallel.pipeline=1", "launch.nodes=2", "launch.workers=1", "model.layers=2",
             "data.source=random", "train.validation_sequences=0", "checkpoint.every=2", "restart.wait_seconds=5",
             f"run.dir={folder}"]  # fmt: skip
    job = submitted(capsys, *words, "train.steps=100000")
    until(lambda: len(steps(folder)) >= 5)
    agent_of(job, "n2").kill()
    until(lambda: "JobState=FAILED" in called("scontrol", "show", "job", job))
    said = (folder / "logs" / f"slurm-{job}.log").read_text().splitlines()
    last = next(line for line in reversed(said) if line.startswith("bagualu: "))
    assert_names_rank_phase_and_cause(last)
    assert "restart.wait_seconds=5" in last or "the node that holds the rendezvous store" in last  # either may have it: one machine
    end = len(steps(folder)) + 10
    job = submitted(capsys, *words, f"train.steps={end}", "checkpoint.resume=true")
    until(lambda: "JobState=COMPLETED" in called("scontrol", "show", "job", job))
    assert steps(folder) == list(range(1, end + 1))  # every step once


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_on_two_nodes_saves_requeues_goes_on_and_stops_with_75(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["recipe=moe_tiny", "parallel.tensor=2", "launch.nodes=2", "launch.workers=2", "train.steps=100000",
             "train.validation_sequences=0", "data.source=random", "model.layers=2", f"run.dir={folder}"]  # fmt: skip
    job = submitted(capsys, *words)
    until(lambda: len(steps(folder)) >= 3)
    called("scancel", "--batch", "--signal=USR1", job)  # what SLURM sends before the time limit
    until(lambda: "PENDING" in called("scontrol", "show", "job", job))
    saved = step_of(latest(folder / "checkpoints"))
    called("scontrol", "update", f"jobid={job}", "starttime=now+5")  # slurmd refuses a job it killed within the same second

    until(lambda: steps(folder)[-1] >= saved + 3)
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))  # every step once: it went on where it had stopped
    called("scancel", "--batch", "--signal=TERM", job)  # what SLURM sends when it takes the nodes away
    until(lambda: re.search("JobState=(FAILED|COMPLETED)", called("scontrol", "show", "job", job)))
    assert "ExitCode=75:0" in called("scontrol", "show", "job", job)
    assert step_of(latest(folder / "checkpoints")) == steps(folder)[-1]


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_an_elastic_job_outlives_the_loss_of_a_node_and_has_all_nodes_again_after_a_requeue(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, FIRST, "restart.elastic=true", "restart.wait_seconds=2", "restart.backoff_seconds=0",
                    "checkpoint.every=2", f"run.dir={folder}")  # fmt: skip
    until(lambda: len(steps(folder)) >= 5)
    two_nodes.lose(job, "n2")
    until(lambda: "going on with 1 ranks of 1 workers" in log_of(folder, job))
    reached = steps(folder)[-1]
    until(lambda: steps(folder)[-1] >= reached + 3)
    two_nodes.bring_back("n2")
    until(lambda: "does not grow back" in log_of(folder, job), 180)
    assert state(job, "RUNNING")
    called("scancel", "--batch", "--signal=USR1", job)  # what the log says
    until(lambda: state(job, "PENDING"))
    reached = steps(folder)[-1]
    called("scontrol", "update", f"jobid={job}", "starttime=now+5")
    until(lambda: steps(folder)[-1] >= reached + 3)
    assert "NumNodes=2" in called("scontrol", "show", "job", job)
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_on_one_node_of_two_that_lost_the_other_is_completed_at_its_end(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, FIRST, "restart.elastic=true", "restart.wait_seconds=2", "restart.backoff_seconds=0",
                    "train.steps=60", "checkpoint.every=2", f"run.dir={folder}")  # fmt: skip
    until(lambda: len(steps(folder)) >= 5)
    two_nodes.lose(job, "n2")
    until(lambda: state(job, "COMPLETED|FAILED|CANCELLED|NODE_FAIL"))
    assert state(job, "COMPLETED"), log_of(folder, job)
    assert steps(folder) == list(range(1, 61))


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_that_loses_its_first_node_and_the_script_with_it_goes_back_into_the_queue(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, FIRST, "restart.elastic=true", "restart.wait_seconds=2", "restart.backoff_seconds=0",
                    "checkpoint.every=2", f"run.dir={folder}")  # fmt: skip
    until(lambda: len(steps(folder)) >= 5)
    two_nodes.lose(job, "n1")
    until(lambda: state(job, "PENDING"))
    assert "Restarts=1" in called("scontrol", "show", "job", job)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_limit_of_two_minutes_leaves_time_for_steps_and_for_the_save_and_the_job_goes_on(two_nodes, tmp_path, capsys):
    """The limit is the partition's: nothing in the recipe says it."""
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, "launch.slurm.partition=short", f"run.dir={folder}")
    until(lambda: steps(folder) and state(job, "PENDING|FAILED|TIMEOUT|COMPLETED"), 240)
    assert state(job, "PENDING"), log_of(folder, job)
    assert "the run is asked to save and stop" in log_of(folder, job)
    assert step_of(latest(folder / "checkpoints")) == steps(folder)[-1] >= 3


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_job_whose_time_is_up_before_its_first_step_does_not_come_back(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, "launch.slurm.time=1", 'launch.slurm.setup=["sleep 300"]', f"run.dir={folder}")
    until(lambda: state(job, "FAILED|COMPLETED|TIMEOUT"))
    assert "ExitCode=76:0" in called("scontrol", "show", "job", job)
    last = [line for line in log_of(folder, job).splitlines() if line.startswith("bagualu: ")][-1]
    assert_names_rank_phase_and_cause(last)
    assert "gained no step" in last


@pytest.mark.slurm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("words", "end"),
    [(["launch.slurm.partition=main"], "PENDING"), (["launch.slurm.partition=cancelled"], "PENDING"),
     (["launch.slurm.partition=main", "launch.slurm.requeue=false"], "FAILED")],
)  # fmt: skip
def test_a_preempted_job_saves_and_comes_back_unless_told_otherwise(two_nodes, tmp_path, capsys, words, end):
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, *words, "launch.slurm.directives=[--exclusive]", f"run.dir={folder}")
    until(lambda: len(steps(folder)) >= 3)
    urgent = called(
        "sbatch", "--parsable", "--output=/dev/null", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 20"
    ).strip()
    until(lambda: state(urgent, "RUNNING|COMPLETED"))
    until(lambda: state(job, f"{end}|FAILED|CANCELLED|PREEMPTED"))
    assert state(job, end), log_of(folder, job)
    assert step_of(latest(folder / "checkpoints")) == steps(folder)[-1]


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_setup_line_that_fails_on_one_node_ends_the_job_at_once_with_its_text(two_nodes, tmp_path, capsys):
    folder = tmp_path / "run"
    line = "[ $SLURMD_NODENAME = n1 ] || source /no/such/file"
    job = submitted(capsys, *SMALL, f'launch.slurm.setup=["{line}"]', f"run.dir={folder}")
    until(lambda: state(job, "FAILED|COMPLETED"))
    assert "ExitCode=78:0" in called("scontrol", "show", "job", job)
    assert f"bagualu: failed: no single rank, setup of node n2: exit code 1 of `{line}`; " in log_of(folder, job)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_workers_have_their_cores_and_the_environment_whatever_srun_inherits_and_scancel_leaves_no_error_of_ours(
    two_nodes, tmp_path, capsys
):
    cores = min(2, os.cpu_count() or 1)
    folder = tmp_path / "run"
    job = submitted(capsys, *SMALL, f"launch.slurm.cpus_per_task={cores}", "launch.slurm.directives=[--export=NONE]",
                    "launch.affinity=false", f"run.dir={folder}")  # fmt: skip
    until(lambda: len(steps(folder)) >= 3)
    for node in ("n1", "n2"):
        agent = agent_of(job, node)
        assert {len(process.cpu_affinity()) for process in (agent, *agent.children(recursive=True))} == {cores}
    called("scancel", job)
    until(lambda: state(job, "CANCELLED"))
    assert "scancel: error" not in log_of(folder, job)
    assert "scontrol" not in log_of(folder, job)


@pytest.mark.slurm
def test_srun_without_torchrun_names_the_command_to_use(two_nodes, tmp_path):
    command = ["srun", "--ntasks=2", sys.executable, "-m", "bagualu.trainer", "parallel.data=2", f"run.dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("bagualu: error: ") == 1
    assert "bagualu slurm launch.nodes=" in done.stderr
