"""A budget of a GPU's memory: the recipe and the layout that keep a whole pipeline to it, and what they are to take.

Peaks are those of the real code (``pipelines.peaks``). Times are what the ceilings of a described GPU allow at best
(``measure.roofline``): they say which of two choices is faster, and are predictions, not measurements.
"""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from cogx_fast.config import TransformerConfig
from cogx_fast.measure import roofline
from cogx_fast.measure.devices import DEVICES, PCIE_SHARE, PCIE_X16, Device, find_device
from cogx_fast.pipelines.memory import SPARE, WORDS, Needs, estimate, gib, phases, place, stored_bytes, unpacked_bytes
from cogx_fast.runtime.runner import compute_all
from cogx_fast.runtime.streaming import SLOTS
from cogx_fast.sizes import Tokens, VideoSize, count_tokens, default_video
from cogx_fast.weights.live import model_config
from cogx_fast.weights.quantized import is_quantized

RECIPE = "int8-weight-only"
"""What is chosen where the recipe is left open and no exact layout does: it runs on every GPU, and of the recipes with
8 bits a weight its videos are nearest to the original ones (docs/quantize.md)."""
LINK = "PCIe 4.0 × 16"
"""That weights are taken to come over from the host."""
STEPS = 50
"""Of the generation whose time is predicted."""
_WORTH = 1.05
"""How many times faster a step has to be before the weights are quantized for it."""
_LEAST = "int4-weight-only"
"""What a recipe that is not known here is taken to store, until the weights are there."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Predicts times from a described GPU's ceilings."""

    device: Device
    config: TransformerConfig
    tokens: Tokens
    batch: int = 2

    def step_seconds(self, recipe: str | None, kind: str) -> float | None:
        """Of a denoising step at least; None: of that recipe on that GPU nothing is known."""
        scheme = recipe or roofline.UNQUANTIZED
        if scheme not in roofline.SCHEMES or (roofline.SCHEMES[scheme].products == "fp8" and not self.device.fp8):
            return None
        found = roofline.parts(self.config, self.tokens, batch=self.batch, scheme=scheme)
        resident = sum(part.seconds(self.device) for part in found)
        if kind != "blocks":
            return resident
        links = roofline.streaming(self.config, found, self.device, scheme=scheme)
        return max(resident, *(each.step_seconds for each in links if each.link == LINK))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a pipeline keeps to a budget."""

    recipe: str | None
    """That the transformer's blocks are stored by; None: in their own dtype."""
    kind: str
    """One of ``memory.OFFLOADS`` but "sequential"."""
    vae_tiling: bool
    text_int8: bool
    """Whether the text encoder's linears are stored in int8."""
    peaks: Mapping[str, int]
    """Bytes on the GPU at the peak of each phase, with what is left to CUDA and its libraries."""
    step_seconds: float | None
    """Predicted of a step, at least."""
    copy_seconds: float
    """Predicted of a generation's copies from the host, beside streamed blocks."""

    @property
    def seconds(self) -> float | None:
        """Predicted of a generation's denoising and copies, at least; encoding text and decoding are not in it."""
        return None if self.step_seconds is None else STEPS * self.step_seconds + self.copy_seconds


def choose_plan(
    needs: Mapping[str | None, Needs], text_encoder: torch.nn.Module, budget: int, clock: Clock | None = None
) -> Plan | None:
    """The first plan in the order of ``_plans`` that keeps to a budget, unless it streams blocks; None: no plan does.

    That order is: exact ones first, then those with fewer copies, then those with the VAE whole. Where exact blocks
    have to be streamed, or do not fit, the plan with the shortest step is taken, which a recipe has to make 1.05 times
    shorter.

    Args:
        needs: the pipeline's, by the recipes to choose from, the preferred one first.
        text_encoder: its linears are stored in int8 where it does not fit in any other way.
        budget: bytes of the GPU.
        clock: predicts times; None: the GPU is not described.
    """
    room = budget - SPARE
    text_int8 = room < next(iter(needs.values())).weights["text_encoder"]
    if text_int8:
        size = _int8_bytes(text_encoder)
        needs = {name: replace(each, weights={**each.weights, "text_encoder": size}) for name, each in needs.items()}
    preferred = next(iter(needs))

    def cost(plan: Plan) -> float:
        return (plan.step_seconds or 0.0) * (1.0 if plan.recipe == preferred else _WORTH)

    fitting = [plan for plan in _plans(needs, text_int8, clock) if max(plan.peaks.values()) <= budget]
    resident = (plan for plan in fitting if plan.recipe == preferred and plan.kind != "blocks")
    return next(resident, None) or min(fitting, key=cost, default=None)


def _plans(needs: Mapping[str | None, Needs], text_int8: bool, clock: Clock | None) -> Iterator[Plan]:
    """All there are."""
    for recipe, needed in needs.items():
        for kind in ("none", "model", "blocks"):
            step = None if clock is None else clock.step_seconds(recipe, kind)
            copied = {name: size for name, size in needed.weights.items() if (kind, name) != ("blocks", "transformer")}
            for tiled in (False, True):
                peaks = phases(needed, kind, tiled)
                if peaks:
                    yield Plan(
                        recipe=recipe, kind=kind, vae_tiling=tiled, text_int8=text_int8,
                        peaks={phase: size + SPARE for phase, size in peaks.items()}, step_seconds=step,
                        copy_seconds=0.0 if kind == "none" else sum(copied.values()) / (PCIE_SHARE * PCIE_X16[LINK]),
                    )  # fmt: skip


def describe(plan: Plan, gpu: str) -> str:
    """A plan in words, with the GPU of that name."""
    words = [WORDS[plan.kind]]
    words += [f"the transformer's blocks in {plan.recipe}"] * (plan.recipe is not None)
    words += ["VAE tiled"] * plan.vae_tiling + ["the text encoder in int8"] * plan.text_int8
    peaks = ", ".join(f"{phase} {gib(size)}" for phase, size in plan.peaks.items())
    if plan.seconds is None or plan.step_seconds is None:
        time = f"no time is predicted (of dense 16-bit models by a known recipe it is, on {', '.join(DEVICES)})"
    else:
        over = f", copies over {LINK} in it" if plan.kind != "none" else ""
        time = (
            f"predicted time by the ceilings of {gpu}: {plan.step_seconds:.2f} s a step and {plan.seconds:.0f} s "
            f"for {STEPS}, at least{over}"
        )
    return f"{', '.join(words)}; predicted peaks: {peaks}; {time}"


def by_recipe(exact: Needs, model: Any) -> dict[str | None, Needs]:
    """What a pipeline needs by each recipe to choose from, the one without first.

    Args:
        exact: what it needs with the model as it is.
        model: its transformer, ours and not quantized; it may be on the meta device.
    """
    needs: dict[str | None, Needs] = {None: exact}
    if importlib.util.find_spec("torchao") is not None:
        largest = max(each.numel() for each in model.transformer_blocks.parameters())
        stored = _stored_as(RECIPE, exact, model)
        needs[RECIPE] = replace(stored, step=stored.step + unpacked_bytes(largest, model.dtype))
    return needs


def foresee(
    pipe: Any, memory: int | str, gpu: str, *,
    dtype: torch.dtype | None = None, streams: bool = True, is_open: bool = True, quant: Any = None,
) -> str | None:  # fmt: skip
    """See, before anything of a pipeline is changed, that it can keep to a budget with our transformer.

    Args:
        pipe: with its own transformer, or ours.
        memory: as for ``fit``.
        gpu: what ``torch.cuda.get_device_name`` calls it.
        dtype: that the transformer is going to have; None: its own.
        streams: whether its blocks can be streamed.
        is_open: whether the recipe is to be chosen.
        quant: what it is else, as ``load`` takes it. Of one that is not known here (a file) four bits a weight are
            reckoned with.

    Returns:
        The recipe that is chosen where it is open; None: the weights stay as they are.

    Raises:
        BudgetError: (a ValueError) it cannot; the message says what would do.
    """
    from cogx_fast.runtime.module import CogVideoXModel

    given = pipe.transformer
    config = model_config(given)
    with torch.device("meta"):
        model = torch.nn.Module.to(CogVideoXModel(config), dtype or given.dtype)
    parts = {**pipe.components, "transformer": model}
    size = default_video(config)
    tokens = count_tokens(config, size)
    exact = estimate(SimpleNamespace(components=parts, **parts), tokens, size)
    exact = exact if streams else replace(exact, streamed=None)
    needs: dict[str | None, Needs] = {None: exact}
    if quant is not None or any(map(is_quantized, given.parameters())):
        stored = quant if isinstance(quant, str) and quant in roofline.SCHEMES else _LEAST
        needs = {stored: _stored_as(stored, exact, model)}
    elif is_open:
        needs = by_recipe(exact, model)
    plan = _plan_or_refuse(pipe, needs, memory, size, _clock(gpu, config, tokens, model.dtype))
    return plan.recipe if is_open and quant is None and None in needs else None


def fit(pipe: Any, memory: int | str, device: torch.device) -> str:
    """Lay a pipeline out so that it keeps to a budget of the GPU's memory, at its model's own video size.

    Nothing that is approximate is done, but for the text encoder in int8 where it fits in no other way.

    Args:
        pipe: on the CPU, or all of it on the GPU, without offload.
        memory: bytes, or e.g. "12GB", "11.5GiB".
        device: the GPU.

    Returns:
        What was done, the peak that is predicted for each phase, and the time, in words.

    Raises:
        BudgetError: (a ValueError) it cannot be kept; the message says what would do.
    """
    from quant.apply import recipe_of

    model = pipe.transformer
    size = default_video(model.config)
    tokens = count_tokens(model.config, size)
    needs = estimate(pipe, tokens, size)
    recipe = recipe_of(model)
    is_sparse = model.attention_plan is not None or model.runner.slots.reuse is not compute_all
    gpu = torch.cuda.get_device_name(device)
    clock = None if is_sparse else _clock(gpu, model.config, tokens, model.dtype)
    plan = _plan_or_refuse(pipe, {None if recipe is None else recipe.name: needs}, memory, size, clock)
    if plan.text_int8:
        _to_int8(pipe.text_encoder)
    if plan.kind != "none" and next(model.parameters()).device.type != "cpu":
        pipe.to("cpu")
    place(pipe, device, needs, kind=plan.kind, vae_tiling=plan.vae_tiling)
    return f"memory={memory}, {size}: {describe(plan, gpu)}"


def _clock(gpu: str, config: TransformerConfig, tokens: Tokens, dtype: torch.dtype) -> Clock | None:
    described = find_device(gpu)
    if described is None or dtype.itemsize != 2:  # ceilings are those of 16 bits
        return None
    return Clock(device=described, config=config, tokens=tokens)


def _stored_as(recipe: str, needs: Needs, model: Any) -> Needs:
    """What is needed with the blocks of a model that is not quantized yet stored by a recipe."""
    blocks = [stored_bytes(block) for block in model.transformer_blocks]
    each = roofline.block_bytes(model.config, recipe)
    return replace(
        needs,
        weights={**needs.weights, "transformer": needs.weights["transformer"] - sum(blocks) + len(blocks) * each},
        streamed=None if needs.streamed is None else needs.streamed - SLOTS * (max(blocks) - each),
    )


def _plan_or_refuse(
    pipe: Any, needs: Mapping[str | None, Needs], memory: int | str, size: VideoSize, clock: Clock | None
) -> Plan:
    budget = read_memory(memory)
    plan = choose_plan(needs, pipe.text_encoder, budget, clock)
    if plan is not None:
        return plan
    text_int8 = budget - SPARE < next(iter(needs.values())).weights["text_encoder"]
    least = min(max(each.peaks.values()) for each in _plans(needs, text_int8, None))
    raise BudgetError(
        f"memory={memory!r} is too little for this pipeline at {size}: it takes {gib(least)} or more, with "
        f"{gib(SPARE)} of it for CUDA and its libraries. Give that, or load a smaller model (2b)"
    )


def read_memory(memory: int | str) -> int:
    """Bytes of "12GB", "11.5GiB", or a number of them.

    Raises:
        BudgetError: it is none.
    """
    match = re.fullmatch(r"([0-9.]+) ?(GB|GiB|MB|MiB)", memory) if isinstance(memory, str) else None
    units = {"GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20}
    try:
        size = int(float(match[1]) * units[match[2]]) if match else operator.index(memory)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        size = 0
    if size <= 0 or isinstance(memory, bool):
        raise BudgetError(f"memory is {memory!r}, expected bytes, or e.g. '12GB' or '11.5GiB'")
    return size


class BudgetError(ValueError):
    """A budget that is none, or that cannot be kept; the message says what would do."""


def _int8_bytes(model: torch.nn.Module) -> int:
    """Of a model with its linears in int8, a scale for each row."""
    linears = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    saved = sum(each.weight.numel() * (each.weight.itemsize - 1) - 4 * each.out_features for each in linears)
    return stored_bytes(model) - saved


def _to_int8(model: torch.nn.Module) -> None:
    from torchao.quantization import quantize_

    from quant.schemes import torchao_config

    quantize_(model, torchao_config("int8-weight-only"))


__all__ = [
    "LINK",
    "RECIPE",
    "STEPS",
    "BudgetError",
    "Clock",
    "Plan",
    "by_recipe",
    "choose_plan",
    "fit",
    "foresee",
    "read_memory",
]
