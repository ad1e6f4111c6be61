"""diffusers' tensor names and shapes and ours, both ways, as data.

The two differ in three places; everywhere else names and shapes are the same:

- ``attn1.to_q``, ``to_k``, ``to_v`` of a block are rows of our ``attn1.to_qkv``;
- ``norm1.linear`` and ``norm2.linear`` of every block are rows of our ``modulation.linear``, block after block;
- ``patch_embed.proj.weight`` of CogVideoX 1.0 is a convolution's; ours is the same numbers as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.sizes import own_grid

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one of diffusers' tensors lives in our model."""

    name: str
    """diffusers' name."""
    our_name: str
    """Name of our tensor that holds it."""
    shape: Shape
    """diffusers' shape."""
    first_row: int | None = None
    """First row in our tensor, or None where it is the whole of it."""

    def view(self, ours: Tensor) -> Tensor:
        """The part of our tensor that is this one, in diffusers' shape, without a copy."""
        rows = ours if self.first_row is None else ours[self.first_row : self.first_row + self.shape[0]]
        return rows.view(self.shape)

    @property
    def numel(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)


def slots(config: TransformerConfig) -> dict[str, Slot]:
    """A slot for every tensor of diffusers' model of that configuration, by diffusers' name and in its order."""
    return {slot.name: slot for slot in _all_slots(config)}


def by_our_name(all_slots: dict[str, Slot]) -> dict[str, list[Slot]]:
    """Slots in groups that make up one tensor of ours, in the order of their rows."""
    groups: dict[str, list[Slot]] = {}
    for slot in all_slots.values():
        groups.setdefault(slot.our_name, []).append(slot)
    return {name: sorted(group, key=lambda slot: slot.first_row or 0) for name, group in groups.items()}


def our_shape(config: TransformerConfig, group: list[Slot]) -> Shape:
    """Shape of the tensor of ours that a group of ``by_our_name`` makes up."""
    first = group[0]
    if first.first_row is not None:
        return (sum(slot.shape[0] for slot in group), *first.shape[1:])
    if first.name == "patch_embed.proj.weight":
        return (config.inner_dim, first.numel // config.inner_dim)
    return first.shape


def _all_slots(config: TransformerConfig) -> Iterator[Slot]:
    dim, emb = config.inner_dim, config.time_embed_dim
    yield from _patch_embed(config)
    yield from _linear("time_embedding.linear_1", emb, dim)
    yield from _linear("time_embedding.linear_2", emb, emb)
    if config.ofs_embed_dim is not None:
        yield from _linear("ofs_embedding.linear_1", config.ofs_embed_dim, config.ofs_embed_dim)
        yield from _linear("ofs_embedding.linear_2", config.ofs_embed_dim, config.ofs_embed_dim)
    for index in range(config.num_layers):
        yield from _block(config, index)
    yield from _norm("norm_final", dim, config.norm_elementwise_affine)
    yield from _linear("norm_out.linear", 2 * dim, emb)
    yield from _norm("norm_out.norm", dim, config.norm_elementwise_affine)
    yield from _linear("proj_out", config.out_channels * config.patch_size**2 * (config.patch_size_t or 1), dim)


def _patch_embed(config: TransformerConfig) -> Iterator[Slot]:
    dim, p, p_t = config.inner_dim, config.patch_size, config.patch_size_t
    if config.use_learned_positional_embeddings:
        tokens = config.max_text_seq_length + math.prod(own_grid(config))
        yield _same("patch_embed.pos_embedding", (1, tokens, dim))
    values = (config.in_channels, p, p) if p_t is None else (config.in_channels * p_t * p * p,)
    yield _same("patch_embed.proj.weight", (dim, *values))
    if config.patch_bias or p_t is not None:
        yield _same("patch_embed.proj.bias", (dim,))
    yield from _linear("patch_embed.text_proj", dim, config.text_embed_dim)


def _block(config: TransformerConfig, index: int) -> Iterator[Slot]:
    dim, head_dim, block = config.inner_dim, config.attention_head_dim, f"transformer_blocks.{index}"
    qkv = f"{block}.attn1.to_qkv"
    gated = config.activation_fn in ("geglu", "swiglu")

    def modulation(norm: int) -> Iterator[Slot]:
        first_row = (12 * index + 6 * (norm - 1)) * dim
        yield from _rows(f"{block}.norm{norm}.linear", "modulation.linear", first_row, 6 * dim, config.time_embed_dim)

    yield from modulation(1)
    yield from _norm(f"{block}.norm1.norm", dim, config.norm_elementwise_affine)
    yield from _norm(f"{block}.attn1.norm_q", head_dim, True)
    yield from _norm(f"{block}.attn1.norm_k", head_dim, True)
    for row, name in enumerate(("to_q", "to_k", "to_v")):
        yield from _rows(f"{block}.attn1.{name}", qkv, row * dim, dim, dim, bias=config.attention_bias)
    yield from _linear(f"{block}.attn1.to_out.0", dim, dim)
    yield from modulation(2)
    yield from _norm(f"{block}.norm2.norm", dim, config.norm_elementwise_affine)
    yield from _linear(f"{block}.ff.net.0.proj", (8 if gated else 4) * dim, dim)
    yield from _linear(f"{block}.ff.net.2", dim, 4 * dim)


def _same(name: str, shape: Shape) -> Slot:
    return Slot(name=name, our_name=name, shape=shape)


def _linear(name: str, rows: int, columns: int) -> Iterator[Slot]:
    yield _same(f"{name}.weight", (rows, columns))
    yield _same(f"{name}.bias", (rows,))


def _norm(name: str, dim: int, affine: bool) -> Iterator[Slot]:
    if affine:
        yield _same(f"{name}.weight", (dim,))
        yield _same(f"{name}.bias", (dim,))


def _rows(name: str, our_name: str, first_row: int, rows: int, columns: int, *, bias: bool = True) -> Iterator[Slot]:
    """A linear that is some rows of a larger one of ours."""
    shapes: dict[str, Shape] = {"weight": (rows, columns)} | ({"bias": (rows,)} if bias else {})
    for part, shape in shapes.items():
        yield Slot(name=f"{name}.{part}", our_name=f"{our_name}.{part}", shape=shape, first_row=first_row)


__all__ = ["Slot", "by_our_name", "our_shape", "slots"]
