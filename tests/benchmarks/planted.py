"""Blocks with one thing made worse each, and modules that a report must refuse; the compiling process builds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.codegen.cases import our_block
from cogx_fast.config import PRESETS

TOKENS = 384


def block(attention: str = "sdpa") -> Any:
    return our_block("tiny", attention, tokens=TOKENS)


class _Defused(nn.Module):
    """Attention whose queries and keys are normed by one kernel and turned by another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BSD: Tensor, rotary: Any, mask: Any) -> Tensor:
        q_BSNK, k_BSNK, v_BSNK = self.inner.to_qkv(x_BSD).unflatten(2, (3, self.inner.num_heads, -1)).unbind(2)
        q_BNSK = self._prepare(q_BSNK, self.inner.norm_q, rotary).transpose(1, 2)
        k_BNSK = self._prepare(k_BSNK, self.inner.norm_k, rotary).transpose(1, 2)
        out_BNSK = F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BSNK.transpose(1, 2))
        return self.inner.to_out[0](out_BNSK.transpose(1, 2).flatten(2))

    def _prepare(self, x_BSNK: Tensor, norm: nn.LayerNorm, rotary: Any) -> Tensor:
        cos_S1K, sin_S1K = (table.unsqueeze(1) for table in rotary)
        x_BSNK = F.layer_norm(x_BSNK, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        swapped_BSNK = x_BSNK.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (x_BSNK * cos_S1K + swapped_BSNK * sin_S1K).to(x_BSNK.dtype)


def defused() -> Any:
    made, arguments = block()
    made.attn1 = _Defused(made.attn1)
    return made, arguments


class _Copy(nn.Module):
    """A linear that first copies its input, as a layout that does not fit makes one do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x_RD: Tensor) -> Tensor:
        turned_DR = x_RD.t().clone(memory_format=torch.contiguous_format)
        return self.linear(turned_DR.t().contiguous())


def copied() -> Any:
    made, arguments = block()
    made.attn1.to_out[0] = _Copy(made.attn1.to_out[0])
    return made, arguments


class _Upcast(nn.Module):
    """A feed-forward whose inner activation is left in fp32."""

    def __init__(self, ff: nn.Module) -> None:
        super().__init__()
        self.first, self.second = ff.net[0].proj, ff.net[2]

    def forward(self, x_BSD: Tensor) -> Tensor:
        inner = F.gelu(self.first(x_BSD).float(), approximate="tanh")
        return F.linear(inner, self.second.weight.float()).to(x_BSD.dtype) + self.second.bias


def upcast() -> Any:
    made, arguments = block()
    made.ff = _Upcast(made.ff)
    return made, arguments


def quantized(recipe: str, tokens: int) -> Any:
    return our_block("tiny", "sdpa", tokens=tokens, recipe=recipe)


class _Unflattened(nn.Linear):
    """A linear that is given (B, S, D) and not rows."""

    def forward(self, x_RD: Tensor) -> Tensor:
        x_BSD = x_RD.unflatten(0, (2, -1))
        return F.linear(x_BSD, self.weight, self.bias).flatten(0, 1)


def unflattened(recipe: str, tokens: int) -> Any:
    made, arguments = quantized(recipe, tokens)
    for module in made.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Unflattened
    return made, arguments


class _Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


def graph_break() -> Any:
    return _Break(), (torch.empty(64, 64),)


class _Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend(masked: bool = False) -> Any:
    q = torch.empty(1, 2, 256, 64)
    mask = torch.empty(256, 256, dtype=torch.bool)
    return _Attend(), (q, torch.empty_like(q), torch.empty_like(q), *([mask] if masked else []))


class _Known(nn.Module):
    """Every kind of access whose bytes are known by hand."""

    def forward(self, x_SD: Tensor, weight_DD: Tensor, scale_D: Tensor) -> tuple[Tensor, Tensor]:
        width = x_SD.shape[1] // 3
        part = x_SD[:, width : 2 * width]
        pairs = part.unflatten(1, (-1, 2)).flip(2).flatten(1)
        return part * scale_D + pairs, x_SD[:, :width] @ weight_DD


def known(rows: int, width: int) -> Any:
    return _Known(), (torch.empty(rows, 3 * width), torch.empty(width, width), torch.empty(width))


def packaged(recipe: str | None = None, tokens: int = TOKENS) -> Any:
    """The block as a package compiles it: exported, its weights inputs."""
    from cogx_fast.runtime.packages.export import export_block
    from cogx_fast.runtime.packages.package import SizeRange
    from cogx_fast.runtime.tensors import leaves

    made, (x_BSD, mod_B12D, is_text_S1, rotary, _) = our_block("tiny", "sdpa", tokens=tokens, recipe=recipe)
    model: Any = SimpleNamespace(
        config=PRESETS["tiny"], device=x_BSD.device, dtype=x_BSD.dtype, attention_backends={"sdpa": None}
    )
    program = export_block(model, made, SizeRange(tokens=(2, tokens)))
    weights = [leaf.detach() for leaf in leaves(made)]
    return program.module(), (weights, x_BSD, mod_B12D.contiguous(), is_text_S1, rotary)
