"""Numbers and times in words, for terminals and pages."""

import math
import time
from itertools import pairwise

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def in_two_units(seconds: float) -> str:
    """Format the two largest units: 3 d 4 h, 2 min 5 s."""
    for (size, name), (smaller, small_name) in pairwise(UNITS):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // smaller:.0f} {small_name}"
    return f"{seconds:.0f} s"


def moment(at_s: float) -> str:
    """Format a time in seconds since 1970, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at_s))


def number(value: float, unit: str = "") -> str:
    """Format a number with four digits, as a percentage for the unit "%", or with its unit."""
    if unit == "%":
        return f"{value:.1%}"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1000 <= abs(value) < 1e6:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}" if unit else text
