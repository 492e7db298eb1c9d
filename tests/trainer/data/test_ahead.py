"""Reading ahead returns what reading would return, at whatever step a run goes on, and says how long it waited."""

import threading
from collections.abc import Callable

import pytest

from bagualu.trainer.data.ahead import ReadAhead, waiting
from bagualu.trainer.data.config import DataConfig


class Recorded:
    """Reads a step as its number, and notes in which thread."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.read_in: dict[int, str] = {}
        self.fails_at = fails_at

    def __call__(self, step: int) -> int:
        self.read_in[step] = threading.current_thread().name
        if step == self.fails_at:
            raise ValueError(f"step {step}")
        return 10 * step


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_are_those_that_were_asked_for(workers: int) -> None:
    read = Recorded()
    ahead = ReadAhead(read, 12, workers)
    steps = [0, 1, 2, 3, 3, 7, 8, 2, 3, 11]
    assert [ahead.take(step) for step in steps] == [10 * step for step in steps]
    ahead.close()
    assert max(read.read_in) <= 11


@pytest.mark.parametrize("workers", [1, 4])
def test_following_steps_are_read_by_other_threads_before_they_are_asked_for(workers: int) -> None:
    read = Recorded()
    ahead = ReadAhead(read, 100, workers)
    ahead.take(5)
    ahead.close()
    ahead._pool.shutdown(wait=True)  # type: ignore[union-attr]
    assert set(read.read_in) - {5} <= set(range(6, 6 + workers))
    ahead = ReadAhead(read, 100, workers)
    ahead.take(0)
    ahead.take(1)
    assert read.read_in[1].startswith("data")
    ahead.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_belongs_to_its_step(workers: int) -> None:
    ahead = ReadAhead(Recorded(fails_at=2), 9, workers)
    assert [ahead.take(0), ahead.take(1)] == [0, 10]
    with pytest.raises(ValueError, match="step 2"):
        ahead.take(2)
    assert ahead.take(3) == 30
    ahead.close()


def test_what_was_read_before_is_forgotten() -> None:
    factor = [1]
    ahead = ReadAhead(lambda step: factor[0] * step, 9, 1)
    ahead.take(1)
    ahead._ahead[2].result()
    factor[0] = 5
    ahead.forget()
    assert ahead.take(2) == 10
    ahead.close()


def test_waiting_is_counted_and_told() -> None:
    opened = threading.Event()

    def slow(step: int) -> int:
        if step == 1:
            opened.wait(60)
        return step

    ahead = ReadAhead(slow, 2, 1)
    ahead.take(0)
    assert ahead.waited() >= 0
    threading.Timer(0.2, opened.set).start()
    ahead.take(1)
    assert ahead.waited() > 0.05
    assert ahead.waited() == 0
    ahead.close()
    remark: Callable[[float], str | None] = lambda seconds: waiting(seconds, 10.0, DataConfig())  # noqa: E731
    assert remark(0.1) is None
    assert remark(0.5) == (
        "data: steps waited 5.0% of their time for data on rank 0; put it on faster storage, or give data.workers=2"
    )
