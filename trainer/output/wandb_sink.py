"""Sends the metrics of a run to Weights & Biases. W&B's failures and delays neither end a run nor slow its steps down."""

import contextlib
import logging
import queue
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.output.metric_writers import Record

_INIT_SECONDS = 20.0
_FINISH_SECONDS = 15.0
_CLOSE_SECONDS = 45.0
"""The most that `close` waits: enough for an online start that times out, the offline start after it, and the finish."""
_LAST_SECONDS = 5.0
"""How long `close` waits for the thread after killing W&B's service."""
_MOST_RECORDS = 100_000
"""The most records that wait for W&B; further records are dropped until there is room."""
_SERVICE = "wandb-core"


class WandbSink:
    """Sends records to Weights & Biases; `offline` writes below the run directory and needs no network.

    A separate thread talks to W&B. If the server cannot be reached, or after any error, the thread prints a line on stderr and
    records the rest of the run offline, for `wandb sync`; if that fails too, the run continues without W&B.

    A resumed run continues the same W&B run, whose id is kept in the run directory. W&B ignores a step that it already has, so for
    steps done again after a resume it keeps the values of the first time; metrics.jsonl has those of the second.
    """

    def __init__(
        self, run_dir: Path, project: str, name: str, mode: str, config: Mapping[str, Any], patience_seconds: float = _CLOSE_SECONDS
    ) -> None:
        """`mode`: offline | online (`log.wandb`). `config`: the resolved recipe.

        `patience_seconds`: how long `close` may wait for W&B, at most _CLOSE_SECONDS.
        """
        self._run_dir, self._patience_seconds = run_dir, min(patience_seconds, _CLOSE_SECONDS)
        self._about = {"project": project, "name": name, "config": dict(config), "dir": str(run_dir)}
        self._modes = ["online", "offline"] if mode == "online" else ["offline"]
        """The current mode, followed by the modes to fall back to; empty if W&B is no longer used."""
        self._run: Any = None
        self._given_up = False
        self._records: queue.Queue[Record | None] = queue.Queue(_MOST_RECORDS)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        with contextlib.suppress(queue.Full):
            self._records.put_nowait(dict(record))

    def rewind(self, step: int) -> None:
        return None  # W&B cannot discard steps: see the class docstring

    def close(self) -> None:
        """Waits until W&B has received all records and finished. If that takes longer than `patience_seconds`, prints how to send
        the missing records, kills W&B's service and returns."""
        with contextlib.suppress(queue.Full):  # a full queue means that W&B has hung for long
            self._records.put_nowait(None)
        self._thread.join(self._patience_seconds)
        if self._thread.is_alive():
            self._given_up = True
            _say(f"W&B has not ended within {self._patience_seconds:g} s; {self._how_to_send()}")
            _kill_service()  # else the interpreter waits for it when this process ends
            self._thread.join(_LAST_SECONDS)

    # The thread

    def _work(self) -> None:
        self._send(None)
        while (record := self._records.get()) is not None:
            self._send(record)
        if self._run is not None:
            self._finish()

    def _send(self, record: Record | None) -> None:
        """Starts W&B if it is not running, and logs `record` unless it is None. After an error, tries again in the next of
        `_modes`, if there is a further mode."""
        while self._modes and not self._given_up:
            try:
                if self._run is None:
                    self._run = self._start(self._modes[0])
                if record is not None:
                    self._run.log({key: value for key, value in record.items() if key != "step"}, step=int(record["step"]))
                return
            except (Exception, SystemExit) as error:
                self._run, self._modes = None, self._modes[1:]
                if not self._given_up:
                    then = (
                        f"recorded offline: {self._how_to_send()}"
                        if self._modes
                        else f"without W&B: {RunDirectory(self._run_dir).metrics}"
                    )
                    _say(f"W&B failed: {_reason(error)}; the run goes on {then}")
                _tear_down()  # the service keeps the id of a run that failed to start, and would refuse it offline

    def _start(self, mode: str) -> Any:
        import wandb  # the import takes a second, and most runs do not use W&B

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's telemetry
        self._run_dir.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True
        )  # fmt: skip
        wandb.setup(settings)
        start: dict[str, Any] = {
            **self._about,
            "id": _run_id(RunDirectory(self._run_dir).wandb_id),
            "mode": mode,
            "settings": settings,
        }
        return wandb.init(**start, resume="allow" if mode == "online" else None)

    def _finish(self) -> None:
        try:
            self._run.finish()
        except TimeoutError:
            _say(f"W&B has not taken all records within {_FINISH_SECONDS:g} s; {self._how_to_send()}")
        except (Exception, SystemExit) as error:
            if not self._given_up:
                _say(f"W&B failed at the end of the run: {_reason(error)}; {self._how_to_send()}, "
                     f"{RunDirectory(self._run_dir).metrics} has all")  # fmt: skip
        _tear_down()  # W&B's own hook for the end of a process does not run in the launcher's workers

    def _how_to_send(self) -> str:
        return f"`wandb sync {self._run_dir}/wandb/*run-*` sends what is missing"


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _reason(error: BaseException) -> str:
    """Returns the error as a single line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _say(line: str) -> None:
    print(f"bagualu: {line}", file=sys.stderr, flush=True)


def _tear_down() -> None:
    """Ends W&B's service; it may have ended already."""
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _kill_service() -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == _SERVICE:
                child.kill()
