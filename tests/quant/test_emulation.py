"""fp8-dynamic emulated: bit for bit the formula in fp32, and close to the real product where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quant
from quant.emulation import EmulatedFloat8Tensor
from quant.recipe import parse_recipe
from tests.cases import for_each
from tests.support import relative_error

LARGEST = 448.0  # of e4m3


def recipe(scheme: str) -> quant.Recipe:
    return parse_recipe(f'name = "test"\ndescription = "d"\n[[rule]]\nmatch = "*"\nscheme = "{scheme}"')


def make(outputs: int = 48, inputs: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).bfloat16().requires_grad_(False)


def activations(tokens: int, inputs: int = 64) -> Tensor:
    x = torch.randn(2, tokens, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0, tokens // 2] = 0
    x[1, 0] *= 1000
    return x


def round_to_fp8(values: Tensor, *, per_row: bool) -> Tensor:
    """Rounded to fp8 and back, in fp32. As in torchao the scale is computed in the values' own dtype."""
    largest = values.abs().amax(-1, keepdim=True) if per_row else values.abs().amax()
    scale = (largest.clamp(min=1e-12) / LARGEST).float()
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


@for_each("tokens", [80, 17, 1], "scheme", ["fp8-dynamic", "fp8-dynamic-tensor"])
def test_it_is_the_formula_bit_for_bit(scheme, tokens):
    linear, x, per_row = make(), activations(tokens), scheme == "fp8-dynamic"
    weight, bias = linear[0].weight.clone(), linear[0].bias
    x_rounded, weight_rounded = round_to_fp8(x, per_row=per_row), round_to_fp8(weight, per_row=per_row)
    expected = torch.nn.functional.linear(x_rounded, weight_rounded, bias.float()).bfloat16()
    quant.quantize(linear, recipe(f"{scheme}-emulated"))
    assert torch.equal(linear[0].weight.dequantize(torch.float32), weight_rounded)
    actual = linear(x)
    assert torch.equal(actual, expected)
    if per_row:
        assert torch.equal(actual[0, tokens // 2], bias)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-dynamic-tensor"])
def test_per_row_and_per_tensor_differ_where_they_must(scheme):
    """One loud token drowns the others of a tensor, but not those of other rows."""
    linear, x = make(), activations(16)
    x[1, 0] *= 1000
    exact = linear(x)
    quant.quantize(linear, recipe(f"{scheme}-emulated"))
    quiet = relative_error(linear(x)[0], exact[0])
    assert (quiet < 0.06) == (scheme == "fp8-dynamic"), quiet


def test_it_is_labelled():
    linear = make()
    (report,) = quant.quantize(linear, recipe("fp8-dynamic-emulated")).linears
    assert report.scheme == "fp8-dynamic-emulated"
    assert isinstance(linear[0].weight, EmulatedFloat8Tensor)
    assert type(linear.to("cpu")[0].weight) is type(linear[0].weight)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [80, 17, 1, 2500])
@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-dynamic-tensor"])
def test_it_is_what_the_hardware_computes(scheme, tokens):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 matmul on this device")
    emulated, real, x = make(1536, 768).cuda(), make(1536, 768).cuda(), activations(tokens, 768).cuda()
    exact = make(1536, 768).cuda().double()(x.double())
    quant.quantize(emulated, recipe(f"{scheme}-emulated"))
    quant.quantize(real, recipe(scheme))
    assert torch.equal(emulated[0].weight.qdata.view(torch.uint8), real[0].weight.qdata.view(torch.uint8))
    assert torch.equal(emulated[0].weight.scale, real[0].weight.scale)
    ours, theirs = emulated(x), real(x)
    assert theirs.isfinite().all()
    # fast accumulation keeps about 14 bits of the sums; far below fp8's own rounding, which both share
    assert relative_error(ours, theirs) < 0.1 * relative_error(theirs, exact)
