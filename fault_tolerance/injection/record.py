"""Records which planned faults have struck, so that none strikes again after a restart."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bagualu.comm import jsonl
from bagualu.fault_tolerance.append_log import AppendLog
from bagualu.fault_tolerance.injection.fault import Fault


class Record:
    """A file with a JSON object per line. A fault's line is durable before the fault strikes; a second line may add what the fault
    did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = AppendLog(path, shared=True, durable=True)

    def add(self, fault: Fault, step: int, did: str | None = None) -> bool:
        """Records that `fault` strikes now, in `step`, or, if `did` is given, what the fault did. Returns whether the line was
        written."""
        line: dict[str, Any] = {"fault": str(fault), "step": step, "wall": time.time()}
        if did is not None:
            line["did"] = did
        try:
            return self._lines.add(json.dumps(line))
        finally:
            self._lines.drop()
            self._lines.close()

    def strikes(self) -> list[dict[str, Any]]:
        """Returns the faults that have struck, in order, each with the keys fault, step, wall and, if it was recorded, did.

        Damaged lines are skipped: a fault whose line was cut short did not strike, and a `did` that was cut short is missing.
        """
        strikes: list[dict[str, Any]] = []
        for entry in jsonl.read(self.path):
            if type(entry.get("fault")) is not str or type(entry.get("step")) is not int or not jsonl.number(entry.get("wall")):
                continue
            if "did" not in entry:
                strikes.append(entry)
            elif same := [strike for strike in strikes if strike["fault"] == entry["fault"]]:
                same[-1]["did"] = entry["did"]
        return strikes

    def struck(self) -> Counter[str]:
        """Returns how often each fault has struck, by the fault's text."""
        return Counter(entry["fault"] for entry in self.strikes())
