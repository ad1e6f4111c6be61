"""Gradients of all parameters and inputs are upstream's, in fp32; also with checkpointing, dropout and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from cogx_fast.weights.layout import slots
from tests.cases import for_each
from tests.model.pairs import TOLERANCE, Pair, call, new_pair, pair
from tests.support import RELEASED, relative_error, small

Gradients = dict[str, Tensor]


def gradients(
    model: Any, arguments: dict[str, Any], *, of_tables: bool = False, autocast: torch.dtype | None = None
) -> Gradients:
    """Gradients by the model's names of parameters and as "inputs.…", of a loss that weighs outputs differently."""
    model.zero_grad(set_to_none=True)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[f"inputs.{name}"] = tensor.detach().clone().requires_grad_()
        return leaves[f"inputs.{name}"]

    arguments = dict(arguments)
    for name in ("hidden_states", "encoder_hidden_states"):
        arguments[name] = leaf(name, arguments[name])
    if of_tables:
        cos, sin = arguments["image_rotary_emb"]
        arguments["image_rotary_emb"] = (leaf("cos", cos), leaf("sin", sin))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        sample = model(**arguments).sample
    weights = torch.randn(sample.shape, generator=torch.Generator().manual_seed(9))
    (sample.float() * weights).sum().backward()
    leaves |= dict(model.named_parameters())
    assert all(tensor.grad is not None for tensor in leaves.values())
    return {name: tensor.grad.clone() for name, tensor in leaves.items() if tensor.grad is not None}


def by_upstreams_names(both: Pair, ours: Gradients) -> Gradients:
    """Ours, parameter by parameter as upstream has them."""
    layout = slots(both.config)
    named = {name: slot.view(ours[slot.our_name]) for name, slot in layout.items() if slot.our_name in ours}
    return named | {name: gradient for name, gradient in ours.items() if name.startswith("inputs.")}


def assert_equal(ours: Gradients, theirs: Gradients, *, rotated: bool) -> None:
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, expected in theirs.items():
        scale = expected
        if name.endswith("norm_k.bias") and not rotated:
            # The same vector added to every key changes no softmax: this gradient is 0 but for rounding.
            scale = theirs[name.replace("norm_k", "norm_q")]
            assert expected.norm() < 1e-4 * scale.norm()
        assert expected.norm() > 0 or scale is not expected, name
        errors[name] = ((ours[name] - expected).double().norm() / scale.double().norm()).item()
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def compare(both: Pair, arguments: dict[str, Any], *, of_tables: bool = False) -> None:
    theirs = gradients(both.theirs, arguments, of_tables=of_tables)
    ours = by_upstreams_names(both, gradients(both.ours, arguments, of_tables=of_tables))
    assert_equal(ours, theirs, rotated=arguments["image_rotary_emb"] is not None)


ODD: dict[str, Any] = {"text_len": 3, "frames": 2}
SIZES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"batch": batch}) for name in RELEASED for batch in (1, 2)),
    ("5b", {"height": 7, "width": 11} | ODD), ("1.5-5b", {"height": 6, "width": 10} | ODD),
]  # fmt: skip
PLAIN = {"attention_bias": False, "patch_bias": False, "norm_elementwise_affine": False}
GATED = [{"activation_fn": name} for name in ("gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu")]


@for_each("name, sizes", SIZES)
def test_gradients_of_all_parameters_and_inputs(name: str, sizes: dict[str, Any]) -> None:
    compare(pair(name), call(pair(name).config, **sizes))


@for_each("name, options", [*(("5b", options) for options in GATED), ("2b", PLAIN)])
def test_gradients_of_every_feed_forward_and_without_biases_and_norm_weights(name: str, options: Any) -> None:
    both = pair(name, **options)
    compare(both, call(both.config, batch=1))


@pytest.mark.parametrize("rotation", [True, False])
def test_gradients_of_given_tables(rotation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream rotates in place and so cannot differentiate its tables: here it rotates a copy."""
    from diffusers.models import embeddings

    in_place = embeddings.apply_rotary_emb
    monkeypatch.setattr(embeddings, "apply_rotary_emb", lambda x, tables: in_place(x.clone(), tables))
    both = pair("5b")
    arguments = call(both.config)
    if not rotation:
        generator = torch.Generator().manual_seed(3)
        tables = tuple(torch.randn(t.shape, generator=generator) for t in arguments["image_rotary_emb"])
        arguments |= {"image_rotary_emb": tables}
    compare(both, arguments, of_tables=True)


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_checkpointing_gives_the_same_gradients_and_runs_blocks_twice(name: str) -> None:
    both = pair(name)
    arguments, ours = call(both.config), copy.deepcopy(both.ours)
    plain = gradients(ours, arguments)
    runs = []
    for block in ours.transformer_blocks:
        block.ff.register_forward_hook(lambda *_: runs.append(1))
    ours.enable_gradient_checkpointing()
    checkpointed = gradients(ours, arguments)
    assert len(runs) == 2 * both.config.num_layers
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    with torch.no_grad():  # nothing to keep, nothing to run twice
        ours(**arguments)
    assert len(runs) == 3 * both.config.num_layers
    ours.disable_gradient_checkpointing()
    gradients(ours, arguments)
    assert len(runs) == 4 * both.config.num_layers


@for_each("checkpointing", [False, True], "name", RELEASED)
def test_dropout_in_training_drops_what_upstream_drops_from_the_same_seed(name: str, checkpointing: bool) -> None:
    both = new_pair(small(name, dropout=0.3))
    arguments = call(both.config)
    found = []
    for model in (both.theirs, both.ours):
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(5)
        sample = model(**arguments).sample
        torch.manual_seed(5)
        found.append((sample, gradients(model, arguments)))
        torch.manual_seed(6)
        assert relative_error(model(**arguments).sample, sample) > 0.01
    (theirs, their_gradients), (ours, our_gradients) = found
    assert relative_error(ours, theirs) <= TOLERANCE
    assert_equal(by_upstreams_names(both, our_gradients), their_gradients, rotated=name != "2b")
    both.theirs.eval(), both.ours.eval()
    assert both.error(arguments) <= TOLERANCE


@for_each("name", RELEASED)
def test_under_autocast_gradients_are_as_near_to_fp32_as_upstreams(name: str) -> None:
    both = pair(name)
    arguments = call(both.config)
    exact = gradients(both.theirs, arguments)
    theirs = gradients(both.theirs, arguments, autocast=torch.bfloat16)
    ours = by_upstreams_names(both, gradients(both.ours, arguments, autocast=torch.bfloat16))

    def distance(found: Gradients) -> float:
        errors = [relative_error(found[k], exact[k]) for k in exact if name != "2b" or not k.endswith("norm_k.bias")]
        return sum(errors) / len(errors)

    assert distance(ours) <= 1.05 * distance(theirs)


@for_each("name", RELEASED)
def test_training_after_inference_mode_on_the_same_size(name: str) -> None:
    """Tables that were made in inference mode and held could not take part in a backward pass."""
    both = new_pair(small(name))
    arguments = call(both.config) | {"image_rotary_emb": None}
    with torch.inference_mode():
        both.ours(**arguments)
    both.ours(**arguments).sample.sum().backward()
