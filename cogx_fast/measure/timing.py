"""Times that can be compared on a machine that others use too: in turns, as ratios, with confidence intervals."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


def clock(device: torch.device) -> Callable[[], float]:
    """A function that gives seconds since some moment when the device has done what it was given.

    On CUDA the seconds are those of the device, between events on its current stream; elsewhere of the wall clock.
    """
    return _Events(device) if device.type == "cuda" else time.perf_counter


class _Events:
    """A sum over pairs of events: one pair over hours would round seconds to milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._last = self._record()

    def __call__(self) -> float:
        now = self._record()
        self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds

    def _record(self) -> Any:
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()
        return event


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round.

    Each round runs every step once, every other round in the opposite order, so that what slows the machine down for a
    while slows all of them, and none always follows the same other.

    Args:
        steps: what to time, by name.
        rounds: how often.
        now: a ``clock``.
        on_round: called with the number of rounds done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps) if number % 2 == 0 else reversed(list(steps)):
            begin = now()
            steps[name]()
            seconds[name].append(now() - begin)
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


__all__ = ["Interval", "clock", "median", "percentile", "ratio", "take_turns"]
