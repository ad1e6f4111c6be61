"""Step caches to compare: ours and those of unmodified diffusers, each with its knobs.

A family is one way of caching with a grid of settings; which of them is taken for a budget is decided on prompts that
are not judged (``benchmarks.tiny.steps``), so that each way is seen at its best.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogx_fast.runtime.step_caching.step_schedule import NAMED, StepSchedule, TeaCache
from cogx_fast.sizes import count_tokens, default_video
from cogx_fast.weights.live import model_config

Applied = Callable[[Any], AbstractContextManager[None]]
THRESHOLDS = tuple(round(0.02 * 1.25**number, 4) for number in range(16))
"""Of the first block's change."""


@dataclass(frozen=True)
class Setting:
    """One way of caching with its knobs set."""

    knobs: str
    """As the results name it."""
    applied: Applied
    """On a pipeline, for one call of it."""
    speedup: float | None = None
    """How many times fewer blocks are computed; None: to be counted."""


@dataclass(frozen=True)
class Family:
    """One way of caching."""

    name: str
    owner: str
    """ "ours" or "diffusers": whose transformer it runs in."""
    settings: tuple[Setting, ...]
    decides: bool = False
    """By what it computes, so that videos are made one by one."""


# ---------------------------------------------------------------------------------------------------------------- ours


def ours(name: str, settings: dict[str, Any], *, decides: bool = False) -> Family:
    """A family of what ``set_step_cache`` takes, by the knobs."""

    def applied(value: Any) -> Applied:
        @contextlib.contextmanager
        def on(pipe: Any) -> Iterator[None]:
            pipe.transformer.set_step_cache(value)
            try:
                yield
            finally:
                pipe.transformer.set_step_cache(None)

        return on

    found = (Setting(knobs, applied(value), getattr(value, "speedup", None)) for knobs, value in settings.items())
    return Family(name, "ours", tuple(found), decides)


def own_families(model: Any, timesteps: list[float]) -> list[Family]:
    """Ours that need no search; TeaCache's rule as the schedules that it makes of rising thresholds."""
    rule = {}
    for threshold in (0.005 * number for number in range(4, 120)):
        made = TeaCache(threshold).schedule(model, timesteps)
        rule.setdefault(made.blocks, (f"{threshold:.3f}", made))
    return [
        ours("TeaCache's rule", dict(rule.values())),
        ours("guidance caching", dict(_guidance(model.config.num_layers, len(timesteps)))),
        ours(
            "first block",
            {f"{threshold:g}": f"first-block:{threshold:g}" for threshold in THRESHOLDS},
            decides=True,
        ),
        ours("by name", {name: NAMED[name].schedule(model, timesteps) for name in NAMED}),
    ]


def _guidance(layers: int, steps: int) -> Iterator[tuple[str, StepSchedule]]:
    """Whole steps at an even distance, and both halves in an even part of them."""
    for forecast, whole, both in itertools.product(("reuse", "linear"), (1, 2, 3), (1, 2, 3, 4, 6)):
        begin = math.ceil(steps / 10)
        if both == 1:
            continue
        numbers = [*range(begin), *range(begin, steps - 1, whole), steps - 1]
        halves = {*range(begin), *numbers[begin::both], steps - 1}
        yield (
            f"{forecast}, every {whole}, both every {whole * both}",
            StepSchedule(
                blocks=tuple(layers if step in numbers else 0 for step in range(steps)),
                unconditional=tuple(int(step in halves) for step in range(steps)),
                num_layers=layers,
                forecast=forecast,  # type: ignore[arg-type]
            ),
        )


# ----------------------------------------------------------------------------------------------------------- diffusers


def upstream(name: str, settings: dict[str, Callable[[Any], Any]], *, decides: bool = False) -> Family:
    """A family of diffusers' configurations, made for a pipeline, by the knobs."""

    def applied(make: Callable[[Any], Any]) -> Applied:
        @contextlib.contextmanager
        def on(pipe: Any) -> Iterator[None]:
            pipe.transformer.enable_cache(make(pipe))
            try:
                yield
            finally:
                pipe.transformer.disable_cache()

        return on

    return Family(name, "diffusers", tuple(Setting(knobs, applied(make)) for knobs, make in settings.items()), decides)


def upstream_families(steps: int, ratios: list[float]) -> list[Family]:
    """diffusers' caches that run on CogVideoX.

    Args:
        steps: of denoising.
        ratios: MagCache's, as ``calibrate`` returns them.
    """
    import diffusers

    def taylor(interval: int, before: int, order: int, **patterns: Any) -> Callable[[Any], Any]:
        return lambda pipe: diffusers.TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=before, max_order=order,
            taylor_factors_dtype=torch.float32, **patterns,
        )  # fmt: skip

    def mag(threshold: float, most: int, retention: float) -> Callable[[Any], Any]:
        return lambda pipe: diffusers.MagCacheConfig(
            threshold=threshold, max_skip_steps=most, retention_ratio=retention, num_inference_steps=steps,
            mag_ratios=list(ratios),
        )  # fmt: skip

    intervals = [
        (interval, before, order) for interval, before, order in itertools.product((2, 3, 4), (1, 5, 11, 16), (1, 2))
    ]
    parts = {"cache_identifiers": [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"]}
    return [
        upstream("FirstBlockCache", {
            f"{threshold:g}": lambda pipe, threshold=threshold: diffusers.FirstBlockCacheConfig(threshold=threshold)
            for threshold in THRESHOLDS
        }, decides=True),
        upstream("MagCache", {
            f"{threshold:.2f}, {most} steps, {retention}": mag(threshold, most, retention)
            for threshold, most, retention in itertools.product(
                [0.03 * 1.6**number for number in range(7)], (1, 2, 3, 5), (0.1,)
            )
        }),
        upstream("TaylorSeer lite", {
            f"every {i}, {b} first, order {o}": taylor(i, b, o, use_lite_mode=True) for i, b, o in intervals
        }),
        upstream("TaylorSeer", {f"every {i}, {b} first, order {o}": taylor(i, b, o, **parts) for i, b, o in intervals}),
        upstream("PyramidAttentionBroadcast", dict(_pyramid())),
        upstream("FasterCache", dict(_faster())),
    ]  # fmt: skip


def _pyramid() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    import diffusers

    for skip, least, most in itertools.product((2, 4, 8, 12), (-1, 100), (800, 1000)):
        yield (
            f"every {skip}, {least} to {most}",
            lambda pipe, skip=skip, least=least, most=most: diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=(least, most),
                current_timestep_callback=lambda: pipe.current_timestep,
            ),
        )


def _faster() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    import diffusers

    grid = itertools.product((2, 5, 12), (641, 950), (2, 5), (681, 950))
    for skip, most, attention, attention_most in grid:
        knobs = f"unconditional every {skip} below {most}, attention every {attention} below {attention_most}"
        yield (
            knobs,
            lambda pipe, skip=skip, most=most, attention=attention, attention_most=attention_most: (
                diffusers.FasterCacheConfig(
                    unconditional_batch_skip_range=skip,
                    unconditional_batch_timestep_skip_range=(-1, most),
                    spatial_attention_block_skip_range=attention,
                    spatial_attention_timestep_skip_range=(-1, attention_most),
                    attention_weight_callback=lambda _: 0.3,
                    tensor_format="BFCHW",
                    current_timestep_callback=lambda: pipe.current_timestep,
                )
            ),
        )


def calibrate(pipe: Any, run: Callable[[Any], Any], steps: int) -> list[float]:
    """MagCache's ratios by its own calibration, which prints them.

    Args:
        pipe: with diffusers' transformer.
        run: makes videos with it.
        steps: of denoising.
    """
    import diffusers

    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=steps))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run(pipe)
    finally:
        pipe.transformer.disable_cache()
    line = next(line for line in printed.getvalue().splitlines() if line.startswith("[") and "MagCache" not in line)
    return [float(ratio) for ratio in json.loads(line)]


# ------------------------------------------------------------------------------------------------------------ counting


class Evaluations:
    """Counts what is computed of the blocks: attention and feed-forward apart, each by its share of operations."""

    def __init__(self, pipe: Any) -> None:
        transformer = pipe.transformer
        config = model_config(transformer)
        width = config.inner_dim
        tokens = count_tokens(config, default_video(config)).joint
        attention, forward = 8 * width**2 + 4 * tokens * width, 16 * width**2
        share = attention / (attention + forward)
        self._values = tokens * width
        self.done = 0.0
        """Blocks of one video in one step."""
        self._handles = []
        for name, module in transformer.named_modules():
            if name.endswith((".attn1.to_q", ".attn1.to_qkv")):
                self._handles.append(module.register_forward_pre_hook(self._count(share)))
            elif name.startswith("transformer_blocks") and name.endswith(".ff.net.0.proj"):
                self._handles.append(module.register_forward_pre_hook(self._count(1 - share)))

    def _count(self, share: float) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def count(_: Any, given: tuple[Tensor, ...]) -> None:
            self.done += share * given[0].numel() / self._values

        return count

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


__all__ = ["Evaluations", "Family", "Setting", "calibrate", "ours", "own_families", "upstream_families"]
