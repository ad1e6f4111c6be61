"""One linear quantized by torchao, some rows of its weight at a time, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import QuantError
from quant.schemes import SCHEMES, Scheme, torchao_config

Shape = tuple[int, int]

_VALUES_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Of a weight, where its rows can be quantized apart: on a CPU memory is what counts, on a GPU launches."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to become of one linear: a scheme, or none for a reason."""

    scheme: str | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """What became of one linear."""

    fqn: str
    """Its name in the model."""
    shape: Shape
    """Outputs, inputs."""
    scheme: str | None
    reason: str | None
    """Why it has no scheme."""
    bytes_before: int
    """Of the weight."""
    bytes_after: int
    sqnr_db: float | None
    """20 · log10(‖weight‖ / ‖weight - quantized‖), infinite where they are equal; None where it was not measured."""


def quantize_linear(fqn: str, linear: nn.Linear, choice: Choice, *, measure: bool) -> LinearReport:
    """Quantize a linear's weight in place, as was chosen for it.

    Args:
        fqn: its name in the model.
        linear: with its weight where it is to be quantized.
        choice: a scheme, or none.
        measure: compute the weight's SQNR, which costs about as much as quantizing it.

    Raises:
        QuantError: the scheme cannot be used for it there.
    """
    weight = linear.weight
    shape, before = (weight.shape[0], weight.shape[1]), weight.numel() * weight.element_size()
    after, sqnr_db = before, None
    if choice.scheme is not None:
        scheme = SCHEMES[choice.scheme]
        why = scheme.unmet(shape, weight.dtype, weight.device)
        if why is not None:
            raise QuantError(f"{fqn}: {choice.scheme} cannot be used: {why}")
        quantized, sqnr_db = _quantize_weight(weight.detach(), scheme, measure)
        linear.weight = nn.Parameter(quantized, requires_grad=False)
        after = sum(part.nbytes for part in _parts(quantized).values())
    return LinearReport(
        fqn=fqn, shape=shape, scheme=choice.scheme, reason=choice.reason, bytes_before=before, bytes_after=after,
        sqnr_db=sqnr_db,
    )  # fmt: skip


def _quantize_weight(weight: Tensor, scheme: Scheme, measure: bool) -> tuple[Tensor, float | None]:
    """The weight quantized by torchao, some rows at a time where that is the same, so that little is in fp32 at once.

    Returns:
        The weight, and its SQNR if measured.
    """
    config, signal, noise = torchao_config(scheme.name), 0.0, 0.0
    outputs, inputs = weight.shape
    rows_at_once = _rows_at_once(inputs, weight.device, scheme) if scheme.by_rows else outputs
    whole: dict[str, Tensor] = {}
    piece: Any = None
    for first in range(0, outputs, rows_at_once):
        rows = weight[first : first + rows_at_once]
        piece = _quantize_rows(rows, config)
        if measure and _can_dequantize(piece):
            signal += rows.double().square().sum().item()
            noise += (rows.double() - piece.dequantize(torch.float32)).square().sum().item()
        for name, part in _parts(piece).items():
            if len(rows) == outputs:
                whole[name] = part
                continue
            whole.setdefault(name, part.new_empty(outputs, *part.shape[1:]))[first : first + len(rows)] = part
    sqnr_db = None
    if measure and _can_dequantize(piece):
        sqnr_db = 10 * math.log10(signal / noise) if noise else math.inf
    attributes = piece.__tensor_flatten__()[1]
    return type(piece).__tensor_unflatten__(whole, attributes, weight.shape, weight.stride()), sqnr_db


def _rows_at_once(inputs: int, device: torch.device, scheme: Scheme) -> int:
    """As many as the scheme takes together: torchao leaves a piece of other sizes as it was."""
    values = _VALUES_AT_ONCE.get(device.type, _VALUES_AT_ONCE["cpu"])
    return max(1, values // inputs // scheme.multiple) * scheme.multiple


def _can_dequantize(weight: Tensor) -> bool:
    """Whether its class has a way back of its own (int4 has none); every tensor has torch's, which is another."""
    return type(weight).dequantize is not Tensor.dequantize


def _quantize_rows(rows: Tensor, config: Any) -> Any:
    from torchao.quantization import quantize_

    holder = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(rows, requires_grad=False)
    quantize_(holder, config, filter_fn=lambda *_: True)
    quantized = holder.weight.data
    assert type(quantized) is not Tensor, f"torchao left {tuple(rows.shape)} as it was"  # unmet() knows what it takes
    _mend_zero_rows(quantized)
    return quantized


def _mend_zero_rows(weight: Any) -> None:
    """Zeros for the NaN that torchao's fp8 makes of rows that are all zero: it divides by their largest value."""
    if weight.__tensor_flatten__()[0] == ["qdata", "scale"] and weight.qdata.dtype == torch.float8_e4m3fn:
        zero = weight.scale == 0
        weight.qdata.view(torch.uint8).masked_fill_(zero, 0)
        weight.scale.masked_fill_(zero, 1)


def _parts(weight: Any) -> dict[str, Tensor]:
    """The tensors that a quantized weight consists of."""
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}


__all__ = ["Choice", "LinearReport", "Shape", "quantize_linear"]
