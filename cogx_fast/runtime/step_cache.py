"""Step caching: the runner's ``reuse`` slot by a schedule that is known before the first step.

Which step a call belongs to is read from the timestep without waiting for the device: pipelines hand over a view of
their scheduler's timesteps, whose place in that tensor is the number of the step. The timesteps themselves are read
once, at the first step of a generation.

What is kept belongs to a generation, a thread and a cache context (``model.cache_context``), and ends with the last
step: (B, S, D) values of the stream's dtype for each number of blocks that is to be filled in until the next whole
step, twice that with the forecast "linear". For 5b at its own size, with guidance: 208 MiB in bf16, or 417.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cogx_fast.runtime.step_schedule import FirstBlock, StepSchedule, Strategy

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer
    from cogx_fast.runtime.runner import ComputeBlocks

_context: ContextVar[str] = ContextVar("cache context", default="")


@contextlib.contextmanager
def context(name: str) -> Iterator[None]:
    """Calls inside the ``with`` block keep what they keep apart from those under another name."""
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


class Place(NamedTuple):
    """Where in a scheduler's timesteps a call is."""

    timesteps: Tensor
    """All of them, a view of the same memory."""
    step: int


def place_of(timestep_B: Tensor) -> Place | None:
    """The place, read from strides and offsets; None where the timestep is no view of several timesteps."""
    if timestep_B.dim() != 1 or (timestep_B.stride(0) != 0 and timestep_B.shape[0] > 1):
        return None
    count = timestep_B.untyped_storage().nbytes() // timestep_B.element_size()
    if count < 2 or timestep_B.storage_offset() >= count:
        return None
    return Place(torch.as_strided(timestep_B, (count,), (1,), 0), int(timestep_B.storage_offset()))


@dataclass
class _Kept:
    """What blocks from some number on added in the last whole steps."""

    last: Tensor
    step: int
    before: Tensor | None = None
    step_before: int = 0

    def forecast(self, step: int, *, linear: bool) -> Tensor:
        """The same, or the line through both at that step."""
        if not linear or self.before is None:
            return self.last
        part = (step - self.step) / (self.step - self.step_before)
        return torch.lerp(self.before, self.last, 1 + part)


@dataclass
class _Generation:
    """One generation in one thread: its timesteps, its schedule, what it keeps."""

    timesteps: Tensor
    version: int
    schedule: StepSchedule | None
    """None: the first block decides."""
    is_known: bool = True
    """False: its steps cannot be told apart, and each is whole."""
    kept: dict[int, _Kept] = field(default_factory=dict)
    """By the number of first blocks that a step computes."""
    step: int = -1
    """The last call's."""

    def is_of(self, place: Place) -> bool:
        """Whether a call belongs to it: its timestep is in the very same memory, unchanged."""
        same = self.timesteps.data_ptr() == place.timesteps.data_ptr() and self.timesteps.shape == place.timesteps.shape
        return same and self.version == place.timesteps._version


class StepCache:
    """Computes whole steps and parts of steps as a schedule says. A value of ``Slots.reuse``.

    Args:
        strategy: where the schedule of a generation comes from.
    """

    is_traceable = False
    """It decides between calls of compiled code, which a graph of the whole step would hold fixed."""

    def __init__(self, strategy: Strategy | FirstBlock) -> None:
        self.strategy = strategy
        self._state = threading.local()
        self._has_told = False

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCache, (self.strategy,)  # a copy begins anew

    def __call__(
        self,
        compute: ComputeBlocks,
        x_BSD: Tensor,
        num_layers: int,
        model: CogVideoXTransformer,
        timestep_B: Tensor,
    ) -> Tensor:
        """The stream after the blocks; as ``runner.compute_all`` where the schedule says so."""
        if torch.compiler.is_compiling():
            raise ValueError("a step cache decides outside of compiled code: use load(..., compile=True)")
        if torch.is_grad_enabled() and (x_BSD.requires_grad or any(p.requires_grad for p in model.parameters())):
            return compute(x_BSD, 0, num_layers)
        place = place_of(timestep_B)
        if place is None:
            self._tell("the timestep is no view of a scheduler's timesteps")
            return compute(x_BSD, 0, num_layers)
        states: dict[str, _Generation] = self._state.__dict__
        generation = states.get(_context.get())
        if generation is None or not generation.is_of(place) or place.step < generation.step:
            generation = states[_context.get()] = self._begin(model, place)
        if place.step == generation.step:
            self._tell("the model is called twice in a step, and not in two contexts of model.cache_context")
            generation.is_known, generation.kept = False, {}
        generation.step = place.step
        try:
            if not generation.is_known:
                return compute(x_BSD, 0, num_layers)
            if isinstance(self.strategy, FirstBlock):
                return _by_first_block(self.strategy.threshold, generation, compute, x_BSD, num_layers)
            assert generation.schedule is not None
            return _by_schedule(generation.schedule, generation, compute, x_BSD, num_layers)
        finally:
            if place.step == len(place.timesteps) - 1:
                states.pop(_context.get(), None)

    def _begin(self, model: CogVideoXTransformer, place: Place) -> _Generation:
        timesteps: list[float] = place.timesteps.tolist()  # waits for the device, once in a generation
        generation = _Generation(place.timesteps, place.timesteps._version, None)
        if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
            self._tell("the timestep's memory holds no falling timesteps")
            generation.is_known = False
        elif not isinstance(self.strategy, FirstBlock):
            generation.schedule = self.strategy.schedule(model, timesteps)
        return generation

    def _tell(self, why: str) -> None:
        if not self._has_told:
            self._has_told = True
            warnings.warn(f"{why}, so the step cache does not know the step and computes it whole", stacklevel=2)


def _by_schedule(
    schedule: StepSchedule, generation: _Generation, compute: ComputeBlocks, x_BSD: Tensor, num_layers: int
) -> Tensor:
    step = generation.step
    first = schedule.blocks[step]
    kept = generation.kept.get(first)
    if first < num_layers and kept is not None and kept.last.shape == x_BSD.shape:
        return compute(x_BSD, 0, first) + kept.forecast(step, linear=schedule.forecast == "linear")
    wanted = _filled_in(schedule, step)
    starts: dict[int, Tensor] = {}
    done = 0
    for layer in [*wanted, num_layers]:
        x_BSD = compute(x_BSD, done, layer)
        starts[layer] = x_BSD
        done = layer
    is_linear = schedule.forecast == "linear"
    before, generation.kept = generation.kept, {}
    for layer in wanted:
        old = before.get(layer) if is_linear else None
        fits = old is not None and old.last.shape == x_BSD.shape
        generation.kept[layer] = _Kept(
            x_BSD - starts[layer], step, old.last if old and fits else None, old.step if old and fits else 0
        )
    return x_BSD


def _filled_in(schedule: StepSchedule, step: int) -> list[int]:
    """From which blocks on steps are filled in later; with the forecast "linear" also behind the next whole step."""
    wanted: set[int] = set()
    whole = 0
    for first in schedule.blocks[step + 1 :]:
        if first == schedule.num_layers:
            whole += 1
            if schedule.forecast == "reuse" or whole > 1:
                break
        else:
            wanted.add(first)
    return sorted(wanted)


def _by_first_block(
    threshold: float, generation: _Generation, compute: ComputeBlocks, x_BSD: Tensor, num_layers: int
) -> Tensor:
    step = generation.step
    first_BSD = compute(x_BSD, 0, 1)
    added = first_BSD - x_BSD
    kept, rest = generation.kept.get(0), generation.kept.get(1)
    if kept is not None and rest is not None and kept.last.shape == added.shape:
        change = (added - kept.last).abs().mean() / kept.last.abs().mean()
        if bool(change < threshold):  # waits for the device
            return first_BSD + rest.last
    x_BSD = compute(first_BSD, 1, num_layers)
    generation.kept = {0: _Kept(added, step), 1: _Kept(x_BSD - first_BSD, step)}
    return x_BSD


__all__ = ["Place", "StepCache", "context", "place_of"]
