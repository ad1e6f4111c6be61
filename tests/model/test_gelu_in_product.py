"""The tanh-GELU that the feed-forward's first product applies itself: when, and that it is the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogx_fast.config import PRESETS
from cogx_fast.model.layers import _Projection
from tests.model.test_layers import randn
from tests.support import relative_error, small


def _projection(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> _Projection:
    return _Projection(small("5b", **changes)).to(dtype)


def _plain(projection: _Projection, x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, projection.proj.weight, projection.proj.bias), approximate="tanh")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The products that took the activation; the operator computes here what it does on CUDA."""
    calls: list[Tensor] = []

    def operator(bias: Tensor, left: Tensor, right: Tensor, *, use_gelu: bool) -> Tensor:
        assert use_gelu
        calls.append(left)
        return F.gelu(torch.addmm(bias, left, right), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", operator)
    return calls


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_taken_on_cuda_without_gradients(taken: list[Tensor], pretend_cuda: None, dtype: torch.dtype) -> None:
    projection, x = _projection(dtype), randn(2, 9, 128).to(dtype)
    with torch.no_grad():
        out = projection(x)
        assert [tuple(left.shape) for left in taken] == [(18, 128)]
        assert out.shape == (2, 9, 512)
        assert torch.equal(out, _plain(projection, x))


def test_the_cpu_keeps_the_plain_formula(taken: list[Tensor]) -> None:
    projection, x = _projection(), randn(2, 9, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(projection(x), _plain(projection, x))
    assert not taken


class _Subclass(nn.Parameter):
    """As a quantized weight: another class of tensor."""


def _adapter(projection: _Projection) -> None:
    class Adapter(nn.Linear):
        pass

    projection.proj.__class__ = Adapter


REASONS: dict[str, Callable[[_Projection], object]] = {
    "another kind of linear": _adapter,
    "a weight of another class": lambda p: setattr(p.proj, "weight", _Subclass(p.proj.weight)),
    "a forward of its own": lambda p: setattr(p.proj, "forward", p.proj.forward),
    "a hook": lambda p: p.proj.register_forward_hook(lambda module, arguments, out: None),
    "a hook before it": lambda p: p.proj.register_forward_pre_hook(lambda module, arguments: None),
    "fp32": lambda p: p.float(),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_keeps_it_from_being_taken(taken: list[Tensor], pretend_cuda: None, reason: str) -> None:
    projection = _projection()
    REASONS[reason](projection)
    x = randn(2, 9, 128).to(projection.proj.bias.dtype)
    with torch.no_grad():
        assert torch.equal(projection(x), _plain(projection, x))
    assert not taken


def test_gradients_and_other_activations_keep_it_from_being_taken(taken: list[Tensor], pretend_cuda: None) -> None:
    x = randn(2, 9, 128).bfloat16()
    _projection()(x).sum().backward()
    with torch.no_grad():
        _projection(activation_fn="gelu")(x)
    assert not taken


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "rows"), [("5b", 80), ("5b", 2 * 17776), ("2b", 2 * 17776), ("5b", 45106)])
def test_on_cuda_no_kernel_follows_and_it_is_as_accurate(name: str, rows: int, dtype: torch.dtype) -> None:
    """cuBLASLt takes the activation (else torch runs a GELU of its own after it), and rounds once less."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    projection = _Projection(PRESETS[name]).to("cuda", dtype)
    x = torch.randn(1, rows, PRESETS[name].inner_dim, device="cuda", dtype=dtype)
    with torch.no_grad():
        projection(x)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            ours = projection(x)
        kernels = [event.key for event in profiled.key_averages()]
        exact = F.gelu(
            F.linear(x[:, :512].float(), projection.proj.weight.float(), projection.proj.bias.float()),
            approximate="tanh",
        )
        plain = _plain(projection, x)[:, :512]
    assert kernels
    assert not any("elementwise" in kernel for kernel in kernels), kernels
    assert relative_error(ours[:, :512], exact) <= 1.05 * relative_error(plain, exact)
