"""What the CPU multiplies: as it is, and as oneDNN sees it where the environment takes instructions from it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogx_fast.model import cpu, products
from tests.cases import for_each

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CPU = torch.device("cpu")


def run_python(code: str, tmp_path: Path, **environment: str) -> str:
    """Torch's compiled code is not kept apart by what the environment allows, so each process keeps its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is known

ASK = """
import json, torch
from cogx_fast.model.cpu import computes, has_int8_products
print(json.dumps([computes(torch.bfloat16), computes(torch.float16), computes(torch.float32), has_int8_products()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the environment variables are those of oneDNN on x86")
def test_what_the_environment_takes_away_is_not_there(tmp_path: Path) -> None:
    assert json.loads(run_python(ASK, tmp_path, **AVX2)) == [False, False, True, False]
    both = json.loads(run_python(ASK, tmp_path, ONEDNN_MAX_CPU_ISA="AVX512_CORE"))
    assert both[1:] == [False, True, False]  # bf16 by converting, where there is AVX512


def not_yet_asked() -> Any:
    """The module anew, which remembers no answer."""
    spec: Any = importlib.util.find_spec(cpu.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_torch_without_onednn_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(left: Tensor, right: Tensor) -> Tensor:
        nonlocal now
        now += {torch.bfloat16: 300.0, torch.float16: 3.0, torch.float32: 1.0}[left.dtype]
        return left

    now = 0.0
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(Tensor, "__matmul__", product)
    anew = not_yet_asked()
    assert not anew.computes(torch.bfloat16)
    assert anew.computes(torch.float16)


def test_it_is_told_of_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "computes", lambda dtype: dtype == torch.float32)
    told = cpu.slow_dtype(torch.bfloat16, CPU)
    assert told is not None
    assert "no bf16 instructions" in told
    assert "fp16" in str(cpu.slow_dtype(torch.float16, CPU))
    assert cpu.slow_dtype(torch.float32, CPU) is None
    assert cpu.slow_dtype(None, CPU) is None
    assert cpu.slow_dtype(torch.bfloat16, torch.device("cuda")) is None


def test_tracing_takes_the_answer_for_a_constant() -> None:
    def run(x: Tensor) -> Tensor:
        return x + 1 if has_int8_products() else x - 1

    has_int8_products = cpu.has_int8_products
    expected = run(torch.zeros(1))
    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(1)), expected)
    has_int8_products = not_yet_asked().has_int8_products  # so that it is asked while tracing
    program = torch.export.export(_Called(run), (torch.zeros(1),), strict=False)
    assert torch.equal(program.module()(torch.zeros(1)), expected)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.add.Tensor if expected > 0 else torch.ops.aten.sub.Tensor
    ]


class _Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# --------------------------------------------------------------------------------------------------- products of int8


def quantized(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    """A linear with int8-dynamic weights, some rows of which are all as large as int8 values get."""
    from torchao.quantization import quantize_

    from quant.schemes import torchao_config

    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    linear.weight[0], linear.weight[1] = 1, -1
    quantize_(linear, torchao_config("int8-dynamic"), filter_fn=lambda *_: True)
    return linear


def activations(rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(1, rows, inputs)
    x[0, 0], x[0, 1], x[0, 2] = 1, -1, 0
    return x.to(dtype)


def in_integers(linear: Any, x: Tensor) -> Tensor:
    """torchao's steps, with a sum of integers that nothing rounds."""
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

    rows: Any = _choose_quant_func_and_quantize_tensor(x.flatten(0, -2), linear.weight.act_quant_kwargs)
    sums = (rows.qdata.double() @ linear.weight.qdata.double().t()).float()
    out = (sums * rows.scale.reshape(-1, 1)).to(x.dtype) * linear.weight.scale.flatten()
    out = out if linear.bias is None else out + linear.bias
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


@pytest.fixture(params=[False, True], ids=["in fp32", "as here"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(products, "has_int8_products", lambda: False)
    elif not cpu.has_int8_products():
        pytest.skip("the CPU has no int8 products: 'in fp32' is what it does")
    return bool(request.param)


@for_each(
    "size",
    [1e-9, 0.01, 1.0, 300.0],
    "dtype, bias",
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, True)],
)
def test_every_int8_value_counts(either_way: bool, dtype: torch.dtype, bias: bool, size: float) -> None:
    """Sums below 2²⁴ are exact in fp32: an int8 value that were one off anywhere would show."""
    linear, x = quantized(512, 64, dtype, bias=bias), size * activations(40, 512, dtype)
    assert torch.equal(products.project(linear, x), in_integers(linear, x))


def test_what_is_compiled_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it could not be with torchao's own tensor for the activations in the graph."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(products, "has_int8_products", lambda: False)
    linear, x = quantized(128, 64, torch.float32), activations(8, 128, torch.float32)
    counters.clear()
    with torch.no_grad():
        torch.compile(products.project, fullgraph=True)(linear, x)
    assert counters["aot_autograd"]["total"] == 1
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0


def test_long_sums_are_as_good_as_fp32s(either_way: bool) -> None:
    linear, x = quantized(8192, 8, torch.float32), activations(8, 8192, torch.float32)
    assert 8192 * 127 * 127 > 2**24
    torch.testing.assert_close(products.project(linear, x), in_integers(linear, x), rtol=1e-5, atol=1e-5)


EXACT = """
import torch
from cogx_fast.model.products import project
from tests.model.test_cpu import activations, in_integers, quantized
linear, x = quantized(512, 64, torch.float32), activations(40, 512, torch.float32)
run = torch.compile(project, fullgraph=True)
with torch.no_grad():
    expected = in_integers(linear, x)
    print(torch.equal(project(linear, x), expected))
    print(float((run(linear, x) - expected).abs().max() / expected.abs().max()) < 1e-6)
    print(torch.equal(torch.nn.functional.linear(x, linear.weight, linear.bias), expected))
"""


def test_nothing_saturates_without_vnni(tmp_path: Path) -> None:
    """Where oneDNN adds pairs of products in 16 bits, which is seen in torchao's own product."""
    ours, compiled, theirs = run_python(EXACT, tmp_path, **AVX2).split()
    assert (ours, compiled) == ("True", "True")
    if torch.cpu.get_capabilities().get("avx512_vnni"):
        assert theirs == "False"


def test_nothing_is_kept_beside_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_int8_products", lambda: False)
    linear, x = quantized(128, 64, torch.float32), activations(8, 128, torch.float32)
    before = {name: type(value) for name, value in itertools.chain(vars(linear).items(), vars(linear.weight).items())}
    first = products.project(linear, x)
    assert before == {
        name: type(value) for name, value in itertools.chain(vars(linear).items(), vars(linear.weight).items())
    }
    linear.weight.qdata[32:].zero_()  # changed in place
    changed = products.project(linear, x)
    assert torch.equal(changed[..., :32], first[..., :32])
    assert torch.equal(changed[0, :, 32:], linear.bias[32:].expand(8, -1))


def test_what_is_more_than_a_product_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_int8_products", lambda: False)
    linear, x, seen = quantized(128, 64, torch.float32), activations(8, 128, torch.float32), []
    linear.register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    with torch.no_grad():
        products.project(linear, x)
    assert seen == [linear]
