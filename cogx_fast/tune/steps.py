"""Find a step schedule for a pipeline: record what the blocks add in each step, then choose which steps to compute.

A few videos are made whole. In each step, for a sample of the video's tokens, it is recorded what this and every
earlier step's blocks would do to the guided prediction (the head's derivative along what they added), as products of
all pairs. So for any earlier steps the weights are known with which a sum of their parts is nearest to this step's own,
and how far it is off. How much of that reaches the final latents follows from the scheduler's noise levels. Dynamic
programming finds the whole steps for which the sum of those errors is least, with what the last two of them added; the
schedule is then run, and holds the error that it made.
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
from cogx_fast.runtime.runner import ComputeBlocks, Inputs, Runner, Slots
from cogx_fast.runtime.step_caching.step_cache import StepCache
from cogx_fast.runtime.step_caching.step_schedule import Given, StepCacheError, StepSchedule
from cogx_fast.whole_file import whole_file

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer
    from cogx_fast.pipelines.generation import Request

Array = np.ndarray[Any, np.dtype[np.float64]]
_BEGINNING = 3
"""Steps that are always whole."""
_RIDGE = 1e-4
"""Part of the sources' squares that is added to each: weights of sources that differ little stay small."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gave."""

    schedule: StepSchedule
    """Its ``error`` is the mean over the requests, of the final latents, relative (2-norm)."""
    worst: float
    """The largest one."""
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
        on_step: called with the number of denoising steps done, of twice those of all requests.

    Raises:
        StepCacheError: (a ValueError) the pipeline or the requests are not as said above, or the file is of another
            search.
    """
    from cogx_fast.pipelines.generation import count_steps, run_pipeline

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
    count = count_steps(on_step)
    recorded = _Recorded.open(state, _key(model, pipe, requests, tokens), steps)
    for request in requests[len(recorded.latents) :]:
        recorder = _Recorder(request.guidance, tokens, recorded.products)
        model.runner = Runner(Slots(reuse=recorder, head=recorder.head))
        try:
            latents = run_latents(run_pipeline, pipe, request, count)
        finally:
            model.runner = Runner()
        recorded.latents.append(latents.numpy())
        recorded.save(state)
    count = count_steps(on_step, steps * len(requests))
    pipe.scheduler.set_timesteps(steps)  # nothing has run yet, where all was recorded before
    reaches = _reaches(pipe.scheduler, steps)
    costs = _costs(recorded.products, reaches)
    _, bounds = _choose(costs)
    choices, _ = _choose(_with_beginning(costs, min(_BEGINNING, whole)))
    layers = model.config.num_layers
    made = StepSchedule(
        blocks=tuple(layers if step in choices[whole] else 0 for step in range(steps)),
        num_layers=layers,
        forecast="fitted",
        weights=_weights(recorded.products, choices[whole]),
        scheduler=type(pipe.scheduler).__name__,
        timesteps=tuple(round(float(timestep)) for timestep in pipe.scheduler.timesteps),
        config_hash=hash_config(model.config),
        origin=f"cogx-fast tune steps: {whole} of {steps} steps whole, {len(requests)} prompts",
    )
    model.runner.use(dataclasses.replace(model.runner.slots, reuse=StepCache(Given(made))))
    try:
        errors = [
            _error(run_latents(run_pipeline, pipe, request, count), torch.from_numpy(wanted))
            for request, wanted in zip(requests, recorded.latents, strict=True)
        ]
    finally:
        model.runner = Runner()
    return Found(
        schedule=dataclasses.replace(made, error=float(np.mean(errors))),
        worst=max(errors),
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
        products: (step, source, source) to which this run's are added, as parts of the step's own square.
    """

    is_traceable = False

    def __init__(self, guidance: float, tokens: int, products: Array) -> None:
        self._guidance, self._tokens, self._products = guidance, tokens, products
        self._added: list[Tensor] = []
        self._rows: Tensor | None = None
        self._stream: list[Tensor] = []

    def __call__(
        self, compute: ComputeBlocks, x_BSD: Tensor, num_layers: int, model: CogVideoXTransformer, inputs: Inputs
    ) -> Tensor:
        """Every block."""
        begun = x_BSD
        x_BSD = compute(x_BSD, 0, num_layers)
        self._stream = [begun, x_BSD]
        return x_BSD

    def head(self, model: CogVideoXTransformer, x_BVD: Tensor, out_B2D: Tensor) -> Tensor:
        """The model's; beside it, what every step's part so far does to this one's prediction."""
        begun, done = self._stream
        self._stream = []
        text = done.shape[1] - x_BVD.shape[1]
        if self._rows is None:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(x_BVD.shape[1], generator=generator)[: self._tokens]
            self._rows = (text + chosen).to(x_BVD.device)
        begun, done = begun.index_select(1, self._rows), done.index_select(1, self._rows)
        self._added.append(done - begun)
        does = [self._guided(_along(lambda x: model.head(x, out_B2D), done, added)) for added in self._added]
        does_SP = torch.stack([each.flatten() for each in does]).double()
        exact = self._guided(model.head(done, out_B2D)).double().square().sum()
        step = len(self._added) - 1
        self._products[step, : step + 1, : step + 1] += (does_SP @ does_SP.T / exact).cpu().numpy()
        return model.head(x_BVD, out_B2D)

    def _guided(self, patches_BVP: Tensor) -> Tensor:
        if self._guidance <= 1 or patches_BVP.shape[0] % 2:
            return patches_BVP.float()
        without, with_prompt = patches_BVP.float().chunk(2)
        return without + self._guidance * (with_prompt - without)


def _along(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> Tensor:
    """The derivative of a function along a direction."""
    derivative: Tensor = torch.func.jvp(function, (at,), (direction,))[1]
    return derivative


def _reaches(scheduler: Any, steps: int) -> list[float]:
    """How much of an error in each step's v-prediction reaches the next latents.

    With noise levels as angles, cos² θ = ᾱ, a deterministic step from θ to θ' adds sin(θ - θ') times it.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or getattr(scheduler.config, "prediction_type", None) != "v_prediction":
        return [1.0 / steps] * steps
    chosen = alphas[scheduler.timesteps.long().cpu()].double().clamp(0, 1)
    angles = [*torch.acos(chosen.sqrt()).tolist(), 0.0]
    return [math.sin(abs(earlier - later)) for earlier, later in itertools.pairwise(angles)]


def _fit(products: Array, step: int, sources: Sequence[int]) -> tuple[Array, float]:
    """Weights with which what the sources added is nearest to what a step does, and how far that is off.

    They add up to 1: the head norms the stream, so it hardly sees how large all of it is, and its derivative says
    nothing about that.
    """
    chosen = [*sources, step]
    square = products[step][np.ix_(chosen, chosen)]
    turns = np.eye(len(chosen))[1:-1] - np.eye(len(chosen))[0]  # from the last whole step to earlier ones
    begin = np.eye(len(chosen))[0] - np.eye(len(chosen))[-1]  # how far the last whole one is off
    turned = turns @ square @ turns.T
    ridge = _RIDGE * max(float(np.trace(turned)), 1e-30) * np.eye(len(turns))
    parts = begin - np.linalg.solve(turned + ridge, turns @ square @ begin) @ turns
    return parts[:-1], math.sqrt(max(float(parts @ square @ parts), 0.0))


def _costs(products: Array, reaches: Sequence[float]) -> Array:
    """What it costs that (before, last, next) are whole steps that follow each other: the errors of those between.

    The first step has none before, and stands for itself; the last one's next is the end.
    """
    steps = len(products)
    costs = np.full((steps, steps, steps + 1), np.inf)
    for last in range(steps):
        for before in range(last) if last else (0,):
            sources = [last, before] if last else [0]
            errors = [_fit(products, step, sources)[1] * reaches[step] for step in range(last + 1, steps)]
            costs[before, last, last + 1 :] = np.cumsum([0.0, *errors])
    return costs


def _with_beginning(costs: Array, whole: int) -> Array:
    """The same without skips in the first steps, which decide the layout: small errors there make another video."""
    costs = costs.copy()
    for last in range(whole - 1):
        costs[:, last, last + 2 :] = np.inf
    return costs


def _choose(costs: Array) -> tuple[dict[int, frozenset[int]], list[float]]:
    """For each number of whole steps those with the least sum of costs, and that sum."""
    steps = len(costs)
    best = np.full((steps, steps + 1), np.inf)  # (a whole step, the next one)
    best[0] = costs[0, 0]
    came: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    chosen, bounds = {}, []
    for used in range(1, steps + 1):
        last = int(best[:, steps].argmin())
        bounds.append(float(best[last, steps]))
        whole, following = [last], steps
        for before in reversed(came):
            last, following = int(before[last, following]), last
            whole.append(last)
        chosen[used] = frozenset(whole)
        sums = best[:, :steps, None] + costs  # (before, last, next)
        sums[:, 0] = np.inf
        came.append(sums.argmin(0))
        best = sums.min(0)
    return chosen, bounds


def _weights(products: Array, whole: frozenset[int]) -> tuple[tuple[float, ...], ...]:
    """For each step the weights of the last two whole ones."""
    found: list[tuple[float, ...]] = []
    for step in range(len(products)):
        sources = sorted((each for each in whole if each < step), reverse=True)[:2]
        fitted = () if step in whole else _fit(products, step, sources)[0]
        found.append(tuple(round(float(weight), 4) for weight in fitted))
    return tuple(found)


@dataclass
class _Recorded:
    """What whole runs gave, in a file."""

    key: str
    products: Array
    latents: list[Any]

    @classmethod
    def open(cls, path: Path | None, key: str, steps: int) -> _Recorded:
        if path is None or not path.exists():
            return cls(key, np.zeros((steps, steps, steps)), [])
        try:
            with np.load(path) as held:
                found = cls(str(held["key"]), held["products"], list(held["latents"]))
        except (OSError, ValueError, KeyError) as error:
            raise StepCacheError(f"{path}: not what a search left behind ({error}): remove it to begin anew") from None
        if found.key != key:
            raise StepCacheError(f"{path}: is of a search with other settings: remove it, or give another --out")
        return found

    def save(self, path: Path | None) -> None:
        if path is None:
            return
        with whole_file(path) as hidden:
            np.savez(hidden, key=self.key, products=self.products, latents=np.stack(self.latents))


def _key(model: CogVideoXModel, pipe: Any, requests: Sequence[Request], tokens: int) -> str:
    wanted = [
        [each.prompt, each.negative_prompt, each.seed, each.steps, each.guidance, str(each.size)] for each in requests
    ]
    scheduler = json.dumps(dict(pipe.scheduler.config), default=str, sort_keys=True)
    text = json.dumps([hash_weights(model), hash_config(model.config), str(model.dtype), tokens, scheduler, wanted])
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["Found", "find_schedule"]
