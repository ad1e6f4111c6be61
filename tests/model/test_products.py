"""What the linears compute on the way through ``project``: the plain formula, whichever path a CUDA device takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cogx_fast.config import PRESETS
from cogx_fast.model.layers import FeedForward
from cogx_fast.model.products import is_int8_dynamic, project
from tests.cases import for_each
from tests.model.test_layers import randn
from tests.support import relative_error, small, without_saturated

DYNAMIC = ("int8-dynamic", "fp8-dynamic-emulated", "fp8-dynamic-tensor-emulated")
WEIGHT_ONLY = ("int8-weight-only", "fp8-weight-only")


def _projection(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A feed-forward's first linear with its activation."""
    torch.manual_seed(0)
    return FeedForward(small("5b", **changes)).net[0].to(dtype)


def _plain(projection: Any, x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, projection.proj.weight, projection.proj.bias), approximate="tanh")


def _quantized(scheme: str) -> tuple[nn.Linear, Tensor]:
    """A linear with that scheme, and the weight it had."""
    from torchao.quantization import quantize_

    from quant.schemes import torchao_config

    torch.manual_seed(0)
    linear = nn.Linear(128, 256).bfloat16()
    weight = linear.weight.detach().clone()
    quantize_(linear, torchao_config(scheme), filter_fn=lambda *_: True)
    assert type(linear.weight) is not nn.Parameter
    return linear, weight


def _parts(tensor: Tensor) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """The plain tensors that it is made of, and what makes one like it of others."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor.detach()], lambda parts: parts[0]
    names, context = tensor.__tensor_flatten__()
    kind, size, stride = type(tensor), tensor.shape, tensor.stride()
    return [getattr(tensor, name) for name in names], lambda parts: kind.__tensor_unflatten__(
        dict(zip(names, parts, strict=True)), context, size, stride
    )


def on_cuda(module: nn.Module, x: Tensor) -> tuple[Tensor, list[torch.Size]]:
    """What the module computes where its weights and ``x`` are on a CUDA device, and what was given to a product that
    takes the GELU along: its operators, traced on tensors of such a device that hold nothing, are run on the CPU.
    """
    parts = {name: _parts(parameter) for name, parameter in module.named_parameters()}
    plain = [x, *(tensor for tensors, _ in parts.values() for tensor in tensors)]

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        left = list(tensors)
        weights = {name: make([left.pop(0) for _ in own]) for name, (own, make) in parts.items()}
        return torch.func.functional_call(module, weights, (x,))

    with FakeTensorMode():
        empty = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in plain]
    graph, taken = make_fx(call)(*empty), []

    def product(bias: Tensor, left: Tensor, right: Tensor, *, use_gelu: bool) -> Tensor:
        """As on CUDA; the CPU's own computes another GELU."""
        assert use_gelu
        taken.append(left.shape)
        return F.gelu(torch.addmm(bias, left, right), approximate="tanh")

    for node in graph.graph.nodes:
        if node.target == torch.ops.aten._addmm_activation.default:
            node.target = product
    graph.recompile()
    return graph(*plain), taken


class _Product(nn.Module):
    def __init__(self, linear: nn.Linear, **options: bool) -> None:
        super().__init__()
        self.linear, self.options = linear, options

    def forward(self, x: Tensor) -> Tensor:
        return project(self.linear, x, **self.options)


# ------------------------------------------------------------------------------------------- the GELU in the product


@for_each("dtype", [torch.bfloat16, torch.float16])
def test_it_is_taken_on_cuda_without_gradients(dtype: torch.dtype) -> None:
    projection, x = _projection(dtype), randn(2, 9, 128).to(dtype)
    with torch.no_grad():
        out, taken = on_cuda(projection, x)
        assert taken == [(18, 128)]
        assert out.shape == (2, 9, 512)
        assert torch.equal(out, _plain(projection, x))


def test_the_cpu_keeps_the_plain_formula() -> None:
    projection, x = _projection(), randn(2, 9, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(projection(x), _plain(projection, x))


class _Wrapper(Tensor):
    """As a distributed weight: made of another tensor, and multiplied in its own way."""

    inner: Tensor

    @staticmethod
    def of(inner: Tensor) -> Tensor:
        wrapper = Tensor._make_wrapper_subclass(_Wrapper, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        wrapper.inner = inner
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Tensor:
        return _Wrapper.of(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [value.inner if isinstance(value, cls) else value for value in args]
        result = function(*values, **(kwargs or {}))
        return _Wrapper.of(result) if function is torch.ops.aten.detach.default else result


def _adapter(projection: Any) -> None:
    class Adapter(nn.Linear):
        pass

    projection.proj.__class__ = Adapter


REASONS: dict[str, Callable[[Any], object]] = {
    "another kind of linear": _adapter,
    "a weight made of others": lambda p: setattr(
        p.proj, "weight", nn.Parameter(_Wrapper.of(p.proj.weight.detach()), requires_grad=False)
    ),
    "a forward of its own": lambda p: setattr(p.proj, "forward", p.proj.forward),
    "a hook": lambda p: p.proj.register_forward_hook(lambda module, arguments, out: None),
    "a hook before it": lambda p: p.proj.register_forward_pre_hook(lambda module, arguments: None),
    "fp32": lambda p: p.float(),
}


@for_each("change", REASONS.values(), ids=REASONS)
def test_what_keeps_it_from_being_taken(change: Callable[[Any], object]) -> None:
    projection = _projection()
    change(projection)
    x = randn(2, 9, 128).to(projection.proj.bias.dtype)
    with torch.no_grad():
        out, taken = on_cuda(projection, x)
        assert torch.equal(out, _plain(projection, x))
    assert not taken


def test_hooks_see_the_call() -> None:
    projection, seen = _projection(), []
    projection.proj.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    with torch.no_grad():
        on_cuda(projection, randn(2, 9, 128).bfloat16())
    assert seen == [(18, 128)]


def test_gradients_and_other_activations_keep_it_from_being_taken() -> None:
    x = randn(2, 9, 128).bfloat16()
    assert not on_cuda(_projection(), x)[1]
    with torch.no_grad():
        assert on_cuda(_projection(), x)[1]
        assert not on_cuda(_projection(activation_fn="gelu"), x)[1]


# -------------------------------------------------------------------------------------------------- quantized weights


@for_each("gelu", [False, True], "scheme", without_saturated(DYNAMIC))
def test_dynamic_ones_are_torchaos_own(scheme: str, gelu: bool) -> None:
    linear, _ = _quantized(scheme)
    x = randn(2, 9, 128).bfloat16()
    x[1, 3] = 0  # a row of zeros divides by nothing
    with torch.no_grad():
        theirs = F.linear(x, linear.weight, linear.bias)
        ours = project(linear, x, gelu=gelu, reduced_next=True)
    assert ours.isfinite().all()
    assert torch.equal(ours, F.gelu(theirs, approximate="tanh") if gelu else theirs)


@for_each("scheme", WEIGHT_ONLY)
def test_weight_only_ones_are_torchaos_up_to_rounding(scheme: str) -> None:
    """Judged by each one's error against fp32 with the same quantized weight: no larger than torchao's own."""
    linear, weight = _quantized(scheme)
    x = randn(2, 300, 128).bfloat16()
    with torch.no_grad():
        exact = F.linear(x.float(), linear.weight.dequantize(torch.float32), linear.bias.float())
        theirs = F.linear(x, linear.weight, linear.bias)
        ours, _ = on_cuda(_Product(linear), x)
        assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact)
        assert relative_error(ours, exact) <= 0.005
        assert relative_error(exact, F.linear(x.float(), weight.float(), linear.bias.float())) <= 0.05
        activated, taken = on_cuda(_Product(linear, gelu=True), x)
    assert torch.equal(activated, F.gelu(ours, approximate="tanh"))
    assert len(taken) == 1


@for_each("scheme", WEIGHT_ONLY)
def test_on_the_cpu_weight_only_ones_are_torchaos_own(scheme: str) -> None:
    linear, _ = _quantized(scheme)
    x = randn(2, 9, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(project(linear, x), F.linear(x, linear.weight, linear.bias))


@for_each("scheme", [*DYNAMIC, *WEIGHT_ONLY])
def test_which_are_products_of_int8(scheme: str) -> None:
    assert is_int8_dynamic(_quantized(scheme)[0]) == (scheme == "int8-dynamic")
    assert not is_int8_dynamic(nn.Linear(4, 4))
    assert not is_int8_dynamic(nn.GELU())


# ---------------------------------------------------------------------------------------------------------- on a GPU


@for_each("dtype, limit", [(torch.bfloat16, 1.01), (torch.float32, 1.5)])
def test_the_gelu_compiled_for_the_cpu_is_the_tanh_gelu(dtype: torch.dtype, limit: float) -> None:
    """As accurate as torch's operator, for large and small values too, as generated code or run as traced."""
    for backend in ("inductor", "eager"):
        _check_compiled_gelu(_projection(dtype), backend, limit)


def _check_compiled_gelu(projection: Any, backend: str, limit: float) -> None:
    dtype = projection.proj.weight.dtype
    compiled = torch.compile(projection, fullgraph=True, backend=backend)
    x = torch.randn(3, 40, projection.proj.in_features, dtype=dtype)
    x[0] *= 1e3
    x[1] *= 1e-6
    with torch.no_grad():
        ours, theirs = compiled(x), _plain(projection, x)
        rows = F.linear(x, projection.proj.weight, projection.proj.bias)
    exact = F.gelu(rows.double(), approximate="tanh")
    assert ours.isfinite().all()
    for part in range(3):
        assert relative_error(ours[part], exact[part]) <= limit * relative_error(theirs[part], exact[part])
    wanted = torch.autograd.grad(_plain(projection, x).sum(), projection.proj.bias)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), projection.proj.bias)[0], wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "rows"), [("5b", 80), ("5b", 2 * 17776), ("2b", 2 * 17776), ("5b", 45106)])
def test_on_cuda_no_kernel_follows_and_it_is_as_accurate(name: str, rows: int, dtype: torch.dtype) -> None:
    """cuBLASLt takes the activation (else torch runs a GELU of its own after it), and rounds once less."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    projection: Any = FeedForward(PRESETS[name]).net[0].to("cuda", dtype)
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


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [80, 2 * 17776, 45106])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic", "fp8-dynamic-tensor", *WEIGHT_ONLY])
def test_on_cuda_compiled_quantized_products_are_the_plain_ones(scheme: str, rows: int) -> None:
    """Compiled, with the product's own scaling where it is int8, beside torchao's formula in fp32."""
    from torchao.quantization import quantize_

    from cogx_fast.runtime.compiling.candidates import candidates
    from cogx_fast.runtime.compiling.compile import INT8_OPTIONS
    from quant.schemes import torchao_config

    torch.manual_seed(0)
    linear = nn.Linear(3072, 3072).to("cuda", torch.bfloat16)
    quantize_(linear, torchao_config(scheme), filter_fn=lambda *_: True)
    x = torch.randn(1, rows, 3072, device="cuda", dtype=torch.bfloat16)
    options = {"max_autotune_gemm": True, **INT8_OPTIONS} if scheme == "int8-dynamic" else None

    @torch.compile(fullgraph=True, options=options)
    def run(x: Tensor) -> Tensor:
        return project(linear, x, gelu=True, reduced_next=True)

    with torch.no_grad():
        exact = F.gelu(
            F.linear(x.float(), linear.weight.dequantize(torch.float32), linear.bias.float()), approximate="tanh"
        )
        with candidates(x.device, options or {}):
            ours = run(x)
    assert ours.isfinite().all()
    assert relative_error(ours, exact) <= (0.005 if scheme in WEIGHT_ONLY else 0.05)
