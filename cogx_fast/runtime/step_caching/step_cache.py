"""Step caching: the runner's ``reuse`` slot by a schedule that is known before the first step.

Which step a call belongs to is read from the timestep without waiting for the device: pipelines hand over a view of
their scheduler's timesteps, whose place in that tensor is the number of the step. The timesteps themselves are read
once, at the first step of a generation.

A guided call has the unconditional half of its batch first, with the same latents as the conditional half. A schedule
that takes the halves apart computes the conditional one alone in some steps, and in all that are not whole; the
unconditional one then differs from it by what it did in the last steps that computed both (guidance caching, as in
FasterCache, arXiv:2410.19355, here of the stream after the blocks).

What is kept belongs to a generation, a thread and a cache context (``model.cache_context``), and ends with the last
step: (B, S, D) values of the stream's dtype for each number of blocks that is to be filled in until the next whole
step, twice that with the forecast "linear", three times with three weights. For 5b at its own size, with guidance: 208
MiB in bf16, 417, or 625. Halves apart are kept apart: half of that for each number of blocks, and half for their
difference.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cogx_fast.model.tracing import is_traced
from cogx_fast.runtime.composition import Feature, feature_of
from cogx_fast.runtime.step_caching.step_schedule import FirstBlock, Given, StepCacheError, StepSchedule, Strategy

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer
    from cogx_fast.runtime.runner import ComputeBlocks, Inputs

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


class Pattern(NamedTuple):
    """Which blocks a step computes. Where a graph is of the whole step, there is one for each."""

    blocks: int
    """So many of the first ones."""
    starts: tuple[int, ...] = ()
    """Blocks before which the stream is kept."""
    conditional: bool = False
    """The second half of the batch alone."""

    def __str__(self) -> str:
        return f"{self.blocks} block{'s' * (self.blocks != 1)}{' of one half' * self.conditional}"

    def compute(
        self, compute: ComputeBlocks, x_BSD: Tensor, stand_in: Tensor | None, difference: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The blocks, with what stands in for others.

        Args:
            compute: the runner's.
            x_BSD: the stream before the first block.
            stand_in: what the blocks that are not computed would add; None: there are none.
            difference: of the unconditional half after the blocks to the conditional one, where that is alone.

        Returns:
            The stream after the blocks, and that before each of ``starts``, of the videos that were computed.
        """
        videos = None
        if difference is not None:
            videos = difference.shape[0]
            torch._check(x_BSD.shape[0] == 2 * videos)
            x_BSD = x_BSD[videos:].clone()
        starts, done = [], 0
        for layer in self.starts:
            x_BSD = compute(x_BSD, done, layer, videos=videos)
            starts.append(x_BSD)
            done = layer
        x_BSD = compute(x_BSD, done, self.blocks, videos=videos)
        if stand_in is not None:
            x_BSD = x_BSD + stand_in
        if difference is not None:
            x_BSD = torch.cat([x_BSD + difference, x_BSD])
        return x_BSD, starts


def patterns(schedule: StepSchedule) -> set[Pattern]:
    """Every pattern that a generation with it may have, with guidance or without."""
    whole = Pattern(schedule.num_layers, schedule.starts)
    found = {whole} | {Pattern(start) for start in schedule.starts}
    if schedule.unconditional is not None:
        alone = {whole} if 0 in schedule.unconditional else set()
        found |= {each._replace(conditional=True) for each in found - {whole} | alone}
    return found


class _Kept(NamedTuple):
    """What something was in a step that computed it."""

    step: int
    value: Tensor


def _mix(schedule: StepSchedule, step: int, kept: Sequence[_Kept]) -> Tensor:
    """What it is in another step, by the schedule's forecast. The last step kept comes first."""
    weights = schedule.weights_at(step, [each.step for each in kept])
    if weights == (1.0,):
        return kept[0].value
    mixed = kept[0].value * weights[0]
    for weight, each in zip(weights[1:], kept[1:], strict=False):
        mixed.add_(each.value, alpha=weight)
    return mixed


@dataclass
class Generation:
    """One generation in one thread: its timesteps, its schedule, what it keeps."""

    timesteps: Tensor
    version: int
    size: tuple[torch.Size, torch.Size]
    """Shapes of latents and text."""
    schedule: StepSchedule | None
    """None: the first block decides."""
    has_halves: bool = False
    """The halves of the batch are taken apart."""
    is_known: bool = True
    """False: its steps cannot be told apart, and each is whole."""
    kept: dict[int, list[_Kept]] = field(default_factory=dict)
    """What the blocks from some number on added, by that number; with halves apart, to the conditional one."""
    difference: list[_Kept] = field(default_factory=list)
    """Of the unconditional half after the blocks to the conditional one."""
    step: int = -1
    """The last call's."""

    def is_of(self, place: Place) -> bool:
        """Whether a call belongs to it: its timestep is in the very same memory, unchanged."""
        same = self.timesteps.data_ptr() == place.timesteps.data_ptr() and self.timesteps.shape == place.timesteps.shape
        return same and self.version == place.timesteps._version

    def forget(self) -> None:
        """Keep nothing."""
        self.kept, self.difference = {}, []


@dataclass
class Step:
    """What one call computes, decided before it, and what it is computed with."""

    pattern: Pattern
    stand_in: Tensor | None = None
    difference: Tensor | None = None
    generation: Generation | None = None
    """That is told what the blocks added; None: none is."""
    number: int = -1
    """In the generation."""

    def end(self, x_BSD: Tensor, starts: Sequence[Tensor]) -> None:
        """Keep what later steps need.

        Args:
            x_BSD: the stream after the blocks.
            starts: as ``Pattern.compute`` returns them.
        """
        generation = self.generation
        if generation is None or generation.schedule is None or self.stand_in is not None:
            return
        schedule, most = generation.schedule, generation.schedule.kept_steps
        if generation.has_halves:
            without, x_BSD = x_BSD.chunk(2)
            starts = [start[-len(x_BSD) :] for start in starts]
            if self.difference is None:
                generation.difference = [_Kept(self.number, without - x_BSD), *generation.difference[: most - 1]]
        kept, generation.kept = generation.kept, {}
        wanted = _filled_in(schedule, self.number)
        for layer, start in zip(schedule.starts, starts, strict=True):
            if layer in wanted:
                generation.kept[layer] = [_Kept(self.number, x_BSD - start), *kept.get(layer, [])[: most - 1]]


class StepCache:
    """Computes whole steps and parts of steps as a schedule says. A value of ``Slots.reuse``.

    Args:
        strategy: where the schedule of a generation comes from.
    """

    def __init__(self, strategy: Strategy | FirstBlock) -> None:
        self.strategy = strategy
        self._state = threading.local()
        self._has_told = False

    @property
    def is_traceable(self) -> bool:
        """Whether what a step computes is settled before it, so that graphs of whole steps can be chosen."""
        return not isinstance(self.strategy, FirstBlock)

    @property
    def feature(self) -> Feature | None:
        """Its strategy's."""
        return feature_of(self.strategy)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCache, (self.strategy,)  # a copy begins anew

    def check_patterns(self, most: int) -> None:
        """See that there are few kinds of steps.

        Raises:
            StepCacheError: there are more than ``most``.
        """
        found = self.patterns(0)
        if len(found) > most:
            names = sorted(map(str, found))
            raise StepCacheError(
                f"the step schedule has {len(found)} kinds of steps ({', '.join(names)}), and a graph of the whole "
                f"step is made for each, {most} at most: use CompileConfig(scope='block'), or fewer numbers of blocks"
            )

    def patterns(self, num_layers: int) -> list[Pattern]:
        """The kinds of steps that there may be, whole ones first.

        Args:
            num_layers: of the model.
        """
        if isinstance(self.strategy, Given):
            found = patterns(self.strategy.given)
        else:
            found = {Pattern(num_layers, (0,)), Pattern(0)}
        return sorted(found, key=lambda each: (each.conditional, -each.blocks))

    def __call__(
        self, compute: ComputeBlocks, x_BSD: Tensor, num_layers: int, model: CogVideoXTransformer, inputs: Inputs
    ) -> Tensor:
        """The stream after the blocks; as ``runner.compute_all`` where the schedule says so."""
        if is_traced():
            raise ValueError("a step cache decides outside of compiled code: use load(..., compile=True)")
        step = self.begin(model, inputs)
        if isinstance(self.strategy, FirstBlock) and step.generation is not None:
            return _by_first_block(self.strategy.threshold, step.generation, compute, x_BSD, num_layers)
        x_BSD, starts = step.pattern.compute(compute, x_BSD, step.stand_in, step.difference)
        step.end(x_BSD, starts)
        return x_BSD

    def begin(self, model: CogVideoXTransformer, inputs: Inputs) -> Step:
        """What the step of this call computes. ``Step.end`` has to follow, unless the call fails."""
        whole = Step(Pattern(len(model.transformer_blocks)))
        if torch.is_grad_enabled() and any(
            each.requires_grad for each in (inputs.latents_BFCHW, inputs.text_BTE, *model.parameters())
        ):
            return whole
        place = place_of(inputs.timestep_B)
        if place is None:
            self._tell("the timestep is no view of a scheduler's timesteps")
            return whole
        states: dict[str, Generation] = self._state.__dict__
        generation = states.get(_context.get())
        if generation is None or not generation.is_of(place) or place.step < generation.step:
            generation = states[_context.get()] = self._generation(model, inputs, place)
        if place.step == generation.step:
            self._tell("the model is called twice in a step, and not in two contexts of model.cache_context")
            generation.is_known = False
        size = inputs.latents_BFCHW.shape, inputs.text_BTE.shape
        if size != generation.size or not generation.is_known:
            generation.size = size
            generation.forget()
        generation.step = place.step
        if place.step == len(place.timesteps) - 1:
            states.pop(_context.get(), None)
        if not generation.is_known:
            return whole
        if generation.schedule is None:
            return Step(whole.pattern, generation=generation, number=place.step)
        return _step(generation.schedule, generation)

    def _generation(self, model: CogVideoXTransformer, inputs: Inputs, place: Place) -> Generation:
        timesteps: list[float] = place.timesteps.tolist()  # waits for the device, once in a generation
        size = inputs.latents_BFCHW.shape, inputs.text_BTE.shape
        generation = Generation(place.timesteps, place.timesteps._version, size, None)
        if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
            self._tell("the timestep's memory holds no falling timesteps")
            generation.is_known = False
        elif not isinstance(self.strategy, FirstBlock):
            generation.schedule = self.strategy.schedule(model, timesteps)
            generation.has_halves = generation.schedule.unconditional is not None and _is_guided(inputs)
        return generation

    def _tell(self, why: str) -> None:
        if not self._has_told:
            self._has_told = True
            warnings.warn(f"{why}, so the step cache does not know the step and computes it whole", stacklevel=2)


def _is_guided(inputs: Inputs) -> bool:
    """Whether both halves of the batch begin with the same noise. With a mask, which may be each half's own: no."""
    latents_BFCHW = inputs.latents_BFCHW
    if len(latents_BFCHW) % 2 or isinstance(inputs.mask, Tensor):
        return False
    return torch.equal(*latents_BFCHW.chunk(2))  # waits for the device, as reading the timesteps did


def _step(schedule: StepSchedule, generation: Generation) -> Step:
    number, difference = generation.step, generation.difference
    blocks, kept = schedule.blocks[number], None
    whole = Step(Pattern(schedule.num_layers, schedule.starts), generation=generation, number=number)
    if blocks < schedule.num_layers:
        kept = generation.kept.get(blocks)
        if kept is None:
            return whole
    is_alone = generation.has_halves and (kept is not None or not (schedule.unconditional or ())[number])
    if is_alone and not difference:
        return whole
    return Step(
        whole.pattern._replace(conditional=is_alone) if kept is None else Pattern(blocks, conditional=is_alone),
        None if kept is None else _mix(schedule, number, kept),
        _mix(schedule, number, difference) if is_alone else None,
        generation,
        number,
    )


def _filled_in(schedule: StepSchedule, step: int) -> set[int]:
    """From which blocks on steps are filled in by what this step adds, also behind the next whole ones."""
    wanted: set[int] = set()
    whole = 0
    for first in schedule.blocks[step + 1 :]:
        if first == schedule.num_layers:
            whole += 1
            if whole == schedule.kept_steps:
                break
        else:
            wanted.add(first)
    return wanted


def _by_first_block(
    threshold: float, generation: Generation, compute: ComputeBlocks, x_BSD: Tensor, num_layers: int
) -> Tensor:
    step = generation.step
    first_BSD = compute(x_BSD, 0, 1)
    added = first_BSD - x_BSD
    kept, rest = generation.kept.get(0), generation.kept.get(1)
    if kept is not None and rest is not None:
        change = (added - kept[0].value).abs().mean() / kept[0].value.abs().mean()
        if bool(change < threshold):  # waits for the device
            return first_BSD + rest[0].value
    x_BSD = compute(first_BSD, 1, num_layers)
    generation.kept = {0: [_Kept(step, added)], 1: [_Kept(step, x_BSD - first_BSD)]}
    return x_BSD


__all__ = ["Generation", "Pattern", "Place", "Step", "StepCache", "context", "patterns", "place_of"]
