"""The flag that a signal sets."""

import os
import signal

import pytest

from bagualu.trainer.stopping import STOP_SIGNALS, StopRequest


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_no_more(handlers, number):
    stop = StopRequest()
    stop.install()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()


def test_a_second_ctrl_c_interrupts(handlers):
    stop = StopRequest()
    stop.install()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


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
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop()
