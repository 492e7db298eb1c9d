"""Makes the planned faults of one rank strike. Free of torch."""

from collections.abc import Sequence

from bagualu.fault_tolerance.injection.fault import Fault, Scene
from bagualu.fault_tolerance.injection.record import Record


class PlannedFaults:
    """An observer of the rank's monitor. Each fault strikes once in a run, however often the run is started."""

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
        for fault in [one for one in self.ahead if one.at == point and one.step <= step]:
            if not self.record.add(fault, step):
                continue  # it would strike again after every restart; later, when there is room
            self.ahead.remove(fault)
            did = fault.strike(self.scene)
            if did is not None:
                self.record.add(fault, step, did)

    def waits(self, what: str | None) -> None:
        return None
