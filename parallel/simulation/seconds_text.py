"""Seconds as text, in a unit that suits them."""

_PERIODS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def seconds_text(seconds: float) -> str:
    """Formats the time of a step or a part of it: in s, or in ms or us if it is less than one."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def span_text(seconds: float) -> str:
    """Formats a time of any length: in days, h or min if it is at least one and a half of them, else as `seconds_text` does."""
    for size, unit in _PERIODS:
        if (number := seconds / size) >= 1.5:
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:,.0f} {unit}"
    return seconds_text(seconds)
