"""Times as text."""

import pytest

from bagualu.parallel.simulation.seconds_text import seconds_text, span_text

STEPS = {123.456: "123.5 s", 1.0: "1 s", 0.4321: "432.1 ms", 9.87e-4: "987 us", 0.0: "0 us"}
DAY = 86400.0
SPANS = {DAY: "24 h", 14 * DAY: "14 days", 5000 * DAY: "5,000 days", 5399.0: "90 min", 89.0: "89 s", 0.25: "250 ms"}


@pytest.mark.parametrize(("seconds", "text"), STEPS.items())
def test_the_time_of_a_step(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), SPANS.items())
def test_a_time_of_any_length(seconds: float, text: str) -> None:
    assert span_text(seconds) == text
