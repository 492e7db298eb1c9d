"""The flag that a signal sets."""

import signal

import pytest

from bagualu.trainer.process.stop_request import STOP_SIGNALS, StopRequest


@pytest.fixture
def handlers():
    """Signals as a plain shell leaves them, whatever started the tests (nohup ignores SIGHUP)."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_no_more(handlers, number):
    stop = StopRequest()
    stop.install()
    assert not stop()
    signal.raise_signal(number)
    assert stop()


def test_a_second_ctrl_c_interrupts(handlers):
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_came_while_blocked_counts(handlers):
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.raise_signal(signal.SIGTERM)  # to this very thread; others may not block it
    stop = StopRequest()
    stop.install()
    assert stop()


def test_an_ignored_signal_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert not stop()
