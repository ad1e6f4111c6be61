"""Every recipe on the cards that have its products: which products run, and in how many graphs."""

from __future__ import annotations

import pytest
import torch

import quant
from benchmarks.standin.journal import Journal
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from quant import QuantError
from tests.cuda_standin.device import BLOCK_PRODUCTS, FAST, attention_kernels, call, model, of_all_batches

LAYERS = 2
SIZES = {"num_attention_heads": 3}
"""torchao takes a weight of 128 × 128 with one scale for one that is scaled in blocks; no released model has one."""
INT4_SIZES = {"num_attention_heads": 4}
"""Rows in groups of 128, as every released model's are."""
FP8, INT8 = 28, 3  # CUDA_R_8F_E4M3 and CUDA_R_8I of library_types.h
FP8_DYNAMIC = ("fp8-dynamic", "fp8-dynamic-tensor")
RECIPES = ("fp8-dynamic", "fp8-dynamic-tensor", "fp8-weight-only", "int8-dynamic", "int8-mixed", "int8-weight-only")


def fp8_products(done: Journal) -> int:
    """cuBLASLt's, and CUTLASS's in torch, which has the scales for each row on other cards than Hopper."""
    cutlass = sum(n for name, n in done.kernels.items() if "cutlass" in name and "Gemm" in name and "e4m3" in name)
    return cutlass + products_of(done, FP8)


def products_of(done: Journal, kind: int) -> int:
    """cuBLASLt's products of that type."""
    return sum(f" type {kind} " in f"{line} " for line in done.of("library") if line.startswith("cublasLtMatmul"))


@pytest.mark.cards("rtx4090", "h100", "b200")
@pytest.mark.parametrize("recipe", FP8_DYNAMIC)
def test_fp8_products_run_eager(recipe):
    with pytest.warns(UserWarning, match="pass compile=True"):
        quantized = model("5b", sizes=SIZES, quant=recipe)
    assert fp8_products(call(quantized)) >= LAYERS * BLOCK_PRODUCTS


@pytest.mark.cards("h100", "rtx4090", "b200")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_compiled(recipe):
    quantized = model("5b", sizes=SIZES, quant=recipe, compile=FAST)
    with watch_compilation() as stats:
        done = [call(quantized, batch=batch) for batch in (2, 4, 1)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches()
    assert all(sum(attention_kernels(each).values()) == LAYERS for each in done)
    if recipe in FP8_DYNAMIC:
        assert fp8_products(done[1]) >= LAYERS * BLOCK_PRODUCTS
    if recipe == "int8-dynamic":
        generated = sum("int_mm" in name for name in done[1].triton.elements())
        assert products_of(done[1], INT8) + generated >= LAYERS * BLOCK_PRODUCTS


@pytest.mark.cards("rtx3060", "a100")
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-mixed"])
def test_int8_products_compile_by_default_whatever_the_card_s_size(recipe):
    quantized = model("5b", sizes=SIZES, quant=recipe, compile=True)
    call(quantized)
    done = call(quantized)
    generated = [name for name in done.triton.elements() if "int_mm" in name]
    assert len(generated) == LAYERS * (BLOCK_PRODUCTS if recipe == "int8-dynamic" else BLOCK_PRODUCTS - 1)
    assert all("to_copy" in name for name in generated), "a scale, in bf16, joined the product"


@pytest.mark.cards("h100")
@pytest.mark.parametrize("recipe", ["fp8-dynamic", "int8-dynamic", "int8-weight-only"])
def test_a_recipe_runs_in_the_model_scope(recipe):
    quantized = model("5b", sizes=SIZES, quant=recipe, compile=CompileConfig(scope="model", mode="default"))
    with watch_compilation() as stats:
        call(quantized)
        done = call(quantized, batch=4)
    assert stats.breaks == stats.recompiles == 0
    assert sum(attention_kernels(done).values()) == LAYERS


@pytest.mark.cards("h100")
def test_an_fp8_model_replays_cuda_graphs():
    quantized = model(
        "5b", sizes=SIZES, quant="fp8-dynamic", compile=CompileConfig(scope="model", mode="reduce-overhead")
    )
    for _ in range(4):
        done = call(quantized)
    assert len(done.replays) == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.cards("a100", "rtx3060", "t4")
def test_fp8_products_are_refused_where_there_are_none():
    with pytest.raises(QuantError, match=r"fp8.*8\.9"):
        model("2b", sizes=SIZES, dtype=torch.float16, quant="fp8-dynamic")


@pytest.mark.cards("a100", "rtx4090", "h100", "b200")
@pytest.mark.parametrize("compile", [False, FAST], ids=["eager", "compiled"])
def test_int4_weights_run(compile):
    quantized = model("5b", sizes=INT4_SIZES, quant="int4-weight-only", compile=compile)
    done = [call(quantized) for _ in range(2)][-1]
    assert sum(attention_kernels(done).values()) == LAYERS


@pytest.mark.cards("h100")
@pytest.mark.parametrize("recipe", [*RECIPES, "int4-weight-only"])
def test_quantizing_a_live_model_leaves_its_weights_on_the_device(recipe):
    live = model("5b", sizes=INT4_SIZES if recipe == "int4-weight-only" else SIZES)
    report = quant.quantize(live, recipe, device="cuda")
    assert report.bytes_after < report.bytes_before
    assert {tensor.device.type for tensor in live.state_dict().values()} == {"cuda"}
