"""Every attention backend that can be had: the kernel that it names is the one that runs, eager and compiled."""

from __future__ import annotations

import pytest
import torch

import cogx_fast
from cogx_fast.attention.plan_file import choose_plan
from cogx_fast.config import PRESETS
from cogx_fast.runtime import auto_attention
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from cogx_fast.sizes import count_tokens, default_video
from tests.cuda_standin.device import (
    FAST,
    GIB,
    IS_ONE_APART,
    TENSOR_CARDS,
    attention_kernels,
    call,
    model,
    of_all_batches,
)

LAYERS = 2
KERNELS = {"sdpa-cudnn": "cudnn", "sdpa-flash": "flash", "sdpa-efficient": "efficient"}


@pytest.mark.cards(*TENSOR_CARDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_pinned_backend_runs_its_kernel(backend):
    assert attention_kernels(call(model("5b", attention=backend))) == {KERNELS[backend]: LAYERS}


@pytest.mark.cards("a100", "rtx4090", "h100", "b200")
@pytest.mark.parametrize("backend", ["sdpa", *KERNELS])
def test_every_batch_is_one_graph_with_the_backends_kernel(backend):
    compiled = model("5b", attention=backend, compile=CompileConfig(mode="default", strict=not IS_ONE_APART))
    with watch_compilation() as stats:
        calls = [attention_kernels(call(compiled, batch=batch)) for batch in (2, 1, 4)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches()
    assert all(kernels == calls[0] for kernels in calls)
    possible = [KERNELS[backend]] if backend in KERNELS else ["cudnn", "flash"]
    assert calls[0] in [{kernel: LAYERS} for kernel in possible]


@pytest.mark.cards("h100")
def test_the_math_backend_makes_two_products_a_layer():
    done = call(model("5b", attention="sdpa-math"))
    assert not attention_kernels(done)
    assert (
        sum(
            "gemmStridedBatched" in line.split()[0] or "GemmStridedBatched" in line.split()[0]
            for line in done.of("library")
        )
        == 2 * LAYERS
    )


@pytest.mark.cards("a100", "rtx3060", "rtx4090", "h100", "b200")
def test_flex_runs_its_generated_kernel_within_the_card_s_shared_memory():
    compiled = model("5b", attention="flex", compile=FAST)
    with watch_compilation() as stats:
        calls = [call(compiled, batch=batch) for batch in (2, 1, 4)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches()
    assert all(attention_kernels(done) == {"flex": LAYERS} for done in calls)


@pytest.mark.cards("t4")
@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa-cudnn"])
def test_turing_refuses_what_it_has_no_kernel_for(backend):
    with pytest.raises(ValueError, match=r"compute capability 8\.x .* has 7\.x.*Here run .*sdpa-efficient"):
        model("2b", dtype=torch.float16, attention=backend)


@pytest.mark.cards("rtx4090", "h100")
@pytest.mark.parametrize("backend", ["flex-flash", "fa3", "fa4", "sage"])
def test_a_backend_whose_package_is_missing_says_how_to_get_it(backend):
    with pytest.raises(ValueError, match=rf"{backend}.*(needs the package|compute capability)"):
        model("5b", attention=backend)


@pytest.mark.cards("a100", "rtx4090", "h100", "b200")
@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_sparse_plan_runs_in_flex_and_from_dense_to_sparse_nothing_compiles_or_waits(scope):
    compiled = model(
        "5b", attention_plan="radial", attention="flex", compile=CompileConfig(scope=scope, mode="default")
    )
    assert compiled.attention_plan == choose_plan("radial", compiled.config)
    sizes = {"frames": 7, "height": 24, "width": 20}  # seven blocks of tokens
    with watch_compilation() as stats:
        for batch in (4, 2, 1):  # the highest timestep of four videos is 999, which is dense; of fewer 500
            call(compiled, batch=batch, **sizes)
            done = call(compiled, batch=batch, **sizes)
            assert attention_kernels(done) == {"flex": LAYERS}
            assert "sync" not in done.lines
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches(scope)


@pytest.mark.cards("a100", "rtx4090", "h100", "b200")
def test_auto_times_the_exact_kernels_once_and_remembers(tmp_path):
    first = model("5b", attention="auto")
    assert first.attention_choice.reason.startswith("measured")
    assert set(first.attention_choice.milliseconds) == {"sdpa-cudnn", "sdpa-flash"}
    done = call(first)
    assert attention_kernels(done) == {KERNELS[first.attention_choice.name]: LAYERS}
    again = model("5b", attention="auto")
    assert again.attention_choice.reason.startswith("remembered")
    assert again.attention_choice.name == first.attention_choice.name


@pytest.mark.cards("rtx4090", "h100")
def test_auto_compiled_tries_flex_too():
    chosen = model("5b", attention="auto", compile=FAST)
    assert set(chosen.attention_choice.milliseconds) == {"flex", "sdpa-cudnn", "sdpa-flash"}
    assert sum(attention_kernels(call(chosen)).values()) == LAYERS


@pytest.mark.cards("t4")
def test_auto_on_turing_takes_what_runs_there():
    chosen = model("2b", dtype=torch.float16, attention="auto", compile=FAST)
    assert sum(attention_kernels(call(chosen)).values()) == LAYERS


def at_5bs_own_size(*, compiled: bool = False) -> auto_attention.Choice:
    config = PRESETS["5b"]
    shape = (2, count_tokens(config, default_video(config)).joint, config.num_attention_heads, 64)
    return auto_attention.choose_attention(shape, torch.bfloat16, torch.device("cuda"), compiled=compiled)


@pytest.mark.cards("rtx4060", "rtx3060")
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_at_a_models_own_size_leaves_nothing_in_a_small_cards_memory(compiled):
    held = torch.cuda.memory_allocated()
    chosen = at_5bs_own_size(compiled=compiled)
    assert chosen.milliseconds.keys() == {"sdpa-cudnn", "sdpa-flash"} | ({"flex"} if compiled else set()), chosen.reason
    assert torch.cuda.memory_allocated() == held


@pytest.mark.cards("rtx4060")
def test_auto_measures_again_where_memory_was_taken_while_it_measured(monkeypatch):
    taken = []

    def take(device: torch.device) -> None:
        torch.cuda.empty_cache()
        if not taken:
            taken.append(torch.empty(7 * GIB, dtype=torch.uint8, device=device))

    monkeypatch.setattr(auto_attention, "drop_garbage", take)
    chosen = at_5bs_own_size()
    assert len(chosen.milliseconds) == 1
    assert "failed (out of memory at that moment)" in chosen.reason
    taken[:] = [None]  # free, and taken no more
    chosen = at_5bs_own_size()
    assert chosen.reason.startswith("measured")
    assert set(chosen.milliseconds) == {"sdpa-cudnn", "sdpa-flash"}


@pytest.mark.cards("h100")
def test_a_model_of_its_own_package_is_loaded_to_the_device_it_is_asked_for():
    made = model("5b", device="cuda:1")
    assert {tensor.device for tensor in made.state_dict().values()} == {torch.device("cuda:1")}
    assert cogx_fast.load(made).device == torch.device("cuda:1")
