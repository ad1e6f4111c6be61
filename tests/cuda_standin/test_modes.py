"""Both scopes and every mode: one graph, CUDA graphs recorded and replayed as they should be, sizes that share one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.standin import journal
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from tests.cuda_standin.device import FAST, FEW_CANDIDATES, IS_ONE_APART, attention_kernels, call, model, of_all_batches
from tests.support import AROUND, inputs

LAYERS = 2


def timed(scope: Any, mode: str) -> CompileConfig:
    return CompileConfig(scope=scope, mode=mode, options=FEW_CANDIDATES if "autotune" in mode else {})


@pytest.mark.cards("h100", "rtx3060")
@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_a_mode_without_cuda_graphs(scope, mode):
    compiled = model("5b", compile=timed(scope, mode))
    with watch_compilation() as stats:
        done = [call(compiled, batch=batch) for batch in (2, 2, 1, 4)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches(scope)
    assert not any(each.replays or each.recordings for each in done)
    assert sum(attention_kernels(done[1]).values()) == LAYERS
    assert set(done[1].triton) == set(done[3].triton)
    assert IS_ONE_APART or set(done[1].triton) == set(done[2].triton)


@pytest.mark.cards("h100", "a100")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_recorded_once_and_replayed(mode):
    compiled = model("5b", compile=timed("model", mode))
    arguments = inputs(compiled.config, dtype=torch.bfloat16, device="cuda")
    outputs, done = [], []
    with torch.no_grad(), watch_compilation() as stats:
        for _ in range(6):
            journal.clear()
            outputs.append(compiled(**arguments, return_dict=False)[0])
            done.append(journal.read())
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1, 0, 0)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    recordings = [nodes for each in done for nodes in each.recordings if nodes]
    assert len(recordings) == 1
    assert all(each.replays == recordings for each in done[-3:]), "one graph with all of the call in it"
    assert not any(each.triton or each.library for each in done[-3:])
    assert len({output.data_ptr() for output in outputs}) == len(outputs), "a later call wrote over an earlier output"


@pytest.mark.cards("h100")
def test_cuda_graphs_of_several_batches_and_after_a_move():
    compiled = model("5b", compile=CompileConfig(scope="model", mode="reduce-overhead"))
    for batch in (2, 4, 2, 4, 2, 4):
        done = call(compiled, batch=batch)
    assert len(done.replays) == 1
    nodes = done.replays
    compiled.to("cpu")
    compiled.to("cuda")
    for _ in range(4):
        done = call(compiled, batch=4)
    assert done.replays == nodes
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.cards("h100")
@pytest.mark.parametrize("scope", ["block", "model"])
def test_twenty_four_sizes_share_a_graph(scope):
    compiled = model("5b", compile=CompileConfig(scope=scope, mode="default"))
    sizes = [(frames, height, width) for frames in (1, 2, 4, 7) for height in (8, 12, 20) for width in (10, 16)]
    assert len(sizes) == 24
    parts = 1 + AROUND if scope == "block" else 1
    graphs = parts * (1 if scope == "block" else 2) * (2 if IS_ONE_APART else 1)  # of a model one latent frame is apart
    with watch_compilation() as stats:
        for index, (frames, height, width) in enumerate(sizes):
            done = call(
                compiled, batch=(2, 1, 4)[index % 3], frames=frames, height=height, width=width, text_len=5 + index % 4
            )
            assert sum(attention_kernels(done).values()) == LAYERS
    assert (stats.graphs, stats.breaks, stats.recompiles) == (graphs, 0, graphs - parts)


@pytest.mark.cards("h100")
@pytest.mark.parametrize(("scope", "batches"), [("block", (2, 1, 4)), ("block", (1, 4, 2)), ("model", (2, 1))], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_training_steps(attention, scope, batches):
    """With flex, in a graph of the whole model, and with torch 2.11, a batch of one is a graph of its own."""
    config = CompileConfig(scope=scope, mode="default")
    trained = model("5b", attention=attention, compile=config).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    with watch_compilation() as stats:
        for batch in batches:
            arguments = inputs(trained.config, dtype=torch.bfloat16, device="cuda", batch=batch)
            journal.clear()
            trained(**arguments, return_dict=False)[0].float().square().mean().backward()
            done = journal.read()
            optimizer.step()
            optimizer.zero_grad()
            assert done.triton
            if attention == "flex":
                assert sum("flex_attention_backward" in line for line in done.lines) >= LAYERS
    graphs = 2 if attention == "flex" or scope == "model" or IS_ONE_APART else 1
    assert (stats.graphs, stats.breaks, stats.recompiles) == (graphs, 0, graphs - 1)


@pytest.mark.cards("h100")
def test_frozen_weights_leave_flex_one_graph_with_gradients_on():
    compiled = model("5b", attention="flex", compile=FAST)
    with watch_compilation() as stats:
        for batch in (2, 1, 4):
            call(compiled, batch=batch, grad=True)
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches("model")


@pytest.mark.cards("h100")
def test_gradient_checkpointing_runs_each_block_twice():
    trained = model("5b", attention="sdpa-flash", compile=FAST).train().requires_grad_(True)
    trained.enable_gradient_checkpointing()
    arguments = inputs(trained.config, dtype=torch.bfloat16, device="cuda")
    journal.clear()
    trained(**arguments, return_dict=False)[0].float().square().mean().backward()
    kinds = attention_kernels(journal.read())
    assert kinds["flash"] == 2 * LAYERS
    assert kinds["flash-backward"] == LAYERS


@pytest.mark.cards("h100")
def test_the_second_device_and_two_models_side_by_side():
    first, second = model("5b", compile=FAST), model("2b", device="cuda:1", compile=FAST)
    with watch_compilation() as stats:
        for _ in range(2):
            assert call(first).devices == {0}
            assert call(second).devices == {1}
    assert (stats.graphs, stats.breaks, stats.recompiles) == (2 * (1 + AROUND), 0, 0)
    assert torch.cuda.current_device() == 0
