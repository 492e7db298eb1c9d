"""Links found from the times that they cause are those links."""

from dataclasses import replace

import pytest

from bagualu.comm.cost import KINDS
from bagualu.launch.machine.figures import LinkTime
from bagualu.launch.machine.fit_links import Links, fit, predicted


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_links_are_found(ranks: int) -> None:
    relative = dict.fromkeys(KINDS, 1.0) | {"all_reduce": 2.5}
    links = Links(latency_seconds=3e-5, bytes_per_second=2e9, start_seconds=1e-5, relative=relative)
    calls = [LinkTime(kind, size, ranks, 1.0) for kind in KINDS for size in (2**10, 2**17, 2**22, 2**26)]
    times = predicted(links, calls)
    noise = [1.02 if index % 2 else 0.98 for index in range(len(times))]
    found = fit([replace(one, seconds=seconds * by) for one, seconds, by in zip(calls, times, noise, strict=True)])
    rates = {kind: found.bytes_per_second * factor for kind, factor in found.relative.items()}
    assert rates == {kind: pytest.approx(links.bytes_per_second * factor, rel=0.1) for kind, factor in relative.items()}
    assert found.latency_seconds + found.start_seconds == pytest.approx(4e-5, rel=0.2)
    assert predicted(found, calls) == pytest.approx(times, rel=0.2)
