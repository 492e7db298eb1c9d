"""Which planned faults have struck, so that none strikes again after a restart. Free of torch."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.injection.fault import Fault

FAULTS = "faults.jsonl"
"""Its name in a run directory."""


class Record:
    """One JSON object a line, durable before the fault strikes; a second one says what it did, if there is more to say."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, fault: Fault, step: int, did: str | None = None) -> None:
        """`fault` strikes now, in `step`; or has struck and done `did`."""
        line: dict[str, Any] = {"fault": str(fault), "step": step, "wall": time.time()}
        if did is not None:
            line["did"] = did
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def strikes(self) -> list[dict[str, Any]]:
        """What has struck, in order: fault, step, wall and, where there was more to say, did."""
        found: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            entry = json.loads(line)
            if "did" in entry:
                last = next(one for one in reversed(found) if one["fault"] == entry["fault"])
                last["did"] = entry["did"]
            else:
                found.append(entry)
        return found

    def struck(self) -> Counter[str]:
        """How often each fault, as it is typed, has struck."""
        return Counter(entry["fault"] for entry in self.strikes())
