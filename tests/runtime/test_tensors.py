"""A block's weights as plain tensors: all of them, as they are now, without a walk at every call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cogx_fast.model.transformer import Block
from cogx_fast.runtime.tensors import Weights, hash_block, leaves, named_weights, unflatten
from tests.cases import for_each
from tests.support import small

SCHEMES = (None, "int8-dynamic", "int8-weight-only", "fp8-weight-only")


def make(scheme: str | None = None) -> Block:
    torch.manual_seed(0)
    block = Block(small("5b"), "sdpa").requires_grad_(False)
    if scheme is not None:
        quantize(block, scheme)
    return block


def quantize(module: nn.Module, scheme: str) -> None:
    from torchao.quantization import quantize_

    from quant.schemes import torchao_config

    quantize_(module, torchao_config(scheme))


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(one.double(), other.double()) for one, other in pairs)  # fp8 is not compared


@for_each("scheme", SCHEMES)
def test_every_weight_and_back(scheme: str | None) -> None:
    block = make(scheme)
    found = leaves(block)
    assert all(type(leaf) in (torch.Tensor, nn.Parameter) for leaf in found)
    values = iter(found)
    for name, weight in named_weights(block):
        again = unflatten(weight, values)
        assert type(again) in (type(weight), nn.Parameter)
        assert again.dtype == weight.dtype
        x = torch.randn(3, weight.shape[-1])
        if weight.dim() == 2:
            assert torch.equal(nn.functional.linear(x, again), nn.functional.linear(x, weight)), name
    assert next(values, None) is None


def test_kinds_are_told_apart() -> None:
    assert len({hash_block(make(scheme)) for scheme in SCHEMES}) == len(SCHEMES)
    assert hash_block(make()) == hash_block(make())
    assert hash_block(make()) != hash_block(make().bfloat16())


@for_each("scheme", SCHEMES)
def test_reading_walks_no_module(scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(scheme)
    weights, expected = Weights(block), leaves(block)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("walked"))
    assert same(weights.read(), expected)


def _double(block: Block) -> None:
    block.attn1.to_qkv.weight.data = block.attn1.to_qkv.weight * 2


def _replace(block: Block) -> None:
    linear = block.attn1.to_qkv
    linear.weight = nn.Parameter(linear.weight * 2, requires_grad=False)


def _replace_module(block: Block) -> None:
    linear = nn.Linear(block.attn1.to_qkv.in_features, block.attn1.to_qkv.out_features)
    block.attn1.to_qkv = linear.requires_grad_(False)


@for_each("change", [_double, _replace, _replace_module])
def test_changes_are_seen(change: Callable[[Block], None]) -> None:
    block = make()
    weights = Weights(block)
    before = [leaf.clone() for leaf in weights.read()]
    change(block)
    assert same(weights.read(), leaves(block))
    assert not same(weights.read(), before)
    _double(block)  # also where it was replaced
    assert same(weights.read(), leaves(block))


def test_quantized_weights_that_are_moved_or_made_again() -> None:
    block = make("int8-dynamic")
    weights = Weights(block)
    block._apply(lambda tensor: tensor.clone())
    assert same(weights.read(), leaves(block))
    block.load_state_dict(make("int8-dynamic").state_dict(), assign=True)
    assert same(weights.read(), leaves(block))


def test_another_quantization_of_the_same_plain_tensors_is_refused() -> None:
    block, other = make("int8-dynamic"), make("int8-weight-only")
    assert [(leaf.shape, leaf.dtype) for leaf in leaves(block)] == [(leaf.shape, leaf.dtype) for leaf in leaves(other)]
    weights = Weights(block)
    block.attn1.to_qkv.weight = other.attn1.to_qkv.weight
    with pytest.raises(ValueError, match="quantization changed; export a package"):
        weights.read()


def test_what_is_added_is_refused() -> None:
    block = make()
    weights = Weights(block)
    block.ff.register_buffer("another", torch.ones(1))
    with pytest.raises(ValueError, match="names, shapes"):
        weights.read()
