"""What failed, or was other than said, when the package first met CUDA: on the stand-in device, a case for each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

import cogx_fast
import quant
from benchmarks.standin import journal
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from tests.cuda_standin.device import (
    IS_ONE_APART,
    STOPS_AT_VIEWS,
    attention_kernels,
    call,
    checkpoint,
    full_width,
    model,
)  # fmt: skip
from tests.support import AROUND, inputs

# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.cards("h100", "a100")
@pytest.mark.parametrize("compile", [False, CompileConfig(mode="default")], ids=["eager", "compiled"])
def test_sdpa_takes_the_kernel_that_torch_takes(compile: Any) -> None:
    found = call(model(compile=compile, attention="sdpa"))
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert bool(found.count("cudnn")) == is_hopper
    assert bool(found.count("flash_fwd")) != is_hopper


_PINNED_FIRST = """
from tests.cuda_standin.device import FAST, attention_kernels, call, model
for compile in (False, FAST):
    call(model(attention="sdpa-flash", compile=compile))
print(dict(attention_kernels(call(model(attention="sdpa")))))
"""


def test_pinning_a_kernel_leaves_torch_its_choice_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", _PINNED_FIRST], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["{'cudnn': 2}"], done.stdout + done.stderr


def test_masked_attention_is_trained_without_cudnn() -> None:
    trained = model(attention="sdpa").train()
    arguments = inputs(trained.config, dtype=trained.dtype, device="cuda")
    journal.clear()
    trained(**arguments, attention_kwargs={"attention_mask": torch.ones(2, 128, dtype=torch.bool, device="cuda")})
    found = journal.read()
    assert found.count("fmha_cutlassF") == trained.config.num_layers
    assert not found.count("cudnn")


@pytest.mark.cards("t4")
def test_turing_computes_bf16_attention_without_every_score() -> None:
    found = call(model(dtype=torch.bfloat16, attention="sdpa"))
    assert found.count("fmha_cutlassF") == 2
    assert not found.count("bfloat16_kernel_impl_softmax")


@pytest.mark.cards("t4")
def test_turing_refuses_bf16_where_it_is_generated() -> None:
    with pytest.raises(ValueError, match=r"takes bfloat16 from compute capability 8.0 on: load the model in float16"):
        model(dtype=torch.bfloat16, attention="flex", compile=True)
    with pytest.raises(ValueError, match=r"in bfloat16 on Tesla T4.*dtype='fp16'"):
        call(model(dtype=torch.bfloat16, attention="sdpa", compile=True))


@pytest.mark.cards("t4")
def test_flex_fits_into_turings_shared_memory() -> None:
    compiled = model(dtype=torch.float16, attention="flex", compile=CompileConfig(mode="default"))
    assert call(compiled).count("flex_attention") == compiled.config.num_layers


# -- the device of the first call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, CompileConfig(mode="default")], ids=["eager", "compiled"])
def test_attention_is_chosen_on_the_device_of_the_call(compile: Any) -> None:
    moved = model(device="cpu", attention="auto", compile=compile).to("cuda")
    call(moved)
    assert moved.attention_choice is not None
    assert "sdpa-flash" in moved.attention_choice.milliseconds
    assert ("flex" in moved.attention_choice.milliseconds) == bool(compile)
    assert moved.attention_choice.name in moved.attention_backends


def test_auto_refuses_no_mask() -> None:
    chosen = model(attention="auto")
    assert chosen.attention_choice is not None
    assert chosen.attention_choice.name in ("sdpa-cudnn", "sdpa-flash")  # which take none
    arguments = inputs(chosen.config, dtype=chosen.dtype, device="cuda")
    journal.clear()
    with torch.no_grad():
        chosen(**arguments, attention_kwargs={"attention_mask": torch.ones(2, 128, dtype=torch.bool, device="cuda")})
    assert attention_kernels(journal.read()).total() == chosen.config.num_layers
    assert set(chosen.attention_backends) == {chosen.attention_choice.name}


def test_options_and_graphs_are_those_of_the_device_of_the_call(timed: list[tuple[str, int, int]]) -> None:
    graphs = model(device="cpu", compile=CompileConfig(scope="model", mode="reduce-overhead")).to("cuda")
    outputs = [call(graphs) for _ in range(4)]
    assert outputs[-1].replays
    call(model(device="cpu", quant="int8-dynamic", compile=True).to("cuda"))
    assert [name for name, library, generated in timed if name == "int_mm" and generated > 1 and not library]


# -- quantization ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "int8-dynamic", "int4-weight-only"])
def test_weights_of_real_sizes_are_quantized_in_few_launches(recipe: str) -> None:
    whole = full_width()
    journal.clear()
    report = quant.quantize(whole, recipe)
    assert all(linear.bytes_after < linear.bytes_before for linear in report.linears if linear.scheme)
    assert journal.launches() < 250  # in pieces of a million values: 2,240
    quantized = [module for module in whole.modules() if isinstance(module, nn.Linear)]
    assert sum(hasattr(linear.weight, "__tensor_flatten__") for linear in quantized) == 4


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """The library's and the generated candidates of each product that is compiled; then the first is taken untimed, but
    of int8 products the first two are timed, since Inductor decides what joins a product only where it is timed."""
    from torch._inductor.kernel import mm
    from torch._inductor.select_algorithm import ExternKernelCaller, autotune_select_algorithm

    seen: list[tuple[str, int, int]] = []

    def take_few(name: str, choices: list[Any], *arguments: Any, **options: Any) -> Any:
        library = sum(isinstance(choice, ExternKernelCaller) for choice in choices)
        seen.append((name, library, len(choices) - library))
        return autotune_select_algorithm(name, choices[: 2 if name == "int_mm" else 1], *arguments, **options)

    monkeypatch.setattr(mm, "autotune_select_algorithm", take_few)
    with fresh_cache():
        yield seen


@pytest.mark.cards("h100", "rtx3060", "rtx4060", "t4")
def test_int8_products_scale_their_sums_where_triton_can(timed: list[tuple[str, int, int]]) -> None:
    dtype = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    compiled = model(quant="int8-dynamic", dtype=dtype, compile=True)
    with watch_compilation() as stats:
        for batch in (2, 1, 4):
            found = call(compiled, batch=batch)
    graphs = 2 if IS_ONE_APART else 1
    assert stats.graphs == graphs * (1 + AROUND)
    products = [(library, bool(generated)) for name, library, generated in timed if name == "int_mm"]
    is_triton = torch.cuda.get_device_capability()[0] >= 8
    assert products == [(0, True) if is_triton else (1, False)] * 4 * graphs
    assert found.count("triton_tem") == 4 * compiled.config.num_layers * is_triton


def test_int8_products_compile_in_a_graph_of_the_whole_model() -> None:
    """Where rows are a sum, B · T + B · V: Inductor could not split the loops that it had merged (CantSplit)."""
    compiled = model(quant="int8-dynamic", compile=CompileConfig(scope="model", mode="default"))
    with watch_compilation() as stats:
        for batch in (2, 1):
            call(compiled, batch=batch)
    graphs = 2 if IS_ONE_APART else 1
    assert (stats.graphs, stats.breaks, stats.recompiles) == (graphs, 0, graphs - 1)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_an_int8_product_that_is_timed_is_joined_by_its_scaling_and_the_gelu(scope: Any) -> None:
    """Torch times that join last, when they are part of something else: a KeyError, or a pass of their own."""
    compiled = model(quant="int8-dynamic", sizes={"num_layers": 1}, compile=CompileConfig(scope=scope))
    call(compiled)
    products = [name for name in call(compiled).triton.elements() if "int_mm" in name and "_tem_" in name]
    assert len(products) == 4
    assert sum("gelu" in name for name in products) == 1
    assert all("mul" in name for name in products)


@pytest.mark.parametrize("preset", ["2b", "5b"])
def test_int8_products_of_real_widths_write_no_sums(preset: str, timed: list[tuple[str, int, int]]) -> None:
    whole = full_width(preset)
    quant.quantize(whole, "int8-dynamic")
    compile_model(whole, CompileConfig())
    sizes = {"frames": 1, "height": 32, "width": 48}
    found, codes = run_and_get_code(call, whole, **sizes)
    assert sum("triton_tem" in name for name in found.triton.elements()) >= 4
    buffers = sum(code.count(", torch.int32)") for code in codes)
    assert buffers == (1 if STOPS_AT_VIEWS else 0), "int32 buffers of products' sums"


def test_products_that_are_not_quantized_keep_the_librarys_kernel(timed: list[tuple[str, int, int]]) -> None:
    call(model(quant="int8-mixed", compile=CompileConfig(scope="model", mode="max-autotune-no-cudagraphs")))
    others = [library for name, library, _ in timed if name != "int_mm"]
    assert others
    assert all(others)


@pytest.mark.cards("h100", "rtx4090")
def test_fp8_products_are_timed_with_few_candidates_and_once(timed: list[tuple[str, int, int]]) -> None:
    whole = full_width()
    quant.quantize(whole, "fp8-dynamic")
    compile_model(whole, CompileConfig())
    sizes = {"frames": 3, "height": 32, "width": 48}  # a video's rows, in a batch of one as well
    with watch_compilation() as stats:
        for batch in (2, 1):
            call(whole, batch=batch, **sizes)
    graphs = 2 if IS_ONE_APART else 1
    assert stats.graphs == graphs * (1 + AROUND)
    products = [(library, generated) for name, library, generated in timed if name == "scaled_mm"]
    assert len(products) == 4 * graphs
    assert all(library == 1 and 8 <= generated <= 32 for library, generated in products), products


# -- what compiling made -----------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the bundle of a model of it that was compiled on cuda:0."""
    path = checkpoint(tmp_path / "model")
    with fresh_cache():
        made = load(path, "cuda")
        call(made)
        made.save_compile_cache(tmp_path / "m.bundle")
    return path, tmp_path / "m.bundle"


def load(path: Path, device: str, **options: Any) -> CogVideoXModel:
    config = CompileConfig(mode="default")
    return cogx_fast.load(path, device=device, dtype="bf16", attention="sdpa", compile=config, **options)


@pytest.mark.parametrize("moved", [False, True])
def test_a_bundle_starts_a_model_warm(bundle: tuple[Path, Path], moved: bool) -> None:
    path, file = bundle
    torch._dynamo.reset()
    with fresh_cache():
        warm = load(path, "cpu" if moved else "cuda", compile_cache=file)
        counters.clear()
        call(warm.to("cuda"))
    assert (counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]) == (
        1 + AROUND,
        0,
    )


def test_a_bundle_of_another_device_is_refused_with_words(bundle: tuple[Path, Path]) -> None:
    path, file = bundle
    with fresh_cache(), pytest.warns(UserWarning, match=r"device\.index: got 0, expected 1.*compiles anew"):
        call(load(path, "cuda:1", compile_cache=file))
