"""Library calls of generated code: what a GPU's library computes, as formulas on the CPU.

Products of bf16 and fp8 are summed in fp32 and rounded once, those of int8 are exact, as cuBLAS states; attention keeps
scores and sums in fp32 and rounds the probabilities for the second product, as flash kernels do. A call that has no
formula here is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    from torch._meta_registrations import alloc_with_matching_layout

    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = (weights.to(q.dtype).float() @ v.float()) / weights.sum(-1, keepdim=True)
    return alloc_with_matching_layout(q, out.shape).copy_(out)  # the layout that the kernel promises


def _refuse(dropout: float, causal: bool) -> None:
    if dropout or causal:
        raise NotImplementedError("attention with dropout or a causal mask has no formula here")


def _cudnn(q, k, v, bias, lse, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    _refuse(dropout, causal)
    return _with_nothing(_attend(q, k, v, bias, scale), q, k)


def _flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    _refuse(dropout, causal)
    return _with_nothing(_attend(q, k, v, None, scale), q, k)


def _with_nothing(out: Tensor, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """The output, and what only a backward pass reads."""
    nothing = torch.empty(0)
    return out, nothing, nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing


def _efficient(q, k, v, bias, lse, dropout=0.0, causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    _refuse(dropout, causal)
    nothing = torch.empty(0)
    return _attend(q, k, v, bias, scale), nothing, nothing, nothing


def _stored(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return result.to(dtype) if out is None else out.copy_(result)


def _mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _stored(_wide(a) @ _wide(b), a.dtype, out)


def _addmm(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    return _stored(beta * _wide(bias) + alpha * (_wide(a) @ _wide(b)), a.dtype, out)


def _addmm_activation(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> Tensor:
    """cuBLASLt's epilogue, the tanh-GELU of the fp32 sums (pytorch, Blas.cpp); the CPU's operator is another GELU."""
    sums = beta * _wide(bias) + alpha * (_wide(a) @ _wide(b))
    return (torch.nn.functional.gelu(sums, approximate="tanh") if use_gelu else sums.relu()).to(a.dtype)


def _scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False, out=None):  # type: ignore[no-untyped-def]
    if scale_result is not None:
        raise NotImplementedError("_scaled_mm with a scale of the result has no formula here")
    sums = (a.float() @ b.float()) * scale_a * scale_b
    return _stored(sums if bias is None else sums + bias.float(), out_dtype or a.dtype, out)


def _int_mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _stored(a.double() @ b.double(), torch.int32, out)  # exact


def _wide(operand: Tensor) -> Tensor:
    return operand.float() if operand.dtype in (torch.bfloat16, torch.float16) else operand


FORMULAS: dict[str, Callable[..., Any]] = {
    "mm": _mm, "bmm": _mm, "addmm": _addmm, "bias_addmm": _addmm, "_addmm_activation": _addmm_activation,
    "_scaled_mm": _scaled_mm, "_int_mm": _int_mm, "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_flash_attention": _flash, "_scaled_dot_product_efficient_attention": _efficient,
}  # fmt: skip
"""By operator."""

_COPIES = {"clone", "copy_", "detach", "view", "as_strided", "as_strided_", "_to_copy", "empty_strided", "fill_"}
"""Operators that compute nothing."""


class Library(TorchDispatchMode):
    """While it is entered, operators are their formulas; ``extern_kernels`` is for the generated module's name.

    Args:
        calls: filled with the names of what is called.
        quantized: filled with the activations of products that quantize them.
    """

    def __init__(self, calls: list[str], quantized: list[Tensor]) -> None:
        super().__init__()
        self._calls, self._quantized = calls, quantized
        self.extern_kernels = _Extern(self)

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        if name not in FORMULAS and name not in _COPIES:
            raise NotImplementedError(f"the generated code calls {operator}, which has no formula here")
        if name in _COPIES:
            return operator(*arguments, **(named or {}))
        return self.call(name, *arguments, **(named or {}))

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """The formula of that name."""
        from torch.utils._python_dispatch import _disable_current_modes

        if name not in FORMULAS:
            raise NotImplementedError(f"the generated code calls extern_kernels.{name}, which has no formula here")
        self._calls.append(name)
        with _disable_current_modes():
            if name in ("_scaled_mm", "_int_mm"):
                self._quantized.append(arguments[0].clone())
            return FORMULAS[name](*arguments, **named)


class _Extern:
    def __init__(self, library: Library) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self._library.call(name, *arguments, **named)


__all__ = ["FORMULAS", "Library"]
