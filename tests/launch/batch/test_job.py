"""The batch script with stand-ins for SLURM's commands and for the agent: what is asked of SLURM, and how the job ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest

from bagualu.launch.verbs.slurm import script
from bagualu.trainer.recipe.compose import compose
from tests.standing import assert_names_rank_phase_and_cause

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

SCONTROL = """\
echo "scontrol $*" >> "$STAND/calls"
case "$*" in
    "show hostnames"*) echo "$3" ;;
    "show node"*) echo "   NodeAddr=127.0.0.1 NodeHostName=n1" ;;
    "-o show job 7") cat "$STAND/job" ;;
esac
"""
SCANCEL = """\
echo "scancel $*" >> "$STAND/calls"
if [ "$1" = --signal=TERM ]; then kill -TERM -- "-$(cat "$STAND/agent")"; fi
"""
SRUN = """\
echo "srun $*" >> "$STAND/calls"
export SLURM_NODEID=${NODE:-0} SLURMD_NODENAME=n1
setsid bash -c 'echo $$ > "$STAND/agent"; exec "$@"' start "${@: -3}"
code=$?
exit "${SRUN_CODE:-$code}"
"""
AGENT = """\
env > "$STAND/environment"
trap 'echo "$SAVED" >> "$STAND/run/ledger.jsonl"; exit "$CODE"' TERM
echo begun >> "$STAND/begun"
if [ "$STAYS" = yes ]; then for i in {1..300}; do sleep 0.1; done; fi
exit "$CODE"
"""
_PAUSE = "    sleep 5 &\n"
SAVED = '{{"what": "saved", "wall": 1.5, "step": {step}, "seconds": {seconds}}}'
RUNNING = (
    "JobId=7 JobName=x JobState={state} Reason={reason} NumNodes={nodes} NodeList={node_list} EndTime={end} Deadline=N/A "
    "PreemptTime={preempted} \n"
)


class Job:
    """A job that SLURM says of what `says` was given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "bin").mkdir()
        (self.run / "logs").mkdir(parents=True)
        for name, text in (("scontrol", SCONTROL), ("scancel", SCANCEL), ("srun", SRUN), ("agent", AGENT)):
            path = folder / "bin" / name
            path.write_text("#!/bin/bash\n" + text)
            path.chmod(0o755)
        (folder / "calls").touch()
        self.says()

    def says(self, state="RUNNING", reason="None", nodes=1, node_list="n1", seconds_left=None, preempted="None") -> None:
        end = "Unknown"
        if seconds_left is not None:
            end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds_left))
        text = RUNNING.format(state=state, reason=reason, nodes=nodes, node_list=node_list, end=end, preempted=preempted)
        (self.folder / "job").write_text(text)

    def start(self, *overrides, code=0, stays=False, saves=None, **variables) -> subprocess.Popen:
        words = ["recipe=tiny", f"run.dir={self.run}", *overrides]
        environment = {
            **os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "STAND": str(self.folder), "CODE": str(code),
            "STAYS": "yes" if stays else "no", "SAVED": SAVED.format(step=saves, seconds=0.5) if saves else "",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", **variables,
        }  # fmt: skip
        (self.folder / "job.sbatch").write_text(_looking_often(script(compose(words), words)))
        return subprocess.Popen(
            ["bash", self.folder / "job.sbatch"], env=environment, text=True, stderr=(self.folder / "said").open("w")
        )

    def ends(self, *overrides, **options) -> tuple[int, str]:
        """Exit code and what it says."""
        job = self.start(*overrides, **options)
        return job.wait(60), self.said

    def signal_agents(self) -> None:
        """Sends SIGTERM to every process of the step, as SLURM does."""
        os.killpg(int((self.folder / "agent").read_text()), signal.SIGTERM)

    def calls(self, command: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(command)]

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    @property
    def begun(self) -> bool:
        return (self.folder / "begun").exists()


def _looking_often(text: str) -> str:
    """The script with a shorter pause between two looks at the job: what tests time out for is its end, not that pause."""
    assert text.count(_PAUSE) == 1
    return text.replace(_PAUSE, "    sleep 0.2 &\n")


@pytest.fixture
def job(tmp_path, monkeypatch):
    made = Job(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "agent"))
    return made


def test_what_ends_well_ends_the_job(job):
    assert job.ends() == (0, "")
    assert job.calls("scancel") == job.calls("scontrol requeue") == []
    assert list((job.run / "logs").iterdir()) == []


def test_before_its_end_the_job_asks_the_run_to_stop_and_goes_back_into_the_queue(job):
    job.says(seconds_left=2)
    code, said = job.ends(code=75, stays=True, saves=3)
    assert code == 75
    assert "the run is asked to save and stop" in said
    assert job.calls("scancel") == ["scancel --signal=TERM 7"]
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"]


def test_a_job_that_has_gained_no_step_does_not_go_back_into_the_queue(job):
    job.says(seconds_left=2)
    (job.run / "ledger.jsonl").write_text(SAVED.format(step=3, seconds=0.5) + "\n")
    code, said = job.ends(code=75, stays=True, saves=3)
    assert code == 76
    assert_names_rank_phase_and_cause(said.splitlines()[-1])
    assert "gained no step" in said
    assert "launch.slurm.time" in said
    assert job.calls("scontrol requeue") == []


@pytest.mark.parametrize("code", [75, 143])
def test_a_preempted_job_goes_back_into_the_queue(job, code):
    job.says(preempted="2026-01-01T10:00:00")
    assert job.ends(code=code)[0] == 75
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"]


def test_so_does_one_that_was_preempted_before_its_agents_had_begun(job):
    """srun itself then ends with 143, and no agent has said how the run ended."""
    job.says(preempted="2026-01-01T10:00:00")
    assert job.ends(NODE="1", SRUN_CODE="143")[0] == 143
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"]


def test_so_does_a_job_that_saves_after_slurm_has_ended_it_for_its_time_limit(job):
    job.says(state="COMPLETING", reason="TimeLimit")
    running = job.start(code=75, stays=True, saves=3)
    _until(lambda: job.begun)
    job.signal_agents()
    running.wait(60)
    assert job.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.parametrize("says", [{"seconds_left": 2}, {"preempted": "2026-01-01T10:00:00", "seconds_left": 2}])
def test_without_launch_slurm_requeue_a_job_just_ends(job, says):
    job.says(**says)
    code, _ = job.ends("launch.slurm.requeue=false", code=75, stays=True, saves=3)
    assert code == 75
    assert job.calls("scontrol requeue") == []
    text = (job.folder / "job.sbatch").read_text()
    assert "\n#SBATCH --no-requeue\n" in text
    assert "#SBATCH --requeue" not in text


@pytest.mark.parametrize("code", [0, 1, 2, 76, 137])
def test_a_job_that_did_not_stop_does_not_go_back_into_the_queue(job, code):
    job.says(preempted="2026-01-01T10:00:00")
    assert job.ends(code=code)[0] == code
    assert job.calls("scontrol requeue") == []


def test_a_job_that_is_cancelled_asks_nothing_of_slurm_and_does_not_come_back(job):
    running = job.start(code=75, stays=True, saves=3)
    _until(lambda: job.begun)
    job.says(state="COMPLETING")
    running.send_signal(10)  # the warning, cut off by scancel
    running.send_signal(15)
    job.signal_agents()  # SLURM signals the agents too
    running.wait(60)
    said = job.said
    assert running.returncode == 75
    assert said.replace("Terminated\n", "") == ""  # which bash says of what a line has started
    assert job.calls("scancel") == job.calls("scontrol requeue") == []


def test_what_slurm_sends_to_the_batch_shell_of_a_running_job_reaches_the_agents(job):
    running = job.start(code=75, stays=True, saves=3)
    _until(lambda: job.begun)
    running.send_signal(15)
    running.wait(60)
    assert running.returncode == 75
    assert job.calls("scancel") == ["scancel --signal=TERM 7"]
    assert job.calls("scontrol requeue") == []


def test_without_an_answer_of_scontrol_the_run_goes_on(job):
    (job.folder / "job").unlink()
    assert job.ends()[0] == 0


def test_the_end_of_the_run_counts_and_not_that_of_an_agent_that_it_went_on_without(job):
    assert job.ends("restart.elastic=true", SRUN_CODE="137")[0] == 0


def test_the_loss_of_a_node_ends_neither_the_job_nor_srun_and_the_log_says_what_follows(job):
    running = job.start("restart.elastic=true", stays=True, SLURM_JOB_NUM_NODES="2")
    _until(lambda: job.begun and "grow back" in job.said)
    job.signal_agents()
    running.wait(60)
    said = job.said
    assert running.returncode == 0
    assert "SLURM has taken nodes from this job, which has 1 left" in said
    assert "does not grow back" in said
    assert "scancel --batch --signal=USR1 7" in said
    assert " --kill-on-bad-exit=0 --no-kill " in job.calls("srun")[0]
    assert "\n#SBATCH --no-kill\n" in (job.folder / "job.sbatch").read_text()


@pytest.mark.parametrize(("requeue", "call"), [("true", "scontrol requeue 7"), ("false", "scancel 7")])
@pytest.mark.parametrize("srun_lives", [False, True])
def test_a_job_that_lost_its_first_node_and_so_its_script_is_ended_by_another_node(job, requeue, call, srun_lives):
    job.says(node_list="n2")
    with socket.create_server(("127.0.0.1", 0)) as srun:
        port = srun.getsockname()[1]
        if not srun_lives:
            srun.close()
        variables = {"NODE": "1", "SLURM_SRUN_COMM_HOST": "127.0.0.1", "SLURM_SRUN_COMM_PORT": str(port)}
        code, _ = job.ends("restart.elastic=true", f"launch.slurm.requeue={requeue}", code=1, **variables)
    assert code == 1
    assert (call in job.calls("sc")) != srun_lives


def test_a_run_that_is_not_elastic_ends_with_a_node(job):
    job.ends()
    assert "--no-kill" not in job.calls("srun")[0]
    assert "#SBATCH --no-kill" not in (job.folder / "job.sbatch").read_text()


def test_srun_is_given_what_it_does_not_inherit(job):
    assert job.ends(SLURM_CPUS_PER_TASK="6", SLURM_EXPORT_ENV="NONE")[0] == 0
    assert " --export=ALL " in job.calls("srun")[0]
    assert " --cpus-per-task=6 " in job.calls("srun")[0]


@pytest.mark.parametrize(
    ("line", "code"),
    [("false", 1), ("no_such_command_at_all", 127), ("source /no/such/file", 1), ("exit 3", 3), ("exit 0", 0), ("return 5", 5),
     ("cd /no/such/folder && true", 1), ("(exit 4)", 4), ("f() { return 6; }; f", 6), ("exit 75", 75)],
)  # fmt: skip
def test_a_setup_line_that_fails_ends_the_job_with_its_text(job, line, code):
    ended, said = job.ends(f'launch.slurm.setup=["true", "{line}", "true"]')
    last = said.splitlines()[-1]
    assert ended == 78
    assert_names_rank_phase_and_cause(last)
    assert last.startswith(f"bagualu: failed: no single rank, setup of node n1: exit code {code} of `{line}`; ")
    assert job.calls("scancel") == ["scancel --signal=TERM 7"]  # the agents of the other nodes
    assert not job.begun


def test_a_setup_line_that_may_fail_and_what_lines_do_stays_done(job, tmp_path):
    activate = tmp_path / "activate"
    activate.write_text('false\n[ -n "$NEVER" ] && echo no\nexport SOURCED=yes\n')
    lines = [
        f"source {activate}", "false || true", "yes | head -n 1 > /dev/null", "f() {", "false", "export MADE=$1", "}", "f here",
        "declare -x DECLARED='a b'", "set -u", "if true; then", "export SEEN=1", "fi", f"cd {tmp_path}", "# false", "",
    ]  # fmt: skip
    listed = ", ".join('"' + line.replace('"', '\\"') + '"' for line in lines)
    assert job.ends(f"launch.slurm.setup=[{listed}]") == (0, "")
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"SOURCED=yes", "MADE=here", "DECLARED=a b", "SEEN=1", f"PWD={tmp_path}"} <= set(environment)


def test_a_job_that_is_stopped_during_its_setup_has_lost_nothing(job):
    running = job.start(f'launch.slurm.setup=["touch {job.folder}/begun; sleep 30"]')
    _until(lambda: job.begun)
    running.send_signal(15)
    running.wait(60)
    said = job.said
    assert running.returncode == 75
    assert said.replace("Terminated\n", "") == ""  # which bash says of what a line has started


@pytest.mark.parametrize(
    ("seconds", "saves", "steps", "lead"),
    [
        (24 * 3600, [], [], 300),  # nothing is measured yet: 5 minutes
        (120, [], [], 30),  # or a quarter of the time
        (60, [], [], 15),
        (24 * 3600, [0.4], [0.2], 60),  # measured: at least a minute, or an eighth of the time
        (120, [0.4], [0.2], 19),
        (24 * 3600, [40.5, 100.2, 30], [9.5], 15 + 2 * (101 + 10)),  # the longest of the last saves
        (24 * 3600, [500], [], 15 + 2 * 501),  # longer than 5 minutes
        (120, [100], [3], 60),  # no more than half of the time
    ],
)
def test_the_lead_fits_the_time_limit_and_the_measured_time_of_a_save(tmp_path, seconds, saves, steps, lead):
    lines = [SAVED.format(step=number, seconds=save) for number, save in enumerate(saves, 1)]
    step = '{"what": "train", "step": 9}'
    (tmp_path / "ledger.jsonl").write_text("\n".join([step, *lines, step]) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": 1, "step_seconds": {step}, "mfu": 0.1}}\n' for step in steps))
    functions = (files("bagualu.launch.batch") / "job.sh").read_text().split("\nrm -f ")[0]
    done = subprocess.run(
        ["bash", "-c", f"{functions}\nledger={tmp_path}/ledger.jsonl; metrics={tmp_path}/metrics.jsonl; lead {seconds}"],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{lead}\n", "")


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
