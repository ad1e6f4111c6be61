"""A block written out in plain fp32, rounded where the generated code rounds: the reference that is sharp.

Against fp32 a bf16 block's error is mostly that of bf16, and a quantized one's that of its recipe: a small mistake of
the code hides behind it. Here values are rounded at the same places and quantized by the same rule, so what remains is
the order of sums, and the few values that it puts on the other side of a rounding. One such value in a quantized row
moves all that follow from it, and with them as many roundings as any small mistake would; so each product goes on with
the rows that the code itself quantized, after they were held against the plain ones.

Fused code rounds what it stores, nothing between: a norm's result reaches a quantization in fp32.

Suffixes: B batch, S joint tokens, N heads, K head width, D model width, R rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Round = Callable[[Tensor], Tensor]
_INT8_STEP = 1 / 127.5
"""torchao divides a row's largest value by half of int8's 255 steps, the compiler multiplies. It matters: the largest
value itself comes to 127.5, a half, whose rounding the last bit of the scale decides."""


class Rows:
    """Activations as the generated code quantized them, in order, held against the plain ones.

    Args:
        theirs: of each product with quantized activations, ``(R, D)``.
    """

    def __init__(self, theirs: Iterable[Tensor]) -> None:
        self._theirs = iter(theirs)
        self.distance = 0.0
        """The largest so far between the code's and the plain ones, relative."""

    def replace(self, own: Tensor) -> Tensor:
        """The code's in the place of the plain ones."""
        theirs = next(self._theirs).float().reshape(own.shape)
        self.distance = max(self.distance, float((theirs - own).norm() / own.norm()))
        return theirs


def block(module: Any, dtype: torch.dtype, arguments: tuple[Any, ...], quantized: Rows) -> Tensor:
    """What a block of ``dtype`` computes.

    Args:
        module: the block, quantized or not, with values.
        arguments: as its ``forward`` takes them.
        quantized: what the generated code made of its activations.

    Returns:
        The stream in fp32, holding values of ``dtype``.
    """

    def stored(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def product(linear: Any, x: Tensor) -> Tensor:
        return _product(linear, x, stored, quantized)

    def product_of_norm(linear: Any, normed: Tensor) -> Tensor:
        return product(linear, stored(normed) if _waits(linear) else normed)

    x_BSD, mod_B12D, is_text_S1, rotary, mask = arguments
    x_BSD, mod_B12D = x_BSD.float(), mod_B12D.float()
    attention, first, second = module.attn1, module.ff.net[0].proj, module.ff.net[2]

    shift, scale, gate = _select(mod_B12D[:, :6], is_text_S1)
    normed = _norm(module.norm1.norm, x_BSD) * (1 + scale) + shift
    qkv = stored(product_of_norm(attention.to_qkv, normed)).unflatten(2, (3, attention.num_heads, -1))
    q_BSNK, k_BSNK, v_BSNK = qkv.unbind(2)
    q_BSNK, k_BSNK = (
        stored(_rotate(_norm(norm, x), rotary)) for norm, x in ((attention.norm_q, q_BSNK), (attention.norm_k, k_BSNK))
    )
    attended = stored(_attend(q_BSNK, k_BSNK, v_BSNK, visible(mask, x_BSD.shape[1]), stored))
    x_BSD = x_BSD + gate * stored(product(attention.to_out[0], attended.flatten(2)))

    shift, scale, gate = _select(mod_B12D[:, 6:], is_text_S1)
    normed = _norm(module.norm2.norm, x_BSD) * (1 + scale) + shift
    inner = F.gelu(product_of_norm(first, normed), approximate="tanh")
    out = product(second, inner if _keeps_gelu(second) else stored(inner))
    return stored(stored(x_BSD) + gate * (out if _scales_in_the_product(second) else stored(out)))


def _select(mod_B6D: Tensor, is_text_S1: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of each token: the last three vectors are the text's."""
    return tuple(torch.where(is_text_S1, mod_B6D[:, None, i + 3], mod_B6D[:, None, i]) for i in range(3))


def _norm(norm: Any, x: Tensor) -> Tensor:
    weight, bias = (None if each is None else each.float() for each in (norm.weight, norm.bias))
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _rotate(x_BSNK: Tensor, rotary: Any) -> Tensor:
    if rotary is None:
        return x_BSNK
    cos_S1K, sin_S1K = (table[:, None] for table in rotary)  # the sine of even channels is negated
    swapped = torch.stack([x_BSNK[..., 1::2], x_BSNK[..., 0::2]], dim=-1).flatten(-2)
    return x_BSNK * cos_S1K + swapped * sin_S1K


def _attend(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, seen: Tensor | None, stored: Round) -> Tensor:
    """Probabilities are rounded for the second product while the largest is 1, and divided by their sum after it."""
    scores_BNSS = torch.einsum("bqnk,bsnk->bnqs", q_BSNK, k_BSNK) * q_BSNK.shape[-1] ** -0.5
    if seen is not None:
        scores_BNSS = scores_BNSS.masked_fill(~seen, -torch.inf)
    weights = (scores_BNSS - scores_BNSS.amax(-1, keepdim=True)).exp()
    return torch.einsum("bnqs,bsnk->bqnk", stored(weights), v_BSNK) / weights.sum(-1).transpose(1, 2)[..., None]


def visible(mask: Any, tokens: int) -> Tensor | None:
    """Which queries see which keys, a boolean that broadcasts to (B, N, S, S), of a block mask or a layer's blocks."""
    if mask is None:
        return None
    places = torch.arange(tokens)
    if type(mask).__name__ == "LayerBlocks":
        met = torch.arange(mask.columns_PQQ.shape[2]) < mask.counts_PQ[..., None]
        keep_PQQ = torch.zeros_like(met).scatter(2, mask.columns_PQQ.long(), met)
        blocks = places // mask.block_size
        return keep_PQQ[mask.choice_N][None][:, :, blocks][..., blocks]
    batch = torch.arange(mask.shape[0])[:, None, None, None]
    seen: Tensor = mask.mask_mod(batch, torch.zeros(1, dtype=torch.long), places[:, None], places)
    return seen


# -------------------------------------------------------------------------------------------------------- the products


def _product(linear: Any, x: Tensor, stored: Round, quantized: Rows) -> Tensor:
    weight, bias = linear.weight, linear.bias.float()
    if not hasattr(type(weight), "__tensor_flatten__"):
        return F.linear(stored(x), weight.float(), bias)
    if weight.act_quant_kwargs is None:
        return F.linear(stored(x), stored(weight.qdata.float() * weight.scale.float()), bias)
    if weight.qdata.dtype == torch.int8:
        rows = quantized.replace(_to_int8(x))
        scale = _int8_scale(stored(x.abs().amax(-1, keepdim=True)))  # the largest value passes through memory
        return (rows.double() @ weight.qdata.double().t()).float() * scale * weight.scale.float().flatten() + bias
    rows, scale = _to_fp8(x, of_tensor=weight.scale.numel() == 1)
    rows = quantized.replace(rows)
    return stored((rows @ weight.qdata.float().t()) * scale * weight.scale.float().flatten() + bias)


def _to_int8(x: Tensor) -> Tensor:
    scale = _int8_scale(x.abs().amax(-1, keepdim=True))
    return (x * (1 / scale)).round().clamp(-128, 127)


def _int8_scale(largest: Tensor) -> Tensor:
    return (largest * _INT8_STEP).clamp(min=torch.finfo(torch.float32).eps)


def _to_fp8(x: Tensor, *, of_tensor: bool) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (x.abs().amax() if of_tensor else x.abs().amax(-1, keepdim=True)) / largest
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float(), scale


def _is_dynamic(linear: Any, dtype: torch.dtype) -> bool:
    weight = linear.weight
    return getattr(weight, "act_quant_kwargs", None) is not None and weight.qdata.dtype == dtype


def _waits(linear: Any) -> bool:
    """fp8 with one scale for all: the largest value is known only when a norm has stored its whole result."""
    return _is_dynamic(linear, torch.float8_e4m3fn) and linear.weight.scale.numel() == 1


def _keeps_gelu(second: Any) -> bool:
    """fp8: the GELU is part of the pass that quantizes its result, which is not stored."""
    return _is_dynamic(second, torch.float8_e4m3fn)


def _scales_in_the_product(second: Any) -> bool:
    """int8: the product is Triton's, which scales its sums and adds them to the stream before anything is stored."""
    return _is_dynamic(second, torch.int8)


__all__ = ["Rows", "block", "visible"]
