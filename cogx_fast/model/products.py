"""What the blocks' linears compute, written so that the compiler puts what surrounds a product into few passes.

Weights are plain, or torchao's: quantized tensors with ``act_quant_kwargs``, which says how activations are quantized
as they come (dynamic) or, None, that they are not (weight-only).

Suffixes: R rows (all dimensions but the last), D inputs, O outputs of the linear.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogx_fast.model.cpu import has_int8_products
from cogx_fast.model.tracing import is_traced


def project(linear: Any, x: Tensor, *, gelu: bool = False, reduced_next: bool = False) -> Tensor:
    """``linear(x)``, with the tanh-GELU behind it where asked for.

    The linear sees rows, ``(R, D)``. A dynamically quantized one takes each row's largest value, and Inductor pads the
    memory of that column in three dimensions (B, S, 1), which keeps it from joining what divides by it: maximum,
    division and scale would be passes of their own.

    Args:
        linear: a linear, or what stands in its place (an adapter around one).
        x: any number of dimensions, inputs last.
        gelu: apply the tanh-GELU to the result.
        reduced_next: the result goes into a norm or another quantization.
    """
    x_RD = x.flatten(0, -2)
    weight_OD = _weight(linear, x)
    if weight_OD is None:
        is_lacking = not x.is_cuda and _lacks_int8_products(linear, x)
        out_RO = _product_of_int8_in_fp32(linear, x_RD) if is_lacking else linear(x_RD)
    elif gelu and _takes_gelu(linear, x):
        out_RO, gelu = torch._addmm_activation(linear.bias, x_RD, weight_OD.t(), use_gelu=True), False
    else:
        out_RO = F.linear(x_RD, weight_OD, linear.bias)
    if gelu:
        out_RO = _gelu(out_RO, in_place=_is_plain(linear))
    if reduced_next and is_int8_dynamic(linear) and x.is_cuda:
        # A reduction of the result would be given the int32 product to scale itself, once for each of its loops. A
        # view by strides is one of memory: Inductor stores what it views, scaled, which the product then does.
        out_RO = out_RO.as_strided(out_RO.shape, out_RO.stride())
    return out_RO.unflatten(0, x.shape[:-1])


def _gelu(x: Tensor, *, in_place: bool) -> Tensor:
    """The tanh-GELU; in place where that is allowed and nobody would see it.

    Compiled for the CPU as ``x · sigmoid(2y)``, equal to ``x · (1 + tanh y) / 2``: in vectors Inductor's sigmoid takes
    0.4 of its tanh's time. Eagerly that is six passes over the widest tensor, which take as long as the operator.
    """
    if is_traced() and x.device.type == "cpu" and not torch.is_grad_enabled():
        wide = x.float()  # in registers; where a graph is run as it stands, it rounds once, as the operator does
        twice_y = wide * (_TWICE_ROOT_2_BY_PI + 0.044715 * _TWICE_ROOT_2_BY_PI * wide * wide)
        return (wide * torch.sigmoid(twice_y)).to(x.dtype)
    if in_place and not (x.requires_grad or is_traced()):
        return torch.ops.aten.gelu_(x, approximate="tanh")
    return F.gelu(x, approximate="tanh")


_TWICE_ROOT_2_BY_PI = 2 * math.sqrt(2 / math.pi)


def is_int8_dynamic(module: nn.Module) -> bool:
    """Whether the product is one of int8 by int8, whose result is int32."""
    weight = getattr(module, "weight", None)
    stored = getattr(weight, "qdata", None)
    return stored is not None and stored.dtype == torch.int8 and getattr(weight, "act_quant_kwargs", None) is not None


def _weight(linear: Any, x: Tensor) -> Tensor | None:
    """The weight as the product needs it, or None: call the linear, which is wrapped, hooked or does more."""
    if not _is_plain(linear):
        return None
    weight: Tensor = linear.weight
    if not weight.is_cuda or weight.dtype != x.dtype:
        return None
    if not hasattr(type(weight), "__tensor_flatten__"):  # else it is made of others: quantized, distributed
        return weight
    return weight.dequantize() if _is_weight_only(weight) else None


def _is_plain(linear: Any) -> bool:
    """Whether calling it is a product and nothing else."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks)


def _lacks_int8_products(linear: Any, x: Tensor) -> bool:
    """Whether it is a product of int8 by int8, with a scale for each row, that the CPU computes by loops or wrongly."""
    if x.device.type != "cpu" or not is_int8_dynamic(linear) or not _is_plain(linear):
        return False
    weight, how = linear.weight, linear.weight.act_quant_kwargs
    by_rows = type(how.granularity).__name__ == "PerRow" and how.mapping_type.name == "SYMMETRIC"
    return (
        by_rows
        and not how.reduce_range
        and weight.act_pre_scale is None
        and weight.act_quant_scale is None
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not has_int8_products()
    )


def _product_of_int8_in_fp32(linear: Any, x_RD: Tensor) -> Tensor:
    """What torchao computes, step by step, but for the product: the int8 values are multiplied as fp32.

    Products of int8 values are exact in fp32, and so are their sums up to 2²⁴; beyond, each addition rounds to 24 bits,
    as the sum itself does when torchao scales it. The weight is converted at each call, which takes the time of some
    hundred rows, and leaves no copy of four times the bytes to keep and to keep true. (torchao's own tensor for the
    activations would keep what is compiled from being cached: the graph would build it.)
    """
    scale_R1 = (x_RD.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
    values_RD = (x_RD * (1.0 / scale_R1)).round().clamp(-128, 127)
    sums_RO = values_RD @ linear.weight.qdata.float().t()
    out_RO = (sums_RO * scale_R1).to(x_RD.dtype) * linear.weight.scale.flatten()
    return (out_RO if linear.bias is None else out_RO + linear.bias).to(x_RD.dtype)


def _is_weight_only(weight: Tensor) -> bool:
    """Whether it is stored in eight bits and multiplied in the activations' dtype.

    For int8 ones Inductor would call ``_weight_int8pack_mm``, whose CUDA kernel gives each output to one thread and
    has no use for tensor cores (pytorch, aten/src/ATen/native/cuda/int8mm.cu): made for a few rows, not for a video's.
    """
    return (
        hasattr(weight, "qdata")
        and getattr(weight, "act_quant_kwargs", weight) is None
        and getattr(weight, "act_pre_scale", None) is None
    )


def _takes_gelu(linear: Any, x: Tensor) -> bool:
    """Whether the product can apply the tanh-GELU as it writes its result, which saves a pass over the widest tensor.

    On CUDA ``_addmm_activation`` is cuBLASLt's product with ``CUBLASLT_EPILOGUE_GELU_BIAS``, or a product and a
    tanh-GELU in place where cuBLASLt has none (pytorch, aten/src/ATen/native/cuda/Blas.cpp). The CPU's operator
    computes another GELU, and none has a derivative; fp32 keeps the plain formula.
    """
    return linear.bias is not None and x.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled()


__all__ = ["is_int8_dynamic", "project"]
