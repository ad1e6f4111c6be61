"""Step schedules: how many blocks each denoising step computes, known before the first step.

Neighbouring steps repeat most of their work: what the blocks add to the stream changes little. A step that is not
computed whole computes its first few blocks and takes what the others added in an earlier step.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from cogx_fast.attention.plan import hash_config
from cogx_fast.config import TransformerConfig
from cogx_fast.runtime.composition import Feature

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer

Forecast = Literal["reuse", "linear", "fitted"]
FORECASTS: tuple[Forecast, ...] = ("reuse", "linear", "fitted")
"""What stands in for blocks that are not computed: what they added in the last whole step; a line through what they
added in the last two; or a sum of what they added in the last few, by weights that the schedule holds."""


MOST_KEPT = 3
"""Whole steps of which something is kept."""


class StepCacheError(ValueError):
    """A step schedule that cannot be, or that is another model's; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """How many blocks each step computes.

    Raises:
        StepCacheError: the parts do not fit together.
    """

    blocks: tuple[int, ...]
    """For each step the number of first blocks that it computes; ``num_layers`` is a whole step."""
    num_layers: int
    """The model's."""
    forecast: Forecast = "reuse"
    """One of ``FORECASTS``."""
    weights: tuple[tuple[float, ...], ...] | None = None
    """With "fitted", for each step by how much the last whole steps count, the last one first; () for a whole step."""
    unconditional: tuple[int, ...] | None = None
    """Guidance caching: for each step 1 where it computes both halves of a guided call's batch, 0 where the conditional
    one alone; steps that are not whole compute that alone. None: the halves are never taken apart."""
    scheduler: str | None = None
    """The class of the scheduler that it was made with. A model does not see its scheduler; pipelines are checked."""
    timesteps: tuple[int, ...] | None = None
    """Those that it was made with; others are told."""
    config_hash: str | None = None
    """``hash_config`` of the model that it is for; None: any of so many layers."""
    error: float | None = None
    """Relative error of the final latents that it was made with, if that was measured."""
    origin: str = ""
    """How it came about, in words."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise StepCacheError("a step schedule needs a step: blocks is empty")
        wrong = [count for count in self.blocks if not 0 <= count <= self.num_layers]
        if wrong:
            raise StepCacheError(f"a step computes {wrong[0]} blocks, expected 0 to {self.num_layers}")
        if self.blocks[0] != self.num_layers:
            raise StepCacheError(
                f"the first step computes {self.blocks[0]} of {self.num_layers} blocks, but there is nothing yet to "
                "stand in for the others: compute it whole"
            )
        if self.forecast not in FORECASTS:
            raise StepCacheError(f"forecast is {self.forecast!r}, expected one of {', '.join(FORECASTS)}")
        if (self.weights is None) == (self.forecast == "fitted"):
            raise StepCacheError("weights go with the forecast 'fitted', and that with weights")
        if self.weights is not None:
            self._check_weights(self.weights)
        if self.unconditional is not None:
            self._check_halves(self.unconditional)
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise StepCacheError(f"there are {len(self.timesteps)} timesteps for {self.steps} steps")

    def _check_weights(self, weights: tuple[tuple[float, ...], ...]) -> None:
        if len(weights) != self.steps:
            raise StepCacheError(f"there are weights for {len(weights)} steps, expected {self.steps}")
        for step, (count, given) in enumerate(zip(self.blocks, weights, strict=True)):
            wanted = range(1) if count == self.num_layers else range(1, MOST_KEPT + 1)
            if len(given) not in wanted or not all(map(math.isfinite, given)):
                raise StepCacheError(
                    f"step {step} has the weights {list(given)}, expected 1 to {MOST_KEPT} numbers, none in whole steps"
                )

    def _check_halves(self, unconditional: tuple[int, ...]) -> None:
        if len(unconditional) != self.steps or not set(unconditional) <= {0, 1}:
            raise StepCacheError(f"unconditional is {unconditional}, expected a 0 or 1 for each of {self.steps} steps")
        if not unconditional[0]:
            raise StepCacheError("the first step computes one half of the batch, and nothing stands in for the other")
        partial = [step for step, count in enumerate(self.blocks) if count < self.num_layers and unconditional[step]]
        if partial:
            raise StepCacheError(
                f"step {partial[0]} is not whole, so it computes the conditional half alone: its place in "
                "unconditional is 0"
            )

    @property
    def steps(self) -> int:
        """Of the schedule."""
        return len(self.blocks)

    @property
    def starts(self) -> tuple[int, ...]:
        """The numbers of first blocks that steps compute which are not whole."""
        return tuple(sorted({*self.blocks} - {self.num_layers}))

    @property
    def kept_steps(self) -> int:
        """Of how many whole steps something is kept."""
        return max(map(len, self.weights or [()])) or 1 + (self.forecast == "linear")

    def weights_at(self, step: int, kept: Sequence[int]) -> tuple[float, ...]:
        """By how much what was kept counts in a step.

        Args:
            step: its number.
            kept: in which steps something was, the last first; one or more.
        """
        if self.forecast == "linear" and len(kept) > 1:
            part = (step - kept[0]) / (kept[0] - kept[1])
            return 1 + part, -part
        fitted = self.weights[step] if self.weights is not None else ()
        return fitted if 0 < len(fitted) <= len(kept) else (1.0,)

    @property
    def speedup(self) -> float:
        """How many times fewer blocks are computed than without it, for each half of the batch; in a guided call."""
        halves = [1] * self.steps if self.unconditional is None else self.unconditional
        computed = sum(count * (1 + both) / 2 for count, both in zip(self.blocks, halves, strict=True))
        return self.num_layers * self.steps / computed

    def check(self, config: TransformerConfig) -> None:
        """See that it is for that configuration.

        Raises:
            StepCacheError: it is not.
        """
        if self.num_layers != config.num_layers or self.config_hash not in (None, hash_config(config)):
            raise StepCacheError(
                f"the step schedule was made for a model of {self.num_layers} layers and another configuration (this "
                f"one has {config.num_layers}): take one of this model, or 'quality', 'balanced' or 'fast'"
            )

    def for_steps(self, steps: int) -> StepSchedule:
        """The same for another number of steps: each does as the step at its place in the schedule does.

        Weights that were fitted belong to their steps; a line takes their place.
        """
        if steps == self.steps:
            return self
        last = self.steps - 1
        places = [round(step * last / max(1, steps - 1)) for step in range(steps)]
        blocks = (self.num_layers, *(self.blocks[place] for place in places[1:]))
        halves = self.unconditional and (1, *(self.unconditional[place] for place in places[1:]))
        forecast: Forecast = "linear" if self.forecast == "fitted" else self.forecast
        return dataclasses.replace(
            self, blocks=blocks, forecast=forecast, weights=None, unconditional=halves, timesteps=None, error=None
        )

    def is_made_for(self, timesteps: Sequence[float]) -> bool:
        """Whether these are its own; a scheduler may give them as whole numbers or not."""
        return self.timesteps is None or all(
            abs(mine - other) <= 1 for mine, other in zip(self.timesteps, timesteps, strict=True)
        )


class Strategy(Protocol):
    """Where a schedule comes from, once the timesteps are known."""

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The schedule of a generation with these timesteps, the first one first."""


@dataclass(frozen=True)
class Given:
    """A schedule that is there already; for another number of steps it is adapted, with a warning; other timesteps are
    told."""

    given: StepSchedule

    @property
    def feature(self) -> Feature | None:
        """What not everything goes with."""
        return None if self.given.unconditional is None else Feature.HALVES

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The schedule itself, or that adapted."""
        if len(timesteps) != self.given.steps:
            warnings.warn(
                f"the step schedule is for {self.given.steps} steps and the video is made in {len(timesteps)}: it is "
                "adapted, and its error is not known; take one that is made for so many steps",
                stacklevel=2,
            )
        elif not self.given.is_made_for(timesteps):
            warnings.warn(
                f"the step schedule is for timesteps from {self.given.timesteps[0]} to {self.given.timesteps[-1]} "  # type: ignore[index]
                f"and the scheduler has {timesteps[0]:g} to {timesteps[-1]:g}, spaced in another way: its error is not "
                "known; take one that is made with this scheduler",
                stacklevel=2,
            )
        return self.given.for_steps(len(timesteps))


@dataclass(frozen=True)
class Mask:
    """Steps to compute whole, one by one; in the others no block."""

    whole: tuple[bool, ...]

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The mask as a schedule.

        Raises:
            StepCacheError: it has another length than the video has steps.
        """
        if len(self.whole) != len(timesteps):
            raise StepCacheError(
                f"the mask has {len(self.whole)} steps and the video is made in {len(timesteps)}: give one 0 or 1 for "
                "each step"
            )
        layers = len(model.transformer_blocks)
        blocks = tuple(layers if whole else 0 for whole in self.whole)
        return StepSchedule(blocks=blocks, num_layers=layers, origin="a mask")


@dataclass(frozen=True)
class Spaced:
    """Whole steps at growing distances, so many that ``speedup`` times fewer blocks are computed.

    At the beginning, where the picture's layout is decided, they follow each other; of n in N steps number k is step
    N (k / n) ** 1.8. In the other steps no block is computed, and what they would add lies half-way between the line
    through the last two whole steps and the parabola through the last three.
    """

    name: str
    speedup: float

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The schedule for so many steps."""
        steps, layers = len(timesteps), len(model.transformer_blocks)
        count = math.ceil(steps / self.speedup)
        whole: list[int] = []
        for number in range(count):
            place = round((steps - 1) * (number / max(1, count - 1)) ** _GROWTH)
            whole.append(max(place, whole[-1] + 1 if whole else 0))
        blocks = tuple(layers if step in whole else 0 for step in range(steps))
        weights = tuple(
            () if step in whole else _half_bent(step, [each for each in reversed(whole) if each < step][:MOST_KEPT])
            for step in range(steps)
        )
        return StepSchedule(
            blocks=blocks, num_layers=layers, forecast="fitted", weights=weights, origin=f"{self.name!r}"
        )


_GROWTH = 1.8
"""Of the whole steps' distances: what dynamic programming finds for the tiny model looks like it."""


def _half_bent(step: int, sources: Sequence[int]) -> tuple[float, ...]:
    """Weights of what was added in up to three steps for the mean of the line and the parabola through them."""

    def through(points: Sequence[int]) -> list[float]:
        return [math.prod((step - other) / (each - other) for other in points if other != each) for each in points]

    line = [*through(sources[:2]), 0.0][: len(sources)]
    return tuple((straight + bent) / 2 for straight, bent in zip(line, through(sources), strict=True))


NAMED = {
    "quality": Spaced("quality", 1.5),
    "balanced": Spaced("balanced", 2.0),
    "fast": Spaced("fast", 3.0),
}
"""The named ones. What they do to the tiny model's videos: benchmarks/NOTES.md."""


COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "2b": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    "5b": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    "5b-i2v": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    "1.5-5b": (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    "1.5-5b-i2v": (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
}
"""TeaCache's polynomials, the highest power first (github.com/ali-vilab/TeaCache, TeaCache4CogVideoX1.5)."""


@dataclass(frozen=True)
class TeaCache:
    """TeaCache's rule (arXiv:2411.19108), which for CogVideoX looks at the time embedding alone.

    A step is skipped while the rescaled relative changes of the embedding since the last whole one add up to less than
    the threshold. Weights and timesteps decide, so all of it is known before the first step.
    """

    threshold: float

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The steps that the rule skips; the first and the last are whole."""
        parameter = next(model.time_embedding.parameters())
        with torch.no_grad():
            timestep_B = torch.tensor(list(timesteps), device=parameter.device, dtype=torch.float32)
            emb_BE = model.time_embedding(timestep_B, _dtype_of(model))
            if model.ofs_embedding is not None:
                ofs_B = torch.full_like(timestep_B, 2.0)
                emb_BE = emb_BE + model.ofs_embedding(ofs_B, emb_BE.dtype)
            emb_BE = emb_BE.float()
            changes = (emb_BE[1:] - emb_BE[:-1]).abs().mean(1) / emb_BE[:-1].abs().mean(1)
        layers = len(model.transformer_blocks)
        blocks, added = [layers], 0.0
        for step, change in enumerate(changes.tolist(), 1):
            added += _polynomial(COEFFICIENTS[_released(model)], change)
            is_whole = added >= self.threshold or step == len(timesteps) - 1
            blocks.append(layers if is_whole else 0)
            added = 0.0 if is_whole else added
        return StepSchedule(blocks=tuple(blocks), num_layers=layers, origin=f"TeaCache at {self.threshold:g}")


def _dtype_of(model: CogVideoXTransformer) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _released(model: CogVideoXTransformer) -> str:
    """The released model whose coefficients a model takes: the one with its options, whatever its size."""
    config: TransformerConfig = model.config  # type: ignore[assignment]  # the outer model's
    image = config.in_channels != config.out_channels
    if config.patch_size_t is not None:
        return "1.5-5b-i2v" if image else "1.5-5b"
    if not config.use_rotary_positional_embeddings:
        return "2b"
    return "5b-i2v" if image else "5b"


@dataclass(frozen=True)
class FirstBlock:
    """Decides at each step by what the first block adds: for comparison, since each decision waits for the device.

    The others' part is reused while the first block's residual differs by less than ``threshold`` (relative, L1) from
    that of the last whole step (as ParaAttention's first-block cache does).
    """

    threshold: float
    feature = Feature.FIRST_BLOCK


__all__ = [
    "COEFFICIENTS",
    "FORECASTS",
    "NAMED",
    "FirstBlock",
    "Forecast",
    "StepCacheError",
    "StepSchedule",
    "Strategy",
]
