"""Calls that are recorded and replayed: what a caller is given stays, what a caller gave may change. Needs a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import quant
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from tests.support import inputs, predict, relative_error, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
]


def make(recipe: str | None = None) -> CogVideoXModel:
    torch.manual_seed(0)
    model = CogVideoXModel(small("5b", num_layers=3)).eval().requires_grad_(False).to("cuda", torch.bfloat16)
    if recipe is not None:
        quant.quantize(model, recipe)
    return model


def on_gpu(model: CogVideoXModel, **options: Any) -> dict[str, Any]:
    return inputs(model.config, dtype=torch.bfloat16, device="cuda", **options)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_outputs_stay_and_inputs_may_be_reused_or_freed(mode: str) -> None:
    from torch._dynamo.utils import counters
    from torch.profiler import ProfilerActivity, profile

    model, eager = make(), make()
    compile_model(model, CompileConfig(scope="model", mode=mode, strict=True))
    skipped = counters["inductor"]["cudagraph_skips"]
    expected = [predict(eager, on_gpu(model, seed=seed)) for seed in range(8)]
    kept, reused = [], on_gpu(model)
    for seed in range(8):
        given = on_gpu(model, seed=seed)
        if seed % 2:  # the same memory each time, as of a loop that writes into its latents
            for name, tensor in reused.items():
                tensor.copy_(given[name])
            given = reused
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            kept.append(predict(model, given))
        for tensor in given.values():  # and what was given is overwritten, or freed, before the result is read
            tensor.zero_()
    assert any("cudaGraphLaunch" in event.key for event in profiled.key_averages()), "the last call was no replay"
    assert counters["inductor"]["cudagraph_skips"] == skipped
    assert len({output.data_ptr() for output in kept}) == len(kept)
    assert max(map(relative_error, kept, expected)) <= 2e-2  # bf16: fused arithmetic rounds in other places


@pytest.mark.parametrize("recipe", [None, "int8-weight-only", "fp8-weight-only", "int8-dynamic", "fp8-dynamic"])
@pytest.mark.parametrize("batches", [(1, 2, 4), (4, 1)], ids=str)
def test_all_batches_on_cuda_are_one_graph(recipe: str | None, batches: tuple[int, ...]) -> None:
    """torch 2.11 cannot be told that a batch is 1 or more: with quantized activations, 1 has a graph of its own."""
    from torch._dynamo.decorators import mark_unbacked

    is_told = "min" in inspect.signature(mark_unbacked).parameters
    model, eager = make(recipe), make(recipe)
    compile_model(model, CompileConfig())
    with watch_compilation() as stats:
        for batch in batches:
            given = on_gpu(model, batch=batch)
            assert relative_error(predict(model, given), predict(eager, given)) <= 5e-2
    graphs = 1 if is_told or recipe not in ("int8-dynamic", "fp8-dynamic") else 2
    assert (stats.graphs, stats.breaks) == (graphs, 0)
