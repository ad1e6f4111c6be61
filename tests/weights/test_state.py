"""State dicts under diffusers' names, out of a model and into it: whole or told, never half in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cogx_fast
from tests.cases import for_each
from tests.support import RELEASED, small, upstream


def pair(name: str) -> tuple[Any, Any]:
    return upstream(small(name)), cogx_fast.load(upstream(small(name), seed=1))


def assert_equal(model: Any, theirs: Any) -> None:
    ours = model.state_dict(layout="diffusers")
    want = theirs.state_dict()
    assert list(ours) == list(want)
    for key, tensor in want.items():
        assert torch.equal(ours[key], tensor), key


@for_each("name", RELEASED, "options", [{}, {"strict": False}, {"assign": True}])
def test_diffusers_names_load_wholly(name: str, options: dict[str, Any]) -> None:
    theirs, model = pair(name)
    keys = model.load_state_dict(theirs.state_dict(), **options)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert_equal(model, theirs)


def test_the_layout_of_diffusers_is_views_of_the_weights() -> None:
    _, model = pair("5b")
    state = model.state_dict(layout="diffusers", prefix="transformer.")
    state["transformer.transformer_blocks.0.attn1.to_k.weight"].zero_()
    assert model.state_dict(layout="diffusers")["transformer_blocks.0.attn1.to_k.weight"].count_nonzero() == 0
    with pytest.raises(ValueError, match="expected 'diffusers'"):
        model.state_dict(layout="other")


@pytest.mark.parametrize("name", ["5b", "1.5-5b"])
def test_what_is_missing_or_unknown_is_told_as_upstream_does(name: str) -> None:
    theirs, model = pair(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = theirs.state_dict()
    gone = "transformer_blocks.1.attn1.to_k.weight"
    del state[gone]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"extra.weight"(.|\n)*Missing key\(s\)') as raised:
        model.load_state_dict(state)
    assert gone in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "nothing half"
    keys = model.load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([gone], ["extra.weight"])
    loaded = model.state_dict(layout="diffusers")
    kept = pair(name)[1].state_dict(layout="diffusers")[gone]
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(loaded[key], kept if key == gone else tensor), key


def test_mixed_names_and_wrong_shapes_are_told() -> None:
    theirs, model = pair("1.5-5b")
    mixed = theirs.state_dict() | {
        key: tensor for key, tensor in model.state_dict().items() if "to_qkv" in key or "modulation" in key
    }
    with pytest.raises(RuntimeError, match=r"Unexpected key.*modulation\.linear\.weight"):
        model.load_state_dict(mixed)
    assert "modulation.linear.weight" in model.load_state_dict(mixed, strict=False).unexpected_keys
    wrong = theirs.state_dict() | {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer_blocks\.0\.attn1\.to_q\.weight.*\(3, 3\)"):
        model.load_state_dict(wrong, strict=False)


def test_a_few_of_diffusers_tensors_can_be_loaded() -> None:
    theirs, model = pair("2b")
    few = {key: tensor for key, tensor in theirs.state_dict().items() if "patch_embed.proj" in key}
    keys = model.load_state_dict(few, strict=False)
    assert len(keys.missing_keys) == len(theirs.state_dict()) - len(few)
    loaded = model.state_dict(layout="diffusers")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in few.items())


def test_our_own_names_load_as_ever() -> None:
    theirs, model = pair("5b")
    source = cogx_fast.load(theirs)
    model.load_state_dict(source.state_dict())
    assert_equal(model, theirs)


def test_quantized_weights_have_diffusers_names_and_refuse_plain_ones() -> None:
    theirs, _ = pair("5b")
    model = cogx_fast.load(theirs, quant="int8-weight-only")
    state = model.state_dict(layout="diffusers")
    assert list(state) == list(theirs.state_dict())
    name = "transformer_blocks.0.attn1.to_k.weight"
    torch.testing.assert_close(state[name].dequantize(), theirs.state_dict()[name], rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="is quantized"):
        model.load_state_dict(theirs.state_dict())
