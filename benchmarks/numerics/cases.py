"""What is run: parts of small models with the released ones' options, in each dtype, recipe and attention.

A case makes its module and arguments twice, with values on the CPU and as fake tensors of the GPU. So does the gate
(``codegen_case``), which must generate the same code.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens, T text tokens, V video tokens,
E width of the text's embedding, D model width, N heads, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.codegen.cases import INT8_OPTIONS, quantize_block
from benchmarks.codegen.cases import Case as CodegenCase
from cogx_fast.measure.devices import Device
from cogx_fast.model.layers import patchify, unpatchify

Part = Literal["block", "begin", "head"]
Attention = Literal["sdpa", "flex", "masked", "sparse"]


class Size(NamedTuple):
    """One call's."""

    batch: int
    text: int
    grid: tuple[int, int, int]
    """Patches along (time, height, width)."""

    @property
    def tokens(self) -> int:
        """S."""
        return self.text + math.prod(self.grid)

    def __str__(self) -> str:
        return f"B{self.batch} S{self.tokens}"


SIZE = Size(2, 11, (3, 7, 9))
SPARSE = Size(2, 11, (5, 9, 12))
SMALL = Size(1, 5, (1, 3, 5))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One part of a model."""

    name: str
    part: Part = "block"
    preset: str = "5b"
    dtype: str = "bfloat16"
    attention: Attention = "sdpa"
    """Flex-attention with nothing hidden, with some text of each video hidden, or with an attention plan."""
    recipe: str | None = None
    heads: int = 2
    sizes: tuple[Size, ...] = (SIZE,)
    """More than one: symbolic, and called in this order."""
    every_candidate: bool = False
    """Every configuration of every kernel is run, and races are looked for; else the one with the fewest programs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's, besides the gate's."""

    @property
    def is_symbolic(self) -> bool:
        """Whether sizes are symbolic, as the compiled model marks them."""
        return len(self.sizes) > 1

    @property
    def backend(self) -> str:
        """The attention backend."""
        return "sdpa" if self.attention == "sdpa" else "flex"

    @property
    def config(self) -> Any:
        """The model's: the preset's with one layer and few heads."""
        from cogx_fast.config import PRESETS

        preset = PRESETS[self.preset]
        widths = {} if self.part == "block" else {"text_embed_dim": 64, "time_embed_dim": 64}
        if widths and preset.ofs_embed_dim is not None:
            widths["ofs_embed_dim"] = 64
        return dataclasses.replace(preset, num_attention_heads=self.heads, num_layers=1, **widths)

    def sdpa_of(self, device: Device) -> Any:
        """What ``scaled_dot_product_attention`` becomes there; ``None`` where it is not called."""
        from benchmarks.codegen.cases import sdpa_of

        if self.part != "block" or self.attention != "sdpa":
            return None
        return sdpa_of(device) if self.dtype != "float32" else "efficient"

    def codegen_case(self, device: Device) -> CodegenCase:
        """The same module for the gate."""
        return CodegenCase(
            name=self.name, build=f"{__name__}:build", arguments={"name": self.name}, sdpa=self.sdpa_of(device),
            dtype=self.dtype, options=self.options,
        )  # fmt: skip

    def model(self) -> Any:
        """The model, on the default device in the default dtype; not quantized."""
        from cogx_fast.runtime.module import CogVideoXModel

        model = CogVideoXModel(self.config, attention=self.backend).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        if _has_values(model):
            for name, weight in (*model.named_parameters(), *model.named_buffers()):
                noise = torch.randn(weight.shape, generator=generator)
                if weight.ndim > 1:
                    weight.copy_(noise * weight.shape[-1] ** -0.5)
                else:
                    weight.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        return model

    def module(self, model: Any) -> Any:
        """The part of a model; a block is quantized as the recipe says."""
        if self.part == "begin":
            return _Begin(model)
        if self.part == "head":
            return _Head(model)
        block = model.transformer_blocks[0]
        if self.recipe is not None:
            quantize_block(block, self.config, self.recipe)
        return block

    def arguments(self, size: Size) -> tuple[Any, ...]:
        """The part's, with values on the CPU."""
        generator = torch.Generator().manual_seed(2)

        def noise(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator).mul(scale).to(getattr(torch, self.dtype))

        config, width = self.config, self.config.inner_dim
        if self.part == "block":
            x_BSD, mod_B12D = noise(size.batch, size.tokens, width), noise(size.batch, 1, 12, width, scale=0.5)[:, 0]
            is_text_S1 = torch.arange(size.tokens)[:, None] < size.text
            rotary, mask = self._rotary(size), self._mask(size)
            return x_BSD, mod_B12D, is_text_S1, rotary, mask
        latents = noise(size.batch, *_latents(config, size))
        emb_BE = noise(size.batch, config.time_embed_dim)
        if self.part == "head":
            return noise(size.batch, math.prod(size.grid), width), emb_BE, latents
        timestep_B = torch.linspace(1.0, 9.0, size.batch)  # of later ones fp32 itself rounds the angles away
        ofs_B = torch.full((size.batch,), 2.0) if config.ofs_embed_dim is not None else None
        return latents, noise(size.batch, size.text, config.text_embed_dim), timestep_B, ofs_B, self._position(size)

    def _rotary(self, size: Size) -> Any:
        from cogx_fast.model import tables

        if not self.config.use_rotary_positional_embeddings:
            return None
        rotary = tables.join_rotary(*tables.rotary_tables(self.config, size.grid), size.text)
        if self.attention == "sparse":
            rotary, _ = self._plan(size).reorder(rotary, None)
        return rotary

    def _position(self, size: Size) -> Tensor | None:
        """Sin-cos positions, where the model has some."""
        from cogx_fast.model.tables import sincos_table

        if self.config.use_rotary_positional_embeddings:
            return None
        video_VD = sincos_table(self.config, size.grid).to(getattr(torch, self.dtype))
        return nn.functional.pad(video_VD, (0, 0, size.text, 0))[None]

    def _mask(self, size: Size) -> Any:
        from cogx_fast.attention.masks import full_block_mask

        if self.attention == "sdpa":
            return None
        if self.attention == "flex":
            return full_block_mask("cpu")
        return _hidden_text(size) if self.attention == "masked" else self._plan(size).blocks.of_layer(0)

    def _plan(self, size: Size) -> Any:
        from cogx_fast.attention.plan import FULL, AttentionPlan
        from cogx_fast.attention.windows import Pattern

        patterns = (FULL, Pattern(kind="spatial"), Pattern(kind="temporal", space=0.2))
        heads = tuple(1 + head % 2 for head in range(self.heads))
        return AttentionPlan(patterns=patterns, choice=(heads,), tile=(2, 4)).on_grid(size.grid, size.text)


class _Begin(nn.Module):
    """What a step does before the blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, text_BTE: Tensor, timestep_B: Tensor, ofs_B: Any, position: Any) -> Any:
        patches_BVP = patchify(latents, *_patch(self.model.config))
        x_BSD, _, conditioning = self.model.begin(patches_BVP, text_BTE, timestep_B, ofs_B, position)
        return x_BSD, conditioning.mod_BL12D


class _Head(nn.Module):
    """What a step does behind the blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BVD: Tensor, emb_BE: Tensor, latents: Tensor) -> Any:
        patches_BVP = self.model.head(x_BVD, self.model.norm_out.condition(emb_BE))
        return unpatchify(patches_BVP, latents.shape, *_patch(self.model.config))


def _patch(config: Any) -> tuple[int, int]:
    return config.patch_size, config.patch_size_t or 1


def _latents(config: Any, size: Size) -> tuple[int, int, int, int]:
    frames, height, width = size.grid
    p = config.patch_size
    return frames * (config.patch_size_t or 1), config.in_channels, height * p, width * p


def _hidden_text(size: Size) -> Any:
    """Hides the end of each video's text, as a padded prompt's; the text of the first is whole."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept_B = torch.arange(size.text, size.text - size.batch, -1, dtype=torch.int32)
    hidden = hide_text(kept_B, size.text)
    return create_block_mask(hidden, size.batch, None, size.tokens, size.tokens, device="cpu")


def hide_text(kept_B: Tensor, text: int) -> Any:
    """A mask's function: from which tokens on the text is padding, for each video."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < kept_B[batch]) | (key >= text)

    return mask_mod


def without_values(item: Any) -> Any:
    """Arguments as tensors of the GPU that hold none; under a fake mode."""
    if isinstance(item, Tensor):
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="cuda")
    if type(item).__name__ == "BlockMask":
        return _mask_without_values(item)
    if hasattr(item, "_fields"):
        return type(item)(*map(without_values, item))
    return tuple(map(without_values, item)) if isinstance(item, tuple) else item


def _mask_without_values(mask: Any) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    parts = {name: without_values(getattr(mask, name)) for name in (
        "seq_lengths", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks",
        "q_indices", "full_q_num_blocks", "full_q_indices", "BLOCK_SIZE",
    )}  # fmt: skip
    cells = dict(zip(mask.mask_mod.__code__.co_freevars, mask.mask_mod.__closure__ or (), strict=True))
    captured = {name: without_values(cell.cell_contents) for name, cell in cells.items()}
    return BlockMask(**parts, mask_mod=hide_text(**captured) if captured else mask.mask_mod)


def _has_values(module: nn.Module) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not any(isinstance(parameter.data, FakeTensor) for parameter in module.parameters())


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A case's module and arguments as the gate wants them: on its device, without values."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    case = CASES[name]
    with unset_fake_temporarily(), torch.device("cpu"):
        arguments = case.arguments(case.sizes[0])
    return case.module(case.model()), without_values(arguments)


# ---------------------------------------------------------------------------------------------------------- the cases


def _twins(name: str, **options: Any) -> list[Case]:
    """In bf16 and in fp32."""
    return [Case(name=f"{name}/bf16", **options), Case(name=f"{name}/fp32", dtype="float32", **options)]


def _cases() -> list[Case]:
    symbolic = (SIZE, SMALL, Size(3, 20, (4, 6, 8)))
    sparse = (SPARSE, Size(1, 7, (4, 8, 10)), Size(3, 20, (7, 9, 9)))
    wide: dict[str, Any] = {"heads": 48, "sizes": (Size(2, 5, (2, 4, 6)),)}
    tiny: dict[str, Any] = {"heads": 1, "sizes": (SMALL,), "every_candidate": True}
    int8: dict[str, Any] = {"recipe": "int8-dynamic", "options": INT8_OPTIONS}
    fp8: dict[str, Any] = {"recipe": "fp8-dynamic", "heads": 3}
    found = [
        *_twins("5b/block"), *_twins("2b/block", preset="2b"), *_twins("1.5-5b/block", preset="1.5-5b"),
        *_twins("5b/flex", attention="flex"), *_twins("5b/masked", attention="masked"),
        *_twins("5b/sparse", attention="sparse", sizes=(SPARSE,)),
        *_twins("5b/int8-dynamic", **int8), *_twins("5b/int8-weight-only", recipe="int8-weight-only"),
        *_twins("5b/fp8-weight-only", recipe="fp8-weight-only"),
        Case(name="5b/fp8-dynamic/bf16", **fp8),
        Case(name="5b/fp8-dynamic-tensor/bf16", **fp8 | {"recipe": "fp8-dynamic-tensor"}),
        *_twins("odd/flex", attention="flex", heads=3, sizes=(Size(3, 2, (1, 5, 53)),)),
        *_twins("one/block", heads=3, sizes=(Size(1, 1, (1, 3, 5)),)),
    ]  # fmt: skip
    for preset in ("2b", "5b", "1.5-5b", "1.5-5b-i2v"):
        for part in ("begin", "head"):
            found += _twins(f"{preset}/{part}", preset=preset, part=part)
    found += [
        *_twins("symbolic/block", sizes=symbolic), *_twins("symbolic/sparse", attention="sparse", sizes=sparse),
        Case(name="symbolic/int8-dynamic/bf16", sizes=symbolic, **int8),
        Case(name="symbolic/fp8-dynamic/bf16", sizes=symbolic, **fp8),
        *_twins("wide/block", **wide), *_twins("wide/flex", attention="flex", **wide),
        Case(name="wide/fp8-dynamic/bf16", **fp8 | wide),  # int8's products, in the interpreter, take minutes
        Case(name="candidates/block/fp32", dtype="float32", attention="flex", **tiny),
        Case(name="candidates/int8-dynamic/bf16", **int8 | tiny),
    ]  # fmt: skip
    return found


CASES: dict[str, Case] = {case.name: case for case in _cases()}
"""By name."""

SHORT = (
    "5b/block/bf16", "5b/block/fp32", "5b/sparse/fp32", "5b/masked/fp32", "5b/int8-dynamic/bf16", "5b/fp8-dynamic/bf16",
    "2b/begin/fp32", "5b/head/bf16", "symbolic/block/bf16",
)  # fmt: skip
"""What the tests run: about a minute of one core."""

__all__ = ["CASES", "SHORT", "Case", "Size", "build", "hide_text", "without_values"]
