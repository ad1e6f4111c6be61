"""What is said of a compiled model is what is there: counted beside formulas, planted breaks and recompiles seen."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import cogx_fast
from cogx_fast import CompileConfig, sizes
from cogx_fast.measure import costs
from cogx_fast.measure.explain import Explanation, empty_model, explain
from cogx_fast.measure.explain.capture import Capture, Clock
from cogx_fast.measure.explain.rehearsal import Rehearsal
from cogx_fast.measure.explain.report import Graph
from cogx_fast.runtime.compiling.compile import compile_model, watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.step_caching.step_cache import Step, StepCache
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from tests.cases import for_each
from tests.conftest import report, run_cli
from tests.runtime import generations
from tests.support import inputs, small

AROUND_PRODUCTS = 7
"""Patches, text, the timestep's two, every block's modulation, the last norm's, and the projection of the output."""
FIRST, SECOND = (2, 13, 96, 80), (1, 13, 64, 80)


def make(**changes: Any) -> CogVideoXModel:
    torch.manual_seed(0)
    return CogVideoXModel(small("5b", **changes)).eval()


@pytest.fixture(scope="module")
def explained() -> Explanation:
    """Built to machine code and started a second time."""
    return make().explain(FIRST, compile=CompileConfig(dynamic=False))


@pytest.fixture(scope="module")
def recompiled() -> Explanation:
    """Two sizes, each compiled for itself; captured only."""
    return make().explain(FIRST, SECOND, compile=CompileConfig(dynamic=False, backend="eager"))


def of_block(found: Explanation) -> Graph:
    return next(graph for graph in found.graphs if graph.function == "block")


# -- what is there -----------------------------------------------------------------------------------------------------


def test_graphs_and_how_often_they_run(recompiled: Explanation) -> None:
    assert [(graph.function, graph.size, graph.runs) for graph in recompiled.graphs] == [
        (name, size, runs) for size in (0, 1) for name, runs in (("begin", 1), ("block", 2), ("head", 1))
    ]
    assert not recompiled.breaks
    assert not any(graph.is_symbolic for graph in recompiled.graphs)
    assert [graph.operators > 50 for graph in recompiled.graphs] == [False, True, False] * 2


def test_a_recompile_says_what_caused_it(recompiled: Explanation) -> None:
    assert [(each.function, each.size) for each in recompiled.recompiles] == [("begin", 1), ("block", 1), ("head", 1)]
    recompile = recompiled.recompiles[1]
    assert "hidden_states' size is 1 × 4 × 16 × 8 × 10, was 2 × 4 × 16 × 12 × 10" in recompile.cause
    assert "text_BTE" in recompile.cause, "of begin: the model says once in a call why"
    assert "expected 2, actual 1" in recompile.cause
    assert "6 graphs, 0 breaks, 3 recompiles" in str(recompiled)
    assert f"recompile   block at 1 × 13 × 64 × 80: {recompile.cause}" in str(recompiled)


def test_operations_are_those_of_the_cost_model(explained: Explanation) -> None:
    config = small("5b")
    video = sizes.VideoSize(frames=13, height=96, width=80)
    flops = costs.count_flops(config, sizes.count_tokens(config, video), batch=2)
    assert explained.kinds["attention"].flops == flops.pop("attention scores")
    assert explained.kinds["matmul"].flops == sum(flops.values())
    assert explained.total.flops == explained.kinds["attention"].flops + explained.kinds["matmul"].flops


def test_bytes_of_the_products_are_their_operands_and_results(explained: Explanation) -> None:
    config = small("5b")
    width = config.inner_dim
    tokens = 2 * sizes.count_tokens(config, sizes.VideoSize(frames=13, height=96, width=80)).joint
    linears = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    expected = sum(tokens * i + i * o + o + tokens * o for i, o in linears)
    block = of_block(explained)
    products = [kernel for kernel in block.kernels if kernel.kind == "matmul"]
    assert (len(products), block.runs) == (len(linears), config.num_layers)
    assert sum(kernel.bytes for kernel in products) == 4 * expected
    stream = 4 * tokens * width
    assert explained.kinds["attention"].bytes == config.num_layers * 4 * stream


def test_every_kernel_is_counted_once(explained: Explanation) -> None:
    graph = of_block(explained)
    assert sum(not kernel.is_generated for kernel in graph.kernels) == 5  # four products and attention
    assert 5 < graph.launches <= len(graph.kernels)
    assert graph.inductor_bytes >= graph.bytes > 0
    assert explained.total.kernels == sum(graph.runs * len(graph.kernels) for graph in explained.first)
    assert {"pointwise", "reduction", "matmul", "attention"} <= explained.kinds.keys()


def test_weights(explained: Explanation) -> None:
    model = make()
    assert explained.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert explained.weights == {"float32": 4 * explained.parameters}


def test_seconds_by_phase_and_the_second_start(explained: Explanation) -> None:
    assert all(seconds > 0 for seconds in explained.seconds.values())
    assert list(explained.seconds) == ["dynamo", "aot", "inductor", "build"]
    assert explained.cache is not None
    assert (explained.cache.hits, explained.cache.misses) == (3, 0)
    assert explained.cache.seconds > 0


def test_text_and_json_say_it(explained: Explanation) -> None:
    text = str(explained)
    assert "3 graphs, 0 breaks, 0 recompiles" in text
    assert "matmul addmm" in text
    data = json.loads(json.dumps(explained.to_dict()))
    assert data["sizes"] == [{"batch": 2, "frames": 13, "height": 96, "width": 80, "step": ""}]
    assert data["total"]["flops"] == explained.total.flops
    assert len(data["graphs"][0]["kernels"]) == len(explained.graphs[0].kernels)


# -- planted -----------------------------------------------------------------------------------------------------------


def _breaking(module: Any, arguments: Any, output: Any) -> None:
    torch._dynamo.graph_break()  # planted


def test_a_break_in_a_hook_is_reported_with_reason_and_line() -> None:
    model = cogx_fast.load("tiny")
    model.transformer_blocks[0].attn1.register_forward_hook(_breaking)
    found = model.explain((1, 5, 16, 16), spatial_factor=4, compile=CompileConfig(backend="eager"))
    lines, first = inspect.getsourcelines(_breaking)
    planted = found.breaks[0]
    assert (planted.file, planted.line) == (__file__, first + 1)
    assert planted.code == lines[1].strip()
    assert "graph_break" in planted.reason
    assert len(found.graphs) > 1
    assert f"break   {__file__}:{first + 1}" in str(found)


def test_what_a_graph_holds_at_once_by_hand() -> None:
    def two_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w) @ w.t()

    capture = Capture(build=False)
    with capture.watching(), torch.no_grad():
        capture.compiler(two_products)(torch.empty(64, 32), torch.empty(32, 128))
    (graph,) = capture.graphs
    assert [kernel.kind for kernel in graph.kernels] == ["matmul", "pointwise", "matmul"]
    assert graph.peak_bytes == 4 * 2 * 64 * 128  # before and after relu
    assert [kernel.bytes // 4 for kernel in graph.kernels] == [
        64 * 32 + 32 * 128 + 64 * 128, 2 * 64 * 128, 64 * 128 + 32 * 128 + 64 * 32
    ]  # fmt: skip


def test_a_kernel_that_only_moves_is_a_copy() -> None:
    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous()

    capture = Capture(build=False)
    with capture.watching(), torch.no_grad():
        capture.compiler(turned)(torch.empty(64, 32))
    assert [kernel.kind for graph in capture.graphs for kernel in graph.kernels] == ["copy"]


def test_inner_phases_stop_the_outer_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock.phase("aot"), clock.phase("inductor"):
        pass
    assert (clock.seconds["aot"], clock.seconds["inductor"]) == (5.0, 2.0)


# -- what is left alone ------------------------------------------------------------------------------------------------


def test_the_model_and_torch_stay_as_they_were() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config

    model = make(num_layers=1)
    compile_model(model, CompileConfig(backend="eager"))
    arguments = inputs(model.config)
    with torch.no_grad():
        before = model(**arguments).sample
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    runner = model.runner
    settings, environment = config.get_config_copy(), dict(os.environ)
    counted = {group: dict(counts) for group, counts in counters.items()}

    explain(model, FIRST, compile=CompileConfig(), build=False)

    assert config.get_config_copy() == settings
    assert dict(os.environ) == environment
    assert {group: dict(counts) for group, counts in counters.items()} == counted
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers
    assert model.runner is runner
    with watch_compilation() as stats, torch.no_grad():
        after = model(**arguments).sample
    assert stats.graphs == 0
    assert torch.equal(before, after)


def test_a_model_is_explained_as_it_is_compiled() -> None:
    model = make(num_layers=1)
    compile_model(model, CompileConfig(backend="eager", scope="model"))
    found = model.explain(FIRST)
    assert found.scope == "model"
    assert [len(graph.kernels) for graph in found.graphs] == [0]  # that backend writes no code


@pytest.mark.parametrize("scope", ["block", "model"])
def test_each_kind_of_step_of_a_step_cache_is_compiled(scope: Any) -> None:
    """Whole, the first block alone, and of both the conditional half alone."""
    model = make()
    model.set_step_cache(
        StepSchedule(blocks=(2, 2, 1, 2, 2, 1), num_layers=2, forecast="reuse", unconditional=(1, 1, 0, 0, 1, 0))
    )
    found = model.explain(FIRST, SECOND, compile=CompileConfig(backend="eager", scope=scope))
    steps = ["", "", "1 block", "2 blocks of one half", "1 block of one half"]
    assert [size.step for size in found.sizes] == steps
    assert not found.breaks
    assert not found.recompiles
    counts = {graph.function: graph.runs_at for graph in found.graphs}
    if scope == "block":
        assert counts == {"begin": (1,) * 5, "block": (2, 2, 1, 2, 1), "head": (1,) * 5}
    else:
        assert [graph.runs_at for graph in found.graphs] == [
            (1, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)
        ]  # fmt: skip
    assert "2 × 13 × 96 × 80 in a step of 1 block of one half" in str(found)


def test_a_rehearsed_step_is_given_what_a_generation_gives_it() -> None:
    """Of each kind of step: as much to fill in, and for the other half, as there is in a real one."""
    model = generations.make()
    model.set_step_cache(generations.schedule(4, 4, 1, 4, 4, 0, unconditional=(1, 1, 0, 0, 1, 0), forecast="reuse"))
    cache = model.runner.slots.reuse
    assert isinstance(cache, StepCache)
    seen: list[tuple[str, list[Any], list[Any]]] = []

    def shapes(step: Step) -> list[Any]:
        return [None if each is None else (each.shape, each.dtype) for each in (step.stand_in, step.difference)]

    def begin(model: CogVideoXModel, inputs: Any) -> Step:
        step = StepCache.begin(cache, model, inputs)
        rehearsed = Rehearsal(cache, step.pattern).begin(model, inputs)
        seen.append((str(step.pattern), shapes(step), shapes(rehearsed)))
        return step

    cache.begin = begin  # type: ignore[method-assign,assignment]
    generations.generate_guided(model, generations.timesteps(6))
    alone = {str(pattern) for pattern in cache.patterns(4) if pattern.conditional}
    assert {pattern for pattern, _, _ in seen} == {"4 blocks"} | alone
    for pattern, real, rehearsed in seen:
        assert real == rehearsed, pattern


def test_a_model_without_values_takes_no_memory_for_them() -> None:
    model = empty_model(small("5b"), attention="sdpa", dtype=torch.bfloat16, device=torch.device("cpu"))
    found = explain(model, FIRST, compile=CompileConfig(backend="eager"))
    assert "FakeTensor" in repr(next(model.parameters()))
    assert found.weights == {"bfloat16": 2 * found.parameters}


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(small("5b"))))
    size = ("--frames", "13", "--height", "96", "--width", "80")
    told = report(run_cli("explain", config, *size, "--layers", "1", "--no-build", "--dtype", "fp32", "--json"))
    assert told["sizes"] == [{"batch": 2, "frames": 13, "height": 96, "width": 80, "step": ""}]
    assert told["kinds"]["matmul"]["kernels"] == 4 + AROUND_PRODUCTS
    assert told["cache"] is None


def test_the_command_with_a_recipe(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(small("5b"))))
    size = ("--frames", "13", "--height", "96", "--width", "80", "--layers", "1", "--no-build")
    options = ("--quant", "int8-weight-only", "--step-cache", "balanced", "--json")
    told = report(run_cli("explain", config, *size, *options))
    assert [each["step"] for each in told["sizes"]] == ["", "0 blocks"]
    assert {graph["function"]: graph["runs_at"] for graph in told["graphs"]}["block"] == [1, 0]
    assert told["kinds"]["matmul"]["kernels"] == 4 + AROUND_PRODUCTS
    assert told["weights"]["Int8Tensor"] > 0


@for_each(
    "arguments, words",
    [
        (("nothing",), "no preset"),
        (("5b", "--height", "481"), "multiple of 16 pixels"),
        (("5b", "--then", "1,2"), "expected videos,frames,height,width"),
        (("5b", "--mode", "fastest"), "mode is 'fastest'"),
        (("5b", "--attention", "best"), "'best' is not known"),
        (("5b", "--quant", "best"), "best"),
        (("5b", "--step-cache", "best"), "best"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(arguments: tuple[str, ...], words: str) -> None:
    finished = run_cli("explain", *arguments)
    assert finished.status == 2
    assert words in finished.err


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="videos in a call, frames, height, width"):
        make().explain((49, 480, 720))


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_tritons() -> None:
    found = make().to("cuda", torch.bfloat16).explain(FIRST)
    assert found.device.startswith("cuda")
    assert found.kinds["pointwise"].kernels > 0
    assert found.cache is not None
    assert found.cache.misses == 0
