"""What quantization does to the model's output, measured on calibration inputs: one linear, or one kind, at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from quant.apply import Choice, Plan, linears
from quant.calibration import Sample
from quant.errors import QuantError
from quant.recipe import Recipe
from quant.schemes import EMULATED, SCHEMES

Call = Callable[[nn.Module, Sample], Tensor]
"""(model, sample) -> what the model predicts"""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared errors relative to the squared size of what they are errors of, summed over the samples."""

    own: float
    """Of the linear's own output."""
    prediction: float
    """Of the model's output."""


def sqnr_db(relative_squared_error: float) -> float:
    """Signal to quantization noise in dB."""
    return math.inf if relative_squared_error <= 0 else -10 * math.log10(relative_squared_error)


def call_transformer(model: nn.Module, sample: Sample) -> Tensor:
    """A CogVideoX transformer's prediction for a sample, in fp32 on the CPU."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    given = {
        name: value.to(parameter.device, parameter.dtype if value.dim() > 1 else None) for name, value in sample.items()
    }
    prediction: Tensor = model(**given, return_dict=False)[0]
    return prediction.float().cpu()


@contextmanager
def quantized(model: nn.Module, schemes: Mapping[str, str], recipe: Recipe) -> Iterator[None]:
    """The model with some linears quantized, inside the ``with`` block; afterwards its weights are the very same again.

    Args:
        model: not compiled.
        schemes: by the linears' names; emulated where they cannot run and an emulation can.
        recipe: named in errors.

    Raises:
        QuantError: a scheme that can be neither run nor emulated.
    """
    plan = Plan(recipe=recipe, choices={name: Choice(scheme=_runnable(s, model, name)) for name, s in schemes.items()})
    held: dict[str, nn.Parameter] = {}
    try:
        for name in schemes:
            module = model.get_submodule(name)
            held[name] = module.weight  # type: ignore[assignment]
            plan.apply(module, name, measure=False)
        yield
    finally:
        for name, weight in held.items():
            model.get_submodule(name).weight = weight


def is_measurable(scheme: str, model: nn.Module, name: str) -> bool:
    """Whether a scheme can be run, or at least emulated, for a linear where the model is."""
    return _candidate(scheme, model, name) is not None


def _runnable(scheme: str, model: nn.Module, name: str) -> str:
    candidate = _candidate(scheme, model, name)
    if candidate is None:
        raise QuantError(f"{name}: {scheme} can be neither run nor emulated here: leave it out")
    return candidate


def _candidate(scheme: str, model: nn.Module, name: str) -> str | None:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    for candidate in (scheme, scheme + EMULATED):
        known = SCHEMES.get(candidate)
        if known is not None and known.unmet((weight.shape[0], weight.shape[1]), weight.dtype, weight.device) is None:
            return candidate
    return None


@torch.no_grad()
def references(model: nn.Module, samples: Sequence[Sample], call: Call = call_transformer) -> list[Tensor]:
    """What the unquantized model predicts."""
    return [call(model, sample) for sample in samples]


@torch.no_grad()
def prediction_error(
    model: nn.Module,
    schemes: Mapping[str, str],
    samples: Sequence[Sample],
    expected: Sequence[Tensor],
    recipe: Recipe,
    call: Call = call_transformer,
) -> float:
    """The relative squared error of the predictions with some linears quantized together."""
    with quantized(model, schemes, recipe):
        return _relative([call(model, sample) for sample in samples], expected)


@torch.no_grad()
def measure(
    model: nn.Module,
    samples: Sequence[Sample],
    candidates: Mapping[str, Sequence[str]],
    recipe: Recipe,
    *,
    members: Mapping[str, Sequence[str]] | None = None,
    known: MutableMapping[tuple[str, str], Errors] | None = None,
    call: Call = call_transformer,
    on_measured: Callable[[int, int], None] | None = None,
) -> MutableMapping[tuple[str, str], Errors]:
    """Quantize one linear after the other, alone, and see what it does to its own output and to the prediction.

    Args:
        model: unquantized, not compiled.
        samples: calibration inputs (``quant.calibration``).
        candidates: for each linear the schemes to try, emulated where they cannot run.
        recipe: named in errors.
        members: where several linears are quantized together: their names, by the name in ``candidates``.
        known: what was measured before; it is added to, and not measured again.
        call: how the model is called.
        on_measured: told (done, of all) after each.

    Returns:
        ``known`` with an entry for each (linear, scheme).

    Raises:
        QuantError: a name that is no linear, or a scheme that cannot run here.
    """
    known = {} if known is None else known
    members = {name: [name] for name in candidates} if members is None else members
    names = {name for name, _ in linears(model)}
    strange = sorted({name for group in candidates for name in members[group]} - names)
    if strange:
        raise QuantError(f"{strange[0]} is no linear of the model")
    wanted = [(name, scheme) for name, schemes in candidates.items() for scheme in schemes]
    expected: list[Tensor] | None = None
    for done, (name, scheme) in enumerate(wanted, start=1):
        if (name, scheme) not in known:
            expected = references(model, samples, call) if expected is None else expected
            known[name, scheme] = _measure_one(model, members[name], scheme, samples, expected, recipe, call)
        if on_measured is not None:
            on_measured(done, len(wanted))
    return known


def _measure_one(
    model: nn.Module, names: Sequence[str], scheme: str, samples: Sequence[Sample], expected: Sequence[Tensor],
    recipe: Recipe, call: Call,
) -> Errors:  # fmt: skip
    sums = torch.zeros(2, dtype=torch.float64)

    def watch(name: str) -> Any:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        weight, bias = module.weight, module.bias

        def compare(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            right = apply_linear(inputs[0], weight, bias).double()
            sums.add_(torch.stack([(output.double() - right).square().sum(), right.square().sum()]).cpu())

        return module.register_forward_hook(compare)

    handles = [watch(name) for name in names]
    try:
        error = prediction_error(model, dict.fromkeys(names, scheme), samples, expected, recipe, call)
    finally:
        for handle in handles:
            handle.remove()
    return Errors(own=_ratio(*sums.tolist()), prediction=error)


def _relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(actual, expected, strict=True)]
    wrong = sum((a - b).square().sum().item() for a, b in pairs)
    return _ratio(wrong, sum(b.square().sum().item() for _, b in pairs))


def _ratio(wrong: float, size: float) -> float:
    if math.isnan(wrong):
        return math.inf
    return wrong / size if size else (0.0 if wrong == 0 else math.inf)


__all__ = [
    "Call", "Errors", "call_transformer", "is_measurable", "measure", "prediction_error", "quantized", "references",
    "sqnr_db",
]  # fmt: skip
