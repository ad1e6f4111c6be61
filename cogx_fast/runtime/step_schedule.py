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

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer

Forecast = Literal["reuse", "linear"]
FORECASTS: tuple[Forecast, ...] = ("reuse", "linear")
"""What stands in for blocks that are not computed: what they added in the last whole step; or a line through what they
added in the last two."""


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
    scheduler: str | None = None
    """The class of the scheduler that it was made with, for whoever reads it: a model does not see its scheduler."""
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

    @property
    def steps(self) -> int:
        """Of the schedule."""
        return len(self.blocks)

    @property
    def speedup(self) -> float:
        """How many times fewer blocks are computed than without it."""
        return self.num_layers * self.steps / sum(self.blocks)

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
        """The same for another number of steps: each does as the step at its place in the schedule does."""
        if steps == self.steps:
            return self
        last = self.steps - 1
        places = [round(step * last / max(1, steps - 1)) for step in range(steps)]
        blocks = (self.num_layers, *(self.blocks[place] for place in places[1:]))
        return dataclasses.replace(self, blocks=blocks, error=None)


class Strategy(Protocol):
    """Where a schedule comes from, once the timesteps are known."""

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The schedule of a generation with these timesteps, the first one first."""


@dataclass(frozen=True)
class Given:
    """A schedule that is there already; for another number of steps it is adapted, with a warning."""

    given: StepSchedule

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The schedule itself, or that adapted."""
        if len(timesteps) != self.given.steps:
            warnings.warn(
                f"the step schedule is for {self.given.steps} steps and the video is made in {len(timesteps)}: it is "
                "adapted, and its error is not known; take one that is made for so many steps",
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
class Even:
    """Whole steps first and last and evenly between, so many that ``speedup`` times fewer blocks are computed.

    In the other steps no block is, and what they would add lies on a line through the last two whole steps.
    """

    name: str
    speedup: float
    whole_at_first: float
    """Part of the steps at the beginning that are whole: there the picture's layout is decided."""

    def schedule(self, model: CogVideoXTransformer, timesteps: Sequence[float]) -> StepSchedule:
        """The schedule for so many steps."""
        steps, layers = len(timesteps), len(model.transformer_blocks)
        begin = min(steps, max(1, math.ceil(steps * self.whole_at_first)))
        whole = set(range(begin)) | {steps - 1}
        more = max(0, math.ceil(steps / self.speedup) - len(whole))
        between = steps - 1 - begin
        whole |= {begin + math.floor((number + 0.5) * between / more) for number in range(min(more, between))}
        blocks = tuple(layers if step in whole else 0 for step in range(steps))
        return StepSchedule(blocks=blocks, num_layers=layers, forecast="linear", origin=f"{self.name!r}")


EVEN = {
    "quality": Even("quality", 1.5, 0.2),
    "balanced": Even("balanced", 2.0, 0.1),
    "fast": Even("fast", 3.0, 0.1),
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


__all__ = [
    "COEFFICIENTS",
    "EVEN",
    "FORECASTS",
    "FirstBlock",
    "Forecast",
    "StepCacheError",
    "StepSchedule",
    "Strategy",
]
