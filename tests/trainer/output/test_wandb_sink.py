"""What becomes of a run's figures when Weights & Biases can be reached, cannot, fails, or hangs."""

import socket
import time

import psutil
import pytest
import wandb

from bagualu.trainer.output import wandb_sink
from bagualu.trainer.output.wandb_sink import WandbSink
from tests.trainer.wandb_server import Server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def server(request, monkeypatch, tmp_path):
    """The server that W&B finds, of the kind that the test asks for, or none."""
    kind = getattr(request, "param", "ok")
    stand_in = Server(kind) if kind != "nobody" else None
    wandb.teardown()  # W&B reads its environment once
    monkeypatch.setenv("WANDB_BASE_URL", stand_in.url if stand_in else "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(wandb_sink, "_INIT_SECONDS", 2.0)
    monkeypatch.setattr(wandb_sink, "_FINISH_SECONDS", 2.0)
    yield stand_in
    if stand_in and not stand_in.stopped.is_set():
        stand_in.stop()
    wandb.teardown()
    assert services() == []


def services():
    """W&B's processes that this process has started and that have not ended."""
    children = psutil.Process().children()
    return [child for child in children if child.name() == "wandb-core" and child.status() != psutil.STATUS_ZOMBIE]


def sink(folder, mode="online", **options):
    return WandbSink(folder, "project", "name", mode, {"model": {"layers": 2}}, **options)


def started(sink):
    """Once W&B has taken the run."""
    deadline = time.monotonic() + 60
    while sink._run is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write(sink, first=1, steps=3):
    for step in range(first, first + steps):
        sink.write({"step": step, "loss": 1.0 / step})


def recorded(folder, kind):
    """Bytes of each W&B file of the run directory, whose names begin with `kind`."""
    return [path.stat().st_size for path in folder.glob(f"wandb/{kind}-*/run-*.wandb")]


def test_offline_writes_below_the_run_directory_without_network(tmp_path, monkeypatch, capsys):
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert host in ("localhost", "127.0.0.1", "::1"), f"connects to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    for first in (1, 3):
        offline = sink(tmp_path, "offline")
        write(offline, first, 2)
        offline.close()
        time.sleep(1)  # W&B names the folder by the second: a run that was started again comes later than that
    name = (tmp_path / "wandb-id").read_text()
    files = list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    assert all(path.stat().st_size > 1000 for path in files)
    assert "W&B" not in capsys.readouterr().err


def test_online_sends_every_record(tmp_path, server, capsys):
    online = sink(tmp_path)
    write(online)
    online.close()
    assert [line.count('"_step":') for line in server.lines] == [1, 1, 1]
    assert "W&B" not in capsys.readouterr().err


@pytest.mark.parametrize("server", ["nobody", "silent", "refusing"], indirect=True)
def test_a_start_that_fails_costs_a_line_and_goes_on_offline(tmp_path, server, capsys):
    online = sink(tmp_path)
    write(online)
    online.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert line.startswith("bagualu: W&B failed: CommError: ")
    assert "`wandb sync " in line
    sizes = recorded(tmp_path, "offline-run")
    assert sizes
    assert min(sizes) > 1000


def test_an_outage_costs_a_line_and_keeps_the_records(tmp_path, server, capsys):
    online = sink(tmp_path)
    started(online)
    server.stop()
    write(online)
    online.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bagualu: ")]
    assert line.startswith("bagualu: W&B has not taken all records within 2 s; `wandb sync ")
    sizes = recorded(tmp_path, "run")
    assert sizes
    assert min(sizes) > 1000


def test_a_service_that_dies_costs_a_line_and_the_run_goes_on_offline(tmp_path, server, capsys):
    online = sink(tmp_path)
    started(online)
    services()[0].kill()
    psutil.wait_procs(services())
    first, deadline = 1, time.monotonic() + 60
    while online._modes[0] == "online":  # W&B may take some records before it notices
        assert time.monotonic() < deadline
        write(online, first)
        first += 3
        time.sleep(0.05)
    write(online, first)
    online.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bagualu: ")]
    assert line.startswith("bagualu: W&B failed: ")
    sizes = recorded(tmp_path, "offline-run")
    assert sizes
    assert min(sizes) > 1000


def test_a_service_that_hangs_is_given_up_and_ended(tmp_path, server, capsys):
    online = sink(tmp_path, patience_seconds=1)
    started(online)
    services()[0].suspend()
    write(online)
    online.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bagualu: ")]
    assert line.startswith("bagualu: W&B has not ended within 1 s; `wandb sync ")


def test_without_any_service_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_sink, "_run_id", lambda path: (tmp_path / "nothing" / "there").read_text())
    online = sink(tmp_path)
    write(online, steps=3)
    online.close()
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bagualu: ")]
    assert "FileNotFoundError" in first
    assert second.endswith(f"the run goes on without W&B: {tmp_path}/metrics.jsonl")
