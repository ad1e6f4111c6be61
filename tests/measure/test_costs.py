"""Parameters, tokens and operations are checked against diffusers' model and torch's own counter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogx_fast import sizes
from cogx_fast.config import PRESETS, TransformerConfig
from cogx_fast.measure import costs
from cogx_fast.runtime.module import CogVideoXModel
from tests.cases import for_each
from tests.support import RELEASED, inputs, small

VARIATIONS: dict[str, dict[str, Any]] = {
    "no-attention-bias": {"attention_bias": False},
    "no-patch-bias": {"patch_bias": False},
    "no-affine": {"norm_elementwise_affine": False},
    "geglu": {"activation_fn": "geglu"},
    "swiglu": {"activation_fn": "swiglu"},
}


def _upstream_parameters(config: TransformerConfig) -> tuple[int, int]:
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**config)
    return model.num_parameters(), sum(tensor.numel() for tensor in model.state_dict().values())


@for_each("name", [*RELEASED, "tiny"])
def test_parameters_are_those_of_upstream_at_full_size(name: str) -> None:
    config = PRESETS[name]
    parameters, stored = _upstream_parameters(config)
    assert sum(costs.count_parameters(config).values()) == parameters
    assert costs.count_positions(config) == stored - parameters
    assert costs.memory(config)["bf16/fp16"] == 2 * stored


@for_each("changes", VARIATIONS.values(), "name", ["5b", "1.5-5b-i2v"])
def test_parameters_with_every_option(name: str, changes: dict[str, Any]) -> None:
    config = small(name, **changes)
    assert sum(costs.count_parameters(config).values()) == _upstream_parameters(config)[0]


def test_parts_are_those_of_our_model() -> None:
    config = PRESETS["5b"]
    with torch.device("meta"):
        model = CogVideoXModel(config)

    def of(*names: str) -> int:
        return sum(p.numel() for key, p in model.named_parameters() if any(name in key for name in names))

    qk_norms = of("attn1.norm_q", "attn1.norm_k")
    assert costs.count_parameters(config) == {
        "patch embed": of("patch_embed"),
        "time embedding": of("time_embedding"),
        "modulation": of("modulation", "norm_out.linear"),
        "attention": of("attn1.to_qkv", "attn1.to_out"),
        "feed-forward": of(".ff."),
        "norms": of("norm1.norm", "norm2.norm", "norm_final", "norm_out.norm") + qk_norms,
        "head": of("proj_out"),
    }


def test_the_5b_has_the_published_size() -> None:
    parameters = costs.count_parameters(PRESETS["5b"])
    assert round(sum(parameters.values()) / 1e9, 2) == 5.57
    assert round(parameters["modulation"] / 1e9, 2) == 0.80  # 0.79 in the blocks


@for_each(
    "name, tokens, grid",
    [
        ("2b", 17_776, (13, 30, 45)),
        ("5b", 17_776, (13, 30, 45)),
        ("5b-i2v", 17_776, (13, 30, 45)),
        ("1.5-5b", 45_106, (11, 48, 85)),
        ("1.5-5b-i2v", 45_106, (11, 48, 85)),
        ("tiny", 88, (5, 4, 4)),
    ],
)
def test_tokens_of_the_default_video(name: str, tokens: int, grid: tuple[int, int, int]) -> None:
    config = PRESETS[name]
    counted = sizes.count_tokens(config, sizes.default_video(config))
    assert (counted.joint, counted.grid) == (tokens, grid)


@for_each(
    "batch",
    [1, 2],
    "name, changes",
    [(name, {}) for name in (*RELEASED, "tiny")] + [("5b", changes) for changes in VARIATIONS.values()],
)
def test_flops_are_those_that_torch_counts(name: str, changes: dict[str, Any], batch: int) -> None:
    config = dataclasses.replace(PRESETS["tiny"], **changes) if name == "tiny" else small(name, **changes)
    model = CogVideoXModel(config).eval()
    arguments = inputs(config, batch=batch, frames=4)
    # torch counts the products of its plain attention; the CPU's flash kernel it does not know
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**arguments)
    frames, height, width = arguments["hidden_states"].shape[1], config.sample_height, config.sample_width
    tokens = sizes.Tokens(text=config.max_text_seq_length, grid=config.grid(frames, height, width))
    assert sum(costs.count_flops(config, tokens, batch=batch).values()) == counter.get_total_flops()


@pytest.mark.parametrize(("name", "attention", "linear"), [("2b", 146e12, 94e12), ("5b", 326e12, 338e12)])
def test_flops_of_a_step_with_guidance(name: str, attention: float, linear: float) -> None:
    config = PRESETS[name]
    flops = costs.count_flops(config, sizes.count_tokens(config, sizes.default_video(config)), batch=2)
    assert flops["attention scores"] == pytest.approx(attention, rel=5e-3)
    assert flops["attention"] + flops["feed-forward"] == pytest.approx(linear, rel=5e-3)


def test_quantized_linears_take_about_half() -> None:
    sizes = costs.memory(PRESETS["5b"])
    assert sizes["fp32"] == 2 * sizes["bf16/fp16"]
    assert 0.5 < sizes[costs.QUANTIZED] / sizes["bf16/fp16"] < 0.6


@for_each(
    "name, size, message",
    [
        ("5b", (49, 481, 720), "height is 481, expected a multiple of 16 pixels: use 480 or 496"),
        ("5b", (49, 480, 0), "width is 0, expected a multiple of 16 pixels: use 16"),
        ("5b", (48, 480, 720), "frames is 48, expected 4·k + 1 (k = 0, 1, 2, …): use 45 or 49"),
        ("5b", (0, 480, 720), "frames is 0, expected 4·k + 1 (k = 0, 1, 2, …): use 1"),
        ("5b", (-9, 480, 720), "frames is -9, expected 4·k + 1 (k = 0, 1, 2, …): use 1"),
        (
            "5b-i2v",
            (49, 480, 736),
            "size is 480 × 736, but this model has learned positions: it makes 480 × 720 videos only",
        ),
    ],
)
def test_sizes_that_cannot_be(name: str, size: tuple[int, int, int], message: str) -> None:
    frames, height, width = size
    with pytest.raises(ValueError, match=r"expected|only") as caught:
        sizes.choose_video(PRESETS[name], frames=frames, height=height, width=width)
    assert str(caught.value) == message
