"""fp8-dynamic where there is no hardware for it: emulated, for quality figures only.

Weights and activations are rounded to fp8 by torchao's own functions, with the same scales and so to the same values
as on the hardware; only the product of them is computed in fp32 in place of the fp8 matmul. Nothing here is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torchao.core.config import AOBaseConfig
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor
from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao.quantization.transform_module import register_quantize_module_handler


class EmulatedFloat8Tensor(Float8Tensor):
    """torchao's ``Float8Tensor``, value by value, with a linear that multiplies in fp32."""


@EmulatedFloat8Tensor.implements(torch.ops.aten.linear.default)
@EmulatedFloat8Tensor.implements_torch_function(linear)
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    rounded = _choose_quant_func_and_quantize_tensor(x, weight.act_quant_kwargs).dequantize(torch.float32)
    product = linear(rounded, weight.dequantize(torch.float32), None if bias is None else bias.float())
    return product.to(x.dtype)


@dataclass
class EmulatedFloat8Config(AOBaseConfig):
    """Quantize as another configuration would, for a product in fp32 and on any device."""

    config: Float8DynamicActivationFloat8WeightConfig


@register_quantize_module_handler(EmulatedFloat8Config)
def _quantize_linear(module: nn.Module, config: EmulatedFloat8Config) -> nn.Module:
    real = config.config
    activations, weights = real.granularity
    quantized = EmulatedFloat8Tensor.from_hp(
        module.weight,
        float8_dtype=real.weight_dtype,
        granularity=weights,
        kernel_preference=real.kernel_preference,
    )
    assert isinstance(real.mm_config, Float8MMConfig)
    weight = EmulatedFloat8Tensor(
        quantized.qdata,
        quantized.scale,
        block_size=quantized.block_size,
        mm_config=real.mm_config,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
            real.activation_dtype,
            activations,
            hp_value_lb=real.activation_value_lb,
            hp_value_ub=real.activation_value_ub,
            kernel_preference=real.kernel_preference,
        ),
        kernel_preference=real.kernel_preference,
        dtype=quantized.dtype,
    )
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


__all__ = ["EmulatedFloat8Config", "EmulatedFloat8Tensor"]
