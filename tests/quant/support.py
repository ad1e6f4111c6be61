"""What the tests of quantized weights share: comparing them bit for bit."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from quant import storage


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_weight(one: Tensor, other: Tensor) -> None:
    """Same class, attributes and inner bits."""
    first, second = storage.flatten(one), storage.flatten(other)
    assert type(one) is type(other)
    assert (one.shape, one.dtype, first.description) == (other.shape, other.dtype, second.description)
    assert first.parts.keys() == second.parts.keys()
    for name, part in first.parts.items():
        assert part.dtype == second.parts[name].dtype
        assert torch.equal(bits(part), bits(second.parts[name])), name


def products_of_this_cpu() -> AbstractContextManager[object]:
    """Where torch's own fp8 product fails, it is computed as on the CPU that oneDNN was told of.

    torch gives a product with one scale for each tensor to oneDNN where cpuinfo sees AMX; oneDNN needs AVX512-FP16 for
    it, which every CPU with AMX has, and which ONEDNN_MAX_CPU_ISA may keep from oneDNN alone. A CPU without AMX takes
    torch's product in fp32, which is what torch takes without oneDNN.
    """
    return nullcontext() if _has_fp8_product() else torch.backends.mkldnn.flags(enabled=False)


@functools.cache
def _has_fp8_product() -> bool:
    torch.cpu.get_capabilities()  # cpuinfo answers no to everything until something has asked for all it knows
    factor, one = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(factor, factor.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except RuntimeError as error:
        if "primitive descriptor" not in str(error):
            raise
        return False
    return True
