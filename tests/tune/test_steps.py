"""``cogx-fast tune steps``: a schedule that is better than an even one, and a search that goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.pipelines.generation import Request, run_pipeline
from cogx_fast.runtime.runner import Runner
from cogx_fast.runtime.step_caching.step_cache import StepCache
from cogx_fast.runtime.step_caching.step_schedule import Given, StepCacheError, StepSchedule
from cogx_fast.runtime.step_caching.step_schedule_file import read_schedule
from cogx_fast.sizes import choose_video
from cogx_fast.tune.steps import _choose, _fit, find_schedule, run_latents
from tests.cases import for_each
from tests.conftest import report, run_cli

STEPS = 24


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import CogVideoXPipeline

    made = cogx_fast.accelerate(CogVideoXPipeline.from_pretrained(str(tiny_pipeline_dir())))
    made.set_progress_bar_config(disable=True)
    return made


def request(pipe: Any, prompt: str, **options: Any) -> Request:
    return Request(prompt=prompt, size=choose_video(pipe.transformer.config), **{"steps": STEPS, **options})


def error(pipe: Any, wanted: torch.Tensor, made: StepSchedule, held_out: Request) -> float:
    model = pipe.transformer
    model.runner.use(dataclasses.replace(model.runner.slots, reuse=StepCache(Given(made))))
    latents = run_latents(run_pipeline, pipe, held_out, lambda _: None)
    model.runner = Runner()
    return float((latents - wanted).norm() / wanted.norm())


def test_it_is_better_than_even_steps_on_another_prompt(pipe: Any) -> None:
    found = find_schedule(pipe, [request(pipe, "the digit three moving up")], speedup=2.5)
    assert found.schedule.speedup >= 2.4
    assert found.schedule.blocks[0] == pipe.transformer.config.num_layers
    assert found.schedule.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    held_out = request(pipe, "the digit seven moving left", seed=5)
    wanted = run_latents(run_pipeline, pipe, held_out, lambda _: None)
    layers, whole = pipe.transformer.config.num_layers, sum(map(bool, found.schedule.blocks))
    evenly = {round(number * (STEPS - 1) / (whole - 1)) for number in range(whole)}
    even = StepSchedule(
        blocks=tuple(layers if step in evenly else 0 for step in range(STEPS)), num_layers=layers, forecast="linear"
    )
    assert sum(even.blocks) == sum(found.schedule.blocks)
    assert error(pipe, wanted, found.schedule, held_out) < 0.5 * error(pipe, wanted, even, held_out)
    assert type(pipe.transformer.runner) is Runner


def test_a_search_that_was_stopped_goes_on(pipe: Any, tmp_path: Path) -> None:
    requests = [request(pipe, prompt, steps=6) for prompt in ("the digit one moving up", "the digit two moving down")]
    expected = find_schedule(pipe, requests, speedup=2)

    class Stopped(Exception):
        pass

    def stop(done: int) -> None:
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        find_schedule(pipe, requests, speedup=2, state=tmp_path / "s.npz", on_step=stop)
    assert type(pipe.transformer.runner) is Runner
    seen: list[int] = []
    assert find_schedule(pipe, requests, speedup=2, state=tmp_path / "s.npz", on_step=seen.append) == expected
    assert len(seen) == 6 + 2 * 6  # the second request, and both tried
    assert find_schedule(pipe, requests, speedup=2, state=tmp_path / "s.npz") == expected  # where none is left
    with pytest.raises(StepCacheError, match="another"):
        find_schedule(pipe, requests[:1], speedup=2, state=tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes(b"no archive")
    with pytest.raises(StepCacheError, match="remove it"):
        find_schedule(pipe, requests, speedup=2, state=tmp_path / "s.npz")


def test_dynamic_programming_finds_the_least_sum() -> None:
    steps = 7
    costs = np.random.default_rng(0).random((steps, steps, steps + 1))
    before, last, after = np.indices(costs.shape)
    costs[(after <= last) | ((before >= last) & (last > 0)) | (before > last)] = np.inf

    def total(whole: set[int]) -> float:
        order = [0, *sorted(whole), steps]  # the first step stands before itself
        return float(sum(costs[tuple(order[place : place + 3])] for place in range(len(whole))))

    chosen, bounds = _choose(costs)
    every = [{0} | {step for step in range(1, steps) if bits >> step & 1} for bits in range(0, 2**steps, 2)]
    for count in range(1, steps + 1):
        least = min(total(whole) for whole in every if len(whole) == count)
        assert bounds[count - 1] == pytest.approx(least)
        assert total(set(chosen[count])) == pytest.approx(least)


def test_weights_are_the_nearest_sum_of_what_was_kept() -> None:
    """Against least squares on the vectors themselves, with weights that add up to 1."""
    generator = np.random.default_rng(0)
    begin, turn, bend = generator.standard_normal((3, 40))
    parts = np.stack([begin + 0.1 * step * turn + 0.01 * step**2 * bend for step in range(5)])
    products = np.stack([parts @ parts.T] * 5)
    weights, off = _fit(products, 4, [3, 2, 0])
    assert weights.sum() == pytest.approx(1)
    assert off < 2e-2 * np.linalg.norm(parts[4] - parts[3])  # three points of a parabola give the fourth
    weights, off = _fit(products, 4, [3, 0])
    solved = np.linalg.lstsq((parts[0] - parts[3])[:, None], parts[4] - parts[3], rcond=None)[0]
    assert weights == pytest.approx([1 - solved[0], solved[0]], rel=1e-3)
    assert off == pytest.approx(np.linalg.norm(weights @ parts[[3, 0]] - parts[4]))
    assert _fit(products, 4, [3])[0] == pytest.approx([1.0])


@for_each("speedup", [1.0, 0.5, 100.0])
def test_what_cannot_be_is_refused(pipe: Any, speedup: float) -> None:
    with pytest.raises(StepCacheError, match="speedup"):
        find_schedule(pipe, [request(pipe, "a", steps=6)], speedup=speedup)


def test_the_command_writes_a_schedule_that_load_takes(tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    arguments = ("tune", "steps", "tiny", "--steps", 6, "--speedup", 2, "--prompts", "the digit one moving up")
    facts = report(run_cli(*arguments, "--out", out, "--json"))
    made = read_schedule(out)
    assert facts["speedup"] == made.speedup == 2
    assert facts["error"] == made.error
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["plan.png", "plan.toml"]
    work = ("generate", "--model", "tiny", "--prompt", "the digit one moving up", "--steps", 6, "--json")
    assert report(run_cli(*work, "--step-cache", out, "--out", tmp_path / "a.mp4"))["step_cache"] == str(out)
    assert cogx_fast.load("tiny", step_cache=out).runner.slots.reuse.strategy == Given(made)
