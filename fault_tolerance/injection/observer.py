"""Causes the planned faults of a rank."""

from collections.abc import Sequence

from bagualu.fault_tolerance.injection.fault import Fault, Scene
from bagualu.fault_tolerance.injection.record import Record


class PlannedFaults:
    """Observes the rank's monitor and causes each fault that the plan has for this rank once in a run, however often the run is
    restarted."""

    def __init__(self, plan: Sequence[Fault], scene: Scene, record: Record) -> None:
        self.scene, self.record = scene, record
        struck = record.struck()
        self.ahead: list[Fault] = []
        for fault in plan:
            if struck[str(fault)]:
                struck[str(fault)] -= 1
            elif fault.rank == scene.rank:
                self.ahead.append(fault)

    def at(self, point: str, step: int) -> None:
        for fault in [planned for planned in self.ahead if planned.at == point and planned.step <= step]:
            if not self.record.add(fault, step):
                continue  # an unrecorded fault would strike again after every restart; it strikes later, when the disk has room
            self.ahead.remove(fault)
            did = fault.strike(self.scene)
            if did is not None:
                self.record.add(fault, step, did)

    def waits(self, what: str | None) -> None:
        return None
