"""The main job on every card: load, call; load compiled, with all defaults, call."""

from __future__ import annotations

import pytest
import torch

from benchmarks.standin import journal
from cogx_fast.measure.contest import call_arguments
from cogx_fast.runtime.compiling.compile import compile_model
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from cogx_fast.sizes import count_tokens, default_video
from tests.cuda_standin.device import (
    BLOCK_PRODUCTS,
    EVERY_CARD,
    FAST,
    IS_ONE_APART,
    TENSOR_CARDS,
    attention_kernels,
    call,
    full_width,
    model,
    of_all_batches,
    products,
)
from tests.support import AROUND

LAYERS = 2


@pytest.mark.cards(*TENSOR_CARDS)
def test_an_eager_model_runs_flash_or_cudnn_attention_and_fuses_gelu_into_the_product():
    done = call(model("5b"))
    assert sum(attention_kernels(done)[kind] for kind in ("cudnn", "flash")) == LAYERS
    assert products(done) == LAYERS * BLOCK_PRODUCTS
    gelu_and_bias = "epilogue 36"
    assert sum(gelu_and_bias in line for line in done.of("library")) == LAYERS
    assert not done.triton


@pytest.mark.cards("t4")
def test_turing_runs_the_memory_efficient_kernel():
    done = call(model("2b", dtype=torch.float16))
    assert attention_kernels(done) == {"efficient": LAYERS}


@pytest.mark.cards(*TENSOR_CARDS)
def test_compiled_by_default_every_batch_shares_one_graph():
    compiled = model("5b", compile=True)
    with watch_compilation() as stats:
        first, _ = [call(compiled, batch=batch) for batch in (2, 1)]
        others = [call(compiled, batch=batch) for batch in (2, 1, 4)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches()
    for done in others:
        assert sum(attention_kernels(done)[kind] for kind in ("cudnn", "flash")) == LAYERS
        assert set(done.triton) == set(others[0].triton) or (IS_ONE_APART and done is others[1])
        assert set(done.triton.values()) == {1, LAYERS}, "each kernel of the block once for each layer, others once"
    assert len(first.lines) > len(others[0].lines), "the first call timed the candidates"


@pytest.mark.cards("t4")
def test_turing_compiles_fp16():
    compiled = model("2b", dtype=torch.float16, compile=True)
    with watch_compilation() as stats:
        call(compiled)
        done = call(compiled, batch=4)
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    assert attention_kernels(done) == {"efficient": LAYERS}
    assert set(done.triton.values()) == {1, LAYERS}


@pytest.mark.parametrize("preset", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
@pytest.mark.cards("h100")
def test_the_other_variants_run_eager_and_compiled(preset):
    dtype = torch.float16 if preset == "2b" else torch.bfloat16  # as they were released
    eager = call(model(preset, dtype=dtype))
    compiled_model = model(preset, dtype=dtype, compile=FAST)
    with watch_compilation() as stats:
        compiled = [call(compiled_model, batch=batch) for batch in (2, 1, 1)][-1]
    assert (stats.graphs, stats.breaks, stats.recompiles) == of_all_batches()
    assert attention_kernels(eager) == attention_kernels(compiled)
    assert products(eager) == products(compiled) == LAYERS * BLOCK_PRODUCTS
    assert set(compiled.triton.values()) == {1, LAYERS}


@pytest.mark.cards(*EVERY_CARD)
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_layer_of_5b_at_its_own_size_compiles(attention):
    dtype = torch.float16 if torch.cuda.get_device_capability()[0] < 8 else torch.bfloat16
    compiled = full_width("5b", attention=attention, dtype=dtype)
    compile_model(compiled, FAST)
    tokens = count_tokens(compiled.config, default_video(compiled.config))
    given = call_arguments(compiled.config, tokens, 2, dtype, torch.device("cuda"))
    with torch.no_grad(), watch_compilation() as stats:
        compiled(**given)
        journal.clear()
        compiled(**given)
    done = journal.read()
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    assert sum(attention_kernels(done).values()) == 1
    assert ("flex" in attention_kernels(done)) == (attention == "flex")
    assert set(done.triton.values()) == {1}


@pytest.mark.cards(*EVERY_CARD)
def test_float32_runs(request):
    done = call(model("5b", dtype=torch.float32))
    assert attention_kernels(done) == {"efficient": LAYERS}
