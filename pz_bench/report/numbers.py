"""Numbers as text: here and only here, so that no two forms of a leaderboard can disagree.

Shares are in percent with one decimal; CSV and JSON hold the plain numbers instead.
"""

from __future__ import annotations

ABSENT = "–"


def percent(share: float) -> str:
    """Return a share of one as percent with one decimal, never ``-0.0``."""
    return f"{round(100 * share, 1) + 0.0:.1f}"


def signed(difference: float) -> str:
    """Return a difference of shares in points with its sign."""
    points = round(100 * difference, 1) + 0.0
    return "0.0" if points == 0 else f"{points:+.1f}".replace("-", "−")


def span(low: float | None, high: float | None) -> str:
    """Return the interval of a difference in points, the dash where there is none."""
    if low is None or high is None:
        return ABSENT
    return f"{signed(low)} to {signed(high)}"


def p_value(p: float) -> str:
    """Return p to three decimals, or the bound it is below."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def value(mean: float, low: float | None, high: float | None) -> str:
    """Return ``62.5 ± 4.2``: percent, and the larger side of the interval where there is one."""
    if low is None or high is None:
        return percent(mean)
    return f"{percent(mean)} ± {percent(max(mean - low, high - mean, 0.0))}"


def amount(number: float | None, decimals: int = 1) -> str:
    """Return a count or mean: whole numbers whole, thousands apart by thin spaces."""
    if number is None:
        return ABSENT
    text = f"{number:,.{decimals}f}" if number < 1000 else f"{number:,.0f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace(",", "\u202f")


def interval_title(low: float | None, high: float | None) -> str:
    """Return the interval in words."""
    if low is None or high is None:
        return "One episode: no interval"
    return f"95 % interval {percent(low)} to {percent(high)}"
