"""Numbers as people read them."""

import math

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
TIMES = "\N{MULTIPLICATION SIGN}"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction between 0 and 1; what is not quite 0 or 1 does not look as if it were."""
    text = f"{100 * fraction:.{digits}f}%"
    step = 10**-digits
    if fraction > 0 and float(text[:-1]) == 0:
        return f"<{step:.{digits}f}%"
    if fraction < 1 and float(text[:-1]) == 100:
        return f">{100 - step:.{digits}f}%"
    return text


def change(ratio: float) -> str:
    """What a ratio of pruned to dense is as a change in percent: 0.83 is 17% less."""
    difference = round(100 * (ratio - 1))
    return f"{MINUS if difference < 0 else '+'}{abs(difference):,}%" if difference else "\N{PLUS-MINUS SIGN}0%"


def times(ratio: float) -> str:
    """A factor, with the sign of multiplication before it."""
    return f"{TIMES}{ratio:,.2f}" if ratio < 100 else f"{TIMES}{ratio:,.4g}"


def short_count(number: float) -> str:
    """A count in words of three digits: 111.3 million is 111 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def bytes_pair(dense: float, pruned: float) -> str:
    """Two sizes in the largest unit that is not below one for the first."""
    power = next((power for power in (3, 2, 1) if dense >= 1024**power), 0)
    texts = [f"{number / 1024**power:,.3g}" for number in (dense, pruned)]
    return f" {ARROW} ".join(texts) + f" {('B', 'KiB', 'MiB', 'GiB')[power]}"


def duration(seconds: float) -> str:
    """A time in minutes and seconds, or in seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.05 or seconds == 0 else "<0.1 s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def rough(number: float) -> str:
    """A number of any size, in about three digits: 12,345 or 0.0120 or 1.2e-09."""
    size = abs(number)
    if size == 0 or not math.isfinite(number):
        return f"{number:g}"
    if 1e-3 <= size < 1e6:
        return f"{number:,.0f}" if size >= 100 else f"{number:#.3g}"
    return f"{number:.1e}"
