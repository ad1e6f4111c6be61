"""A small model, timesteps, schedules, and generations as pipelines make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.runner import Runner
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from tests.support import inputs, small

LAYERS = 4


def make(name: str = "5b", **options: Any) -> CogVideoXModel:
    torch.manual_seed(0)
    return CogVideoXModel(small(name, num_layers=LAYERS, **options)).eval().requires_grad_(False)


def timesteps(steps: int) -> Tensor:
    return torch.linspace(999, 1, steps).round().long()


class Counted(Runner):
    """Counts the blocks that each step computes."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.slots)
        self.blocks: list[int] = []

        def told(layer: int, block: Any) -> Any:
            self.blocks[-1] += 1
            return runner.slots.call_block(layer, block)

        self.slots = replace(self.slots, call_block=told)

    def __call__(self, model: Any, inputs: Any) -> Tensor:
        self.blocks.append(0)
        return super().__call__(model, inputs)


def generate(model: CogVideoXModel, schedule: Tensor, **size: Any) -> list[Tensor]:
    """As a pipeline does: every step on the last one's output, its timestep a view of the schedule's."""
    arguments = inputs(model.config, **size)
    latents, outputs = arguments.pop("hidden_states"), []
    with torch.no_grad():
        for timestep in schedule:
            arguments["timestep"] = timestep.expand(latents.shape[0])
            with model.cache_context("cond_uncond"):
                outputs.append(model(latents, **arguments).sample)
            latents = latents - 0.1 * outputs[-1][:, :, : latents.shape[2]]
    return outputs


def generate_guided(model: CogVideoXModel, schedule: Tensor, **size: Any) -> list[Tensor]:
    """As a pipeline with guidance does: both halves of the batch on the same latents."""
    arguments = inputs(model.config, **size)
    outputs = []
    latents = arguments.pop("hidden_states").chunk(2)[0]
    with torch.no_grad():
        for timestep in schedule:
            arguments["timestep"] = timestep.expand(2 * latents.shape[0])
            with model.cache_context("cond_uncond"):
                outputs.append(model(torch.cat([latents] * 2), **arguments).sample)
            without, with_prompt = outputs[-1].chunk(2)
            latents = latents - 0.1 * (without + 6 * (with_prompt - without))[:, :, : latents.shape[2]]
    return outputs


def counted(model: CogVideoXModel, schedule: Tensor) -> list[int]:
    model.runner = runner = Counted(model.runner)
    generate(model, schedule)
    return runner.blocks


def schedule(*blocks: int, **options: Any) -> StepSchedule:
    return StepSchedule(blocks=blocks, num_layers=LAYERS, **options)
