"""A training run: steps with a schedule, an average of the weights, checkpoints, and the same result after a kill.

Everything random in step n comes from a generator on the CPU seeded with n (and the worker's rank): so a resumed run
repeats an uninterrupted one, and a GPU draws what a CPU does. Several workers, one thread each, share a batch and
average their gradients: on a few cores that is faster than one worker with several threads, which wait for each other
in every kernel.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogx_fast.model.cpu import computes

Loss = Callable[[int, torch.Generator], Tensor]


@dataclass(kw_only=True)
class Run:
    """One stage of training."""

    name: str
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Loss
    """(step, generator) -> the loss to differentiate"""
    steps: int
    warmup: int
    decay: Callable[[float], float]
    """Part of the steps after warm-up that are done -> factor of the learning rate."""
    ema: float
    seed: int
    clip: float = 1.0
    checkpoint_every: int = 100
    average: dict[str, Tensor] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the last entry)"""


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def hold_then_linear(done: float) -> float:
    """Full to the middle, then down in a line: so that how many steps there will be may be settled half-way."""
    return min(1.0, 2 * (1 - done))


def train(run: Run, folder: Path, *, stop_at: int | None = None) -> None:
    """Do what is left of a run; the model then holds the averaged weights.

    Args:
        run: what to do; its state is taken from the checkpoint in ``folder`` where there is one.
        folder: where ``<name>.pt`` is kept.
        stop_at: leave off after this step, as if killed (the checkpoint of that step is written).
    """
    path = folder / f"{run.name}.pt"
    start = _restore(run, path)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in run.optimizers]
    if start:
        rates = [[group["initial_lr"] for group in optimizer.param_groups] for optimizer in run.optimizers]
    progress = _Progress(run.name, run.steps, start) if rank() == 0 else None
    run.model.train()
    losses: list[float] = []
    end = run.steps if stop_at is None else min(stop_at, run.steps)
    for step in range(start, end):
        _set_rates(run, rates, step)
        generator = torch.Generator().manual_seed((run.seed << 32) + (step << 8) + rank())
        loss = run.loss(step, generator)
        loss.backward()
        loss = _average_over_workers(run.model, loss.detach())
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.clip)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _update_average(run, step)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == end:
            run.history.append((step + 1, sum(losses) / len(losses)))
            losses = []
            if progress:
                progress.show(*run.history[-1])
        if rank() == 0 and ((step + 1) % run.checkpoint_every == 0 or step + 1 == end):
            _save(run, path, step + 1)
    run.model.load_state_dict(run.average)
    run.model.eval()
    if dist.is_initialized():
        dist.barrier()


def arithmetic(device: torch.device) -> torch.autocast:
    """Products in bf16 inside the ``with`` block, but on a CPU that has none and would take 40 times as long."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or computes(torch.bfloat16))


def device_of(model: nn.Module) -> torch.device:
    """Where a model is trained."""
    return next(model.parameters()).device


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many workers share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: int) -> int:
    """This worker's part of a batch."""
    if batch % world():
        raise ValueError(f"a batch of {batch} cannot be shared by {world()} workers evenly: choose another number")
    return batch // world()


def _average_over_workers(model: nn.Module, loss: Tensor) -> Tensor:
    if world() == 1:
        return loss
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    flat /= world()
    sizes = [1, *(gradient.numel() for gradient in gradients)]
    mean_loss, *parts = flat.split(sizes)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return mean_loss[0]


def _set_rates(run: Run, rates: list[list[float]], step: int) -> None:
    factor = _rate_factor(run, step, run.steps)
    for optimizer, initial in zip(run.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor


def _rate_factor(run: Run, step: int, steps: int) -> float:
    rise = min(1.0, (step + 1) / max(1, run.warmup))
    return rise * run.decay(max(0, step - run.warmup) / max(1, steps - run.warmup))


@torch.no_grad()
def _update_average(run: Run, step: int) -> None:
    """An exponential average; its early steps weigh as in a plain mean, so that it forgets the start."""
    state = run.model.state_dict()
    if not run.average:
        run.average = {name: value.detach().clone() for name, value in state.items()}
    keep = min(run.ema, (1 + step) / (10 + step))
    names = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([run.average[n] for n in names], [state[n] for n in names], 1 - keep)


def _save(run: Run, path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    state: dict[str, Any] = {
        "step": step, "steps": run.steps, "seed": run.seed, "model": run.model.state_dict(), "average": run.average,
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers], "history": run.history,
    }  # fmt: skip
    torch.save(state, temporary)
    temporary.replace(path)


def _restore(run: Run, path: Path) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location=device_of(run.model))
    done = int(state["step"])
    same_rates = done == 0 or _rate_factor(run, done - 1, run.steps) == _rate_factor(run, done - 1, state["steps"])
    if state["seed"] != run.seed or not same_rates:
        raise SystemExit(
            f"{path} is of a run of {state['steps']} steps with seed {state['seed']}, not of {run.steps} with "
            f"{run.seed}: remove it, or choose another --work folder"
        )
    run.model.load_state_dict(state["model"])
    run.average = state["average"]
    run.history = [(step, loss) for step, loss in state["history"]]
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return done


class _Progress:
    """A bar on a terminal; a line now and then elsewhere."""

    def __init__(self, name: str, steps: int, start: int) -> None:
        self.name, self.steps, self.start = name, steps, start
        self.began = self.shown = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def show(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if not self.is_terminal and now - self.shown < 20 and step < self.steps:
            return
        self.shown = now
        pace = (now - self.began) / max(1, step - self.start)
        left = pace * (self.steps - step)
        line = f"{self.name} {step}/{self.steps}  loss {loss:.4f}  {pace:.3f} s/step  {left / 60:.1f} min left"
        if self.is_terminal:
            width = 24 * step // self.steps
            line = f"\r[{'█' * width}{' ' * (24 - width)}] {line}\033[K"
        print(line, end="\n" if step == self.steps or not self.is_terminal else "", file=sys.stderr, flush=True)


__all__ = ["Run", "cosine", "device_of", "hold_then_linear", "rank", "share", "train", "world"]
