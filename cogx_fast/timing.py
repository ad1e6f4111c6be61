"""Times that can be compared on a machine that others use too: in turns, as ratios, with confidence intervals."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and the 95 % confidence interval of it (percentile bootstrap)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round.

    Each round runs every step once, every other round in the opposite order, so that what slows the machine down for a
    while slows all of them, and none always follows the same other.

    Args:
        steps: what to time, by name.
        rounds: how often.
        synchronize: waits for the device to be done.
        on_round: called with the number of rounds done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps) if number % 2 == 0 else reversed(list(steps)):
            synchronize()
            begin = time.perf_counter()
            steps[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - begin)
        on_round(number + 1)
    return seconds


def median(values: Sequence[float]) -> Interval:
    """The median of some values, and how sure it is."""
    generator = random.Random(0)
    found = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    outside = round(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return Interval(median=statistics.median(values), low=found[outside], high=found[-1 - outside])


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """The median of the ratios of times that were taken in turns, a ratio a round."""
    logs = median([math.log(above / below) for above, below in zip(numerator, denominator, strict=True)])
    return Interval(median=math.exp(logs.median), low=math.exp(logs.low), high=math.exp(logs.high))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies, between two of them where it falls so."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


__all__ = ["Interval", "median", "percentile", "ratio", "take_turns"]
