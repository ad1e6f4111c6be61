import copy
import gc

import psutil
import pytest
import torch
from torch import nn

import cogx_fast
from cogx_fast.weights.errors import CheckpointError
from tests.cases import for_each
from tests.model.pairs import call
from tests.support import RELEASED, predict, small, upstream
from tests.weights.support import assert_same_bits, diffusers_view


@for_each("name", RELEASED)
def test_weights_are_shared_and_the_source_keeps_working(name):
    config = small(name)
    source = upstream(config)
    arguments = call(config)
    state, output = copy.deepcopy(source.state_dict()), predict(source, arguments)
    pointers = {key: tensor.data_ptr() for key, tensor in source.state_dict().items()}

    model = cogx_fast.load(source)
    ours = diffusers_view(model)
    assert_same_bits(ours, state)
    assert_same_bits(source.state_dict(), state)
    assert torch.equal(predict(source, arguments), output)
    for key, tensor in source.state_dict().items():
        assert ours[key].data_ptr() == tensor.data_ptr(), key
        if not any(part in key for part in ("to_q.", "to_k.", "to_v.", "norm1.linear", "norm2.linear")):
            assert tensor.data_ptr() == pointers[key], key
    assert not model.training


def test_memory_is_not_doubled():
    config = small("5b", num_attention_heads=16, num_layers=6, time_embed_dim=512)
    source = upstream(config)
    size = sum(parameter.nbytes for parameter in source.parameters())
    gc.collect()
    before = psutil.Process().memory_info().rss
    model = cogx_fast.load(source)
    grown = psutil.Process().memory_info().rss - before
    assert size > 3e8
    assert grown < 0.1 * size, f"{grown / 1e6:.0f} MB more for {size / 1e6:.0f} MB of weights"
    del model


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"dtype": torch.float64}])
def test_another_dtype_is_a_copy(options):
    config = small("5b")
    source = upstream(config)
    state = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in source.state_dict().items()}
    model = cogx_fast.load(source, **options)
    assert_same_bits(diffusers_view(model), {key: tensor.to(model.dtype) for key, (_, tensor) in state.items()})
    for key, tensor in source.state_dict().items():
        assert tensor.data_ptr() == state[key][0]
        assert torch.equal(tensor, state[key][1])


def test_frozen_weights_stay_frozen():
    source = upstream(small("5b")).requires_grad_(False)
    source.proj_out.weight.requires_grad_(True)
    model = cogx_fast.load(source)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["proj_out.weight"]


def test_gradients_of_both_are_separate():
    source = upstream(small("5b"))
    model = cogx_fast.load(source)
    model.proj_out.weight.grad = torch.ones_like(model.proj_out.weight)
    assert source.proj_out.weight.grad is None


def test_one_of_ours_is_shared_as_well():
    model = cogx_fast.load(upstream(small("5b-i2v")))
    other = cogx_fast.load(model, attention="flex")
    assert set(other.attention_backends) == {"flex"}
    assert set(model.attention_backends) == {"sdpa"}
    ours = dict(other.named_parameters())
    assert all(ours[name].data_ptr() == tensor.data_ptr() for name, tensor in model.named_parameters())
    assert_same_bits(other.state_dict(), model.state_dict())
    assert cogx_fast.load(model, dtype="bf16").dtype == torch.bfloat16


def test_after_unfusing():
    source = upstream(small("5b"))
    source.fuse_qkv_projections()
    with pytest.raises(CheckpointError, match="unfuse_qkv_projections"):
        cogx_fast.load(source)
    source.unfuse_qkv_projections()
    state = {key: tensor for key, tensor in source.state_dict().items() if "to_qkv" not in key}
    assert_same_bits(diffusers_view(cogx_fast.load(source)), state)


def refused(source, words, **options):
    with pytest.raises(CheckpointError, match=words):
        cogx_fast.load(source, **options)


def test_refused():
    config = small("5b")
    refused(nn.Linear(2, 2), "got a Linear, expected diffusers' CogVideoXTransformer3DModel")
    refused(upstream(config), "leave it out", config=config)
    refused(upstream(config).to("meta"), "meta device")
    refused(upstream(config).to(torch.float8_e4m3fn), "pass dtype='bf16'")

    adapted = upstream(config)
    adapted.proj_out.lora_A = nn.Linear(2, 2)
    refused(adapted, "fuse_lora")

    poisoned = upstream(config)
    poisoned.proj_out.weight.data[0, 0] = float("nan")
    cogx_fast.load(poisoned)
    refused(poisoned, "infinite or NaN weights: proj_out.weight", check_finite=True)


def test_refused_source_is_left_as_it_was():
    source = upstream(small("5b"))
    pointers = {key: tensor.data_ptr() for key, tensor in source.state_dict().items()}
    source.extra = nn.Linear(2, 2)
    refused(source, "do not belong to it: extra.weight")
    assert {key: source.state_dict()[key].data_ptr() for key in pointers} == pointers


def test_foreign_tensors_are_refused():
    class Distributed(torch.Tensor):
        pass

    source = upstream(small("5b"))
    source.proj_out.weight = nn.Parameter(source.proj_out.weight.detach().as_subclass(Distributed))
    refused(source, "Distributed, neither plain tensors nor")
