"""What a heartbeat costs: microseconds for each call of a monitor, with nobody looking and with a heartbeat written."""

import tempfile
import timeit
from pathlib import Path

from bagualu.comm.monitor import Line, Monitor, Phase
from bagualu.fault_tolerance.watchdog.heartbeat import Heartbeat

CALLS = 200_000


def microseconds(monitor: Monitor) -> dict[str, float]:
    """Of each kind of call, the best of five rounds."""
    line = monitor.line(Line("world", tuple(range(8))))
    calls = {
        "at": lambda: monitor.at(Phase.FORWARD),
        "join": lambda: monitor.joins(line),
        "wait and go on": lambda: (monitor.waits("all_reduce", line, 7), monitor.goes_on()),
    }
    return {name: min(timeit.repeat(call, number=CALLS, repeat=5)) / CALLS * 1e6 for name, call in calls.items()}


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").exists() else None) as folder:
        plain, watched = Monitor(), Monitor()
        Heartbeat(Path(folder), 0, watched)
        before, after = microseconds(plain), microseconds(watched)
    print(f"{'microseconds a call':<20}{'monitor alone':>15}{'with heartbeat':>16}")
    for name in before:
        print(f"{name:<20}{before[name]:>15.2f}{after[name]:>16.2f}")


if __name__ == "__main__":
    main()
