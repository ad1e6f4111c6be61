"""What is compiled: transformer blocks of the released models at full size, ours and diffusers'.

A case names a function that builds a module and its arguments, so that another process can do it. The function runs
where tensors are made on the GPU in the case's dtype and, without a GPU, hold no values.

Suffixes: B batch, S joint tokens, T text tokens, D model width, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from cogx_fast.measure.devices import DEVICES, Device

Sdpa = Literal["cudnn", "flash", "efficient"]
MODELS = ("2b", "5b", "1.5-5b")
RECIPES = ("fp8-dynamic", "fp8-dynamic-tensor", "fp8-weight-only", "int8-dynamic", "int8-weight-only")
BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One module to compile with its arguments."""

    name: str
    build: str
    """``package.module:function``, which returns ``(module, arguments)``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``build``, as JSON can hold them."""
    sdpa: Sdpa | None = None
    """The kernel that ``scaled_dot_product_attention`` becomes. torch asks a real device which to take and, with none,
    would take the one without a kernel; so a case that calls it must state it."""
    dtype: str = "bfloat16"
    layers: int = 1
    """How often a step runs the module."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Inductor options besides those of every report."""

    def make(self) -> tuple[Any, tuple[Any, ...]]:
        """Build the module and its arguments."""
        module, _, function = self.build.partition(":")
        build: Callable[..., tuple[Any, tuple[Any, ...]]] = getattr(import_module(module), function)
        return build(**self.arguments)


def _sizes(preset: str, tokens: int | None) -> tuple[Any, int]:
    """The model's configuration, and S of the video it is made for unless given."""
    from cogx_fast import sizes
    from cogx_fast.config import PRESETS

    config = PRESETS[preset]
    return config, tokens or sizes.count_tokens(config, sizes.default_video(config)).joint


def _rotary(config: Any, rows: int) -> Any:
    import torch

    if not config.use_rotary_positional_embeddings:
        return None
    return tuple(torch.empty(rows, config.attention_head_dim, dtype=torch.float32) for _ in range(2))


def our_block(
    preset: str, attention: str, tokens: int | None = None, batch: int = BATCH, recipe: str | None = None
) -> tuple[Any, Any]:
    """Our block, given one layer's rows of the modulation of all layers."""
    import torch

    from cogx_fast.attention.masks import full_block_mask
    from cogx_fast.model.transformer import Block

    config, rows = _sizes(preset, tokens)
    mod_B12D = torch.empty(batch, config.num_layers, 12, config.inner_dim)[:, 1]
    is_text_S1 = torch.empty(rows, 1, dtype=torch.bool)
    mask = full_block_mask("cuda") if attention == "flex" else None
    x_BSD = torch.empty(batch, rows, config.inner_dim)
    block = Block(config, attention).eval()
    if recipe is not None:
        quantize_block(block, config, recipe)
    return block, (x_BSD, mod_B12D, is_text_S1, _rotary(config, rows), mask)


def quantize_block(block: Any, config: Any, recipe: str) -> None:
    """As the recipe says of a model's first block, by torchao's own function: a plan's ``apply`` reads values."""
    import torch
    from torchao.quantization import quantize_

    from cogx_fast.model.transformer import CogVideoXTransformer
    from quant import plan
    from quant.schemes import torchao_config

    def linears(module: Any) -> dict[str, Any]:
        return {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}

    with torch.device("meta"):
        model = CogVideoXTransformer(dataclasses.replace(config, num_layers=1))
    shapes = [(name, tuple(linear.weight.shape)) for name, linear in linears(model).items()]
    planned = plan(shapes, recipe, device="cuda")
    for name, linear in linears(block).items():
        scheme = planned.choices[f"transformer_blocks.0.{name}"].scheme
        if scheme is not None:
            quantize_(linear, torchao_config(scheme), filter_fn=lambda *_: True)


def diffusers_block(preset: str, tokens: int | None = None, batch: int = BATCH) -> tuple[Any, Any]:
    """diffusers' ``CogVideoXBlock``, given text, video and time embedding."""
    import torch
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    config, rows = _sizes(preset, tokens)
    text, dim = config.max_text_seq_length, config.inner_dim
    block = CogVideoXBlock(
        dim, config.num_attention_heads, config.attention_head_dim, config.time_embed_dim,
        attention_bias=config.attention_bias, norm_eps=config.norm_eps,
    )  # fmt: skip
    video_BVD, text_BTD = torch.empty(batch, rows - text, dim), torch.empty(batch, text, dim)
    emb_BE = torch.empty(batch, config.time_embed_dim)
    return block.eval(), (video_BVD, text_BTD, emb_BE, _rotary(config, rows - text))


def sdpa_of(device: Device) -> Sdpa:
    """What torch takes first there in half precision without a mask: cuDNN's kernel on Hopper, else flash attention."""
    return "cudnn" if device.capability[0] == 9 else "flash"


def cases(device: Device) -> dict[str, Case]:
    """Every case by name: model/whose block/attention kernel, and the recipe of a quantized one."""
    sdpa = sdpa_of(device)
    found = [
        _case(model, owner, attention)
        for model in MODELS
        for owner, attention in (("ours", sdpa), ("ours", "flex"), ("diffusers", sdpa))
    ]
    found += [_case(model, "ours", sdpa, recipe) for model in MODELS for recipe in RECIPES if _has(device, recipe)]
    return {case.name: case for case in found}


def _has(device: Device, recipe: str) -> bool:
    return device.fp8 is not None or recipe not in ("fp8-dynamic", "fp8-dynamic-tensor")


INT8_OPTIONS = {
    "max_autotune_gemm": True, "epilogue_fusion_first": True, "test_configs.max_mm_configs": 1,
}  # fmt: skip
"""For int8 products what a compiled model is given (``compiling.compile.INT8_OPTIONS``), with the first
candidate of Triton's products in the place of the one that a device would be fastest with."""


def _case(model: str, owner: str, attention: Any, recipe: str | None = None) -> Case:
    from cogx_fast.config import PRESETS

    arguments = {"preset": model} | (
        {"attention": "flex" if attention == "flex" else "sdpa"} if owner == "ours" else {}
    )
    return Case(
        name="/".join(filter(None, (model, owner, attention, recipe))),
        build=f"{__name__}:{'our' if owner == 'ours' else 'diffusers'}_block",
        arguments=arguments | ({"recipe": recipe} if recipe else {}),
        sdpa=None if attention == "flex" else attention,
        layers=PRESETS[model].num_layers,
        options=INT8_OPTIONS if recipe == "int8-dynamic" else {},
    )


CASES: dict[str, Case] = cases(DEVICES["h100"])
"""The gated cases."""
