"""Find a step schedule for a pipeline: record what the blocks add in each step, then choose which steps to compute.

A few videos are made whole. In each step, for a sample of the video's tokens, what the blocks added is kept; so for
every pair of steps it is known how far the guided prediction of the later one is off when the earlier one's part stands
in. How much of that reaches the final latents follows from the scheduler's noise levels. Dynamic programming finds the
whole steps for which the sum of those errors is least; the schedule is then run, and holds the error that it made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cogx_fast.attention.plan import hash_config, hash_weights
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.runner import ComputeBlocks, Runner, Slots
from cogx_fast.runtime.step_cache import StepCache
from cogx_fast.runtime.step_schedule import FORECASTS, Forecast, Given, StepCacheError, StepSchedule

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer
    from cogx_fast.pipelines.generation import Request

Errors = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gave."""

    schedule: StepSchedule
    """Its ``error`` is the mean over the requests, of the final latents, relative (2-norm)."""
    worst: float
    """The largest one."""
    measured: dict[str, float]
    """The mean error with each forecast."""
    bounds: tuple[float, ...]
    """For 1, 2, … whole steps the least sum of predicted errors, as a part of that of one whole step."""


def find_schedule(
    pipe: Any,
    requests: Sequence[Request],
    *,
    speedup: float,
    tokens: int = 256,
    state: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Found:
    """Choose which steps compute all blocks, so that ``speedup`` times fewer are computed; the others compute none.

    Args:
        pipe: a CogVideoX pipeline with this package's transformer in it, not compiled and without a step cache.
        requests: what to generate, all with the same steps and guidance.
        speedup: more than 1.
        tokens: of the video, sampled.
        state: a file where what was recorded is kept after every request, so that a search that was stopped goes on.
        on_step: called with the number of denoising steps done, of ``1 + len(FORECASTS)`` times those of all requests.

    Raises:
        StepCacheError: (a ValueError) the pipeline or the requests are not as said above, or the file is of another
            search.
    """
    from cogx_fast.pipelines.generation import run_pipeline

    model = pipe.transformer
    plain = isinstance(model, CogVideoXModel) and type(model.runner) is Runner and model.runner.slots == Slots()
    if not plain:
        raise StepCacheError("schedules are found with this package's transformer, uncompiled and without a step cache")
    steps = requests[0].steps
    if any((each.steps, each.guidance) != (steps, requests[0].guidance) for each in requests):
        raise StepCacheError("all requests must have the same steps and guidance")
    whole = math.ceil(steps / speedup) if 1 < speedup <= steps else steps
    if whole == steps:
        raise StepCacheError(f"speedup is {speedup:g} with {steps} steps, expected more than 1, and at most {steps}")
    done = 0

    def count(_: int) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done)

    recorded = _Recorded.open(state, _key(model, pipe, requests, tokens), steps)
    for request in requests[len(recorded.latents) :]:
        recorder = _Recorder(request.guidance, tokens, recorded.errors)
        model.runner = Runner(Slots(reuse=recorder, head=recorder.head))
        try:
            latents = run_latents(run_pipeline, pipe, request, count)
        finally:
            model.runner = Runner()
        recorded.latents.append(latents.numpy())
        recorded.save(state)
    done = steps * len(requests)
    weights = _weights(pipe.scheduler, steps)
    choices, bounds = _choose(recorded.errors, weights)
    layers = model.config.num_layers
    made = StepSchedule(
        blocks=tuple(layers if step in choices[whole] else 0 for step in range(steps)),
        num_layers=layers,
        scheduler=type(pipe.scheduler).__name__,
        config_hash=hash_config(model.config),
        origin=f"cogx-fast tune steps: {whole} of {steps} steps whole, {len(requests)} prompts",
    )
    errors: dict[Forecast, list[float]] = {}
    for forecast in FORECASTS:
        tried = dataclasses.replace(made, forecast=forecast)
        model.runner.use(dataclasses.replace(model.runner.slots, reuse=StepCache(Given(tried))))
        try:
            errors[forecast] = [
                _error(run_latents(run_pipeline, pipe, request, count), torch.from_numpy(wanted))
                for request, wanted in zip(requests, recorded.latents, strict=True)
            ]
        finally:
            model.runner = Runner()
    means = {forecast: float(np.mean(each)) for forecast, each in errors.items()}
    best = min(means, key=means.__getitem__)
    return Found(
        schedule=dataclasses.replace(made, forecast=best, error=means[best]),
        worst=max(errors[best]),
        measured={str(forecast): mean for forecast, mean in means.items()},
        bounds=tuple(bound / bounds[0] for bound in bounds),
    )


def run_latents(run_pipeline: Callable[..., Any], pipe: Any, request: Request, count: Callable[[int], None]) -> Tensor:
    """The final latents of a request, in fp32 on the CPU."""
    kept: list[Tensor] = []
    before = pipe.scheduler.step

    def step(*arguments: Any, **options: Any) -> Any:
        stepped = before(*arguments, **options)
        kept[:] = [stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample]
        return stepped

    pipe.scheduler.step = step
    try:
        run_pipeline(pipe, request, decode=False, on_step=count)
    finally:
        del pipe.scheduler.step
    return kept[0].float().cpu()


def _error(latents: Tensor, wanted: Tensor) -> float:
    return float((latents - wanted).norm() / wanted.norm())


class _Recorder:
    """The runner's ``reuse`` and ``head`` of a whole run: notes, for a sample of tokens, what the blocks add.

    Args:
        guidance: of the run; 1 and less is none.
        tokens: sampled.
        errors: to which this run's are added: (step whose part stands in, step).
    """

    is_traceable = False

    def __init__(self, guidance: float, tokens: int, errors: Errors) -> None:
        self._guidance, self._tokens, self._errors = guidance, tokens, errors
        self._added: list[Tensor] = []
        self._rows: Tensor | None = None
        self._stream: list[Tensor] = []

    def __call__(
        self, compute: ComputeBlocks, x_BSD: Tensor, num_layers: int, model: CogVideoXTransformer, timestep_B: Tensor
    ) -> Tensor:
        """Every block."""
        begun = x_BSD
        x_BSD = compute(x_BSD, 0, num_layers)
        self._stream = [begun, x_BSD]
        return x_BSD

    def head(self, model: CogVideoXTransformer, x_BVD: Tensor, out_B2D: Tensor) -> Tensor:
        """The model's; what each earlier step's part would have made of this one is compared with it."""
        begun, done = self._stream
        self._stream = []
        text = done.shape[1] - x_BVD.shape[1]
        if self._rows is None:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(x_BVD.shape[1], generator=generator)[: self._tokens]
            self._rows = (text + chosen).to(x_BVD.device)
        begun, done = begun.index_select(1, self._rows), done.index_select(1, self._rows)
        step = len(self._added)
        exact = self._guided(model.head(done, out_B2D))
        for earlier, added in enumerate(self._added):
            instead = self._guided(model.head(begun + added.to(begun), out_B2D))
            self._errors[earlier, step] += float((instead - exact).norm() / exact.norm())
        self._added.append((done - begun).cpu())
        return model.head(x_BVD, out_B2D)

    def _guided(self, patches_BVP: Tensor) -> Tensor:
        if self._guidance <= 1 or patches_BVP.shape[0] % 2:
            return patches_BVP.float()
        without, with_prompt = patches_BVP.float().chunk(2)
        return without + self._guidance * (with_prompt - without)


def _weights(scheduler: Any, steps: int) -> list[float]:
    """How much of an error in each step's v-prediction reaches the next latents.

    With noise levels as angles, cos² θ = ᾱ, a deterministic step from θ to θ' adds sin(θ - θ') times it.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or getattr(scheduler.config, "prediction_type", None) != "v_prediction":
        return [1.0 / steps] * steps
    chosen = alphas[scheduler.timesteps.long().cpu()].double().clamp(0, 1)
    angles = [*torch.acos(chosen.sqrt()).tolist(), 0.0]
    return [math.sin(abs(earlier - later)) for earlier, later in itertools.pairwise(angles)]


def _choose(errors: Errors, weights: Sequence[float]) -> tuple[dict[int, frozenset[int]], list[float]]:
    """For each number of whole steps those with the least sum of weighted errors, and that sum."""
    steps = len(weights)
    weighted = errors * np.asarray(weights)
    costs = np.zeros((steps, steps + 1))  # of taking step i's part in all steps up to j
    for earlier in range(steps):
        costs[earlier, earlier + 2 :] = np.cumsum(weighted[earlier, earlier + 1 :])
    best = np.full((steps + 1, steps + 1), np.inf)  # (whole steps used, the next one)
    best[0, 0] = 0.0
    came = np.zeros((steps + 1, steps + 1), dtype=int)
    for used in range(1, steps + 1):
        for following in range(used, steps + 1):
            candidates = [best[used - 1, last] + costs[last, following] for last in range(used - 1, following)]
            came[used, following] = used - 1 + int(np.argmin(candidates))
            best[used, following] = min(candidates)
    chosen = {}
    for used in range(1, steps + 1):
        following, whole = steps, []
        for left in range(used, 0, -1):
            following = came[left, following]
            whole.append(int(following))
        chosen[used] = frozenset(whole)
    return chosen, [float(best[used, steps]) for used in range(1, steps + 1)]


@dataclass
class _Recorded:
    """What whole runs gave, in a file."""

    key: str
    errors: Errors
    latents: list[Any]

    @classmethod
    def open(cls, path: Path | None, key: str, steps: int) -> _Recorded:
        if path is None or not path.exists():
            return cls(key, np.zeros((steps, steps)), [])
        try:
            with np.load(path) as held:
                found = cls(str(held["key"]), held["errors"], list(held["latents"]))
        except (OSError, ValueError, KeyError) as error:
            raise StepCacheError(f"{path}: not what a search left behind ({error}): remove it to begin anew") from None
        if found.key != key:
            raise StepCacheError(f"{path}: is of a search with other settings: remove it, or give another --out")
        return found

    def save(self, path: Path | None) -> None:
        if path is None:
            return
        part = path.with_suffix(".part.npz")
        np.savez(part, key=self.key, errors=self.errors, latents=np.stack(self.latents))
        part.replace(path)


def _key(model: CogVideoXModel, pipe: Any, requests: Sequence[Request], tokens: int) -> str:
    wanted = [
        [each.prompt, each.negative_prompt, each.seed, each.steps, each.guidance, str(each.size)] for each in requests
    ]
    scheduler = json.dumps(dict(pipe.scheduler.config), default=str, sort_keys=True)
    text = json.dumps([hash_weights(model), hash_config(model.config), str(model.dtype), tokens, scheduler, wanted])
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["Found", "find_schedule"]
