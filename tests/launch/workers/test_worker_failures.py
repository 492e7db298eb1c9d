"""Why a worker has ended that could not say so itself: what its heartbeat, its peers and the metrics still tell."""

import json
import os
import time

import pytest

from bagualu.comm.monitor import Line, Monitor, Phase
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Heartbeat
from bagualu.launch.workers.worker_failures import failures, write_failure
from bagualu.trainer.process.failure import Failure


@pytest.fixture
def rank_3(tmp_path):
    """Its monitor; it has been killed."""
    monitor = Monitor()
    Heartbeat(tmp_path / HEARTBEATS, 3, monitor)
    return monitor


def of_rank_3(scratch, pid=None, code=-9):
    found = failures(scratch, {3: code}, {3: pid or os.getpid()}, scratch / "metrics.jsonl")
    (one,) = [one for one in found if one.rank == 3]
    return one.phase, one.step, one.kind


def test_a_killed_rank_is_found_where_it_was(tmp_path, rank_3):
    assert of_rank_3(tmp_path) == ("start", 0, "killed")
    rank_3.at(Phase.RESTORE)
    assert of_rank_3(tmp_path) == ("restore", 0, "killed")
    rank_3.step = 7
    rank_3.at(Phase.OPTIMIZER)
    assert of_rank_3(tmp_path) == ("step 7, optimizer", 7, "killed")
    line = rank_3.line(Line("data", (1, 3)))
    rank_3.waits("all_reduce", line, rank_3.joins(line))
    assert of_rank_3(tmp_path) == ("step 7, optimizer, waiting for all_reduce in data", 7, "killed")
    assert of_rank_3(tmp_path, code=9)[0] == "step 7, optimizer, waiting for all_reduce in data"


def test_the_heartbeat_of_an_earlier_process_says_nothing(tmp_path, rank_3):
    rank_3.step = 7
    rank_3.at(Phase.OPTIMIZER)
    assert of_rank_3(tmp_path, pid=1) == ("start", 1, "killed")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4}) + "\n")
    assert of_rank_3(tmp_path, pid=1) == ("step 5", 5, "killed")
    write_failure(tmp_path, Failure(0, "step 6, reduce", "lost a peer", time.time(), "peer", 6))
    assert of_rank_3(tmp_path, pid=1) == ("step 6", 6, "killed")
