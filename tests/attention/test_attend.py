"""Attention backends against a plain softmax in float64; the norm and rotation before it; masks and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.overrides import TorchFunctionMode

from cogx_fast.attention.attend import RotaryNorm, attend
from cogx_fast.attention.masks import full_block_mask
from cogx_fast.model.tables import join_rotary
from tests.cases import for_each
from tests.model.pairs import TOLERANCE, call, copy_of, pair
from tests.support import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

Triple = tuple[Tensor, Tensor, Tensor]


def qkv(
    tokens: int = 37, *, batch: int = 2, heads: int = 3, width: int = 64, dtype: torch.dtype = torch.float32
) -> Triple:
    """Queries, keys and values as slices of one product, as the model hands them over."""
    product = torch.randn(batch, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0))
    q, k, v = (1.5 * product).to(dtype).unbind(2)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q · kᵀ / √K) · v, in float64."""
    scores = torch.einsum("bsnk,btnk->bnst", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.einsum("bnst,btnk->bsnk", scores.softmax(-1), v.double())


ON_CPU = ["sdpa", "flex", "sdpa-math"]


@for_each("tokens", [1, 2, 37, 128, 200], "backend", ON_CPU)
def test_backend_is_softmax_attention(backend: str, tokens: int) -> None:
    q, k, v = qkv(tokens)
    out = attend(q, k, v, backend=backend)
    assert out.shape == q.shape
    assert relative_error(out, plain(q, k, v)) <= TOLERANCE


@for_each("dtype", [torch.bfloat16, torch.float16], "backend", ON_CPU)
def test_backend_keeps_the_dtype_and_rounds_little(backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(200, dtype=dtype)
    out = attend(q, k, v, backend=backend)
    assert out.dtype == dtype
    assert relative_error(out, plain(q, k, v)) <= 2 * torch.finfo(dtype).eps


@for_each("boolean", [True, False], "shape", [(2, 1, 1, 37), (2, 1, 37, 37), (2, 3, 37, 37), (1, 1, 1, 37)])
def test_sdpa_takes_masks_that_broadcast(shape: tuple[int, ...], boolean: bool) -> None:
    q, k, v = qkv()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = noise > -0.5 if boolean else noise
    assert relative_error(attend(q, k, v, backend="sdpa", mask=mask), plain(q, k, v, mask)) <= TOLERANCE


def test_flex_takes_a_block_mask() -> None:
    q, k, v = qkv(200)
    allowed = (torch.arange(200)[:, None] - torch.arange(200)[None]).abs() < 50
    mask = create_block_mask(lambda b, h, i, j: (i - j).abs() < 50, None, None, 200, 200, device="cpu")
    assert relative_error(attend(q, k, v, backend="flex", mask=mask), plain(q, k, v, allowed[None, None])) <= TOLERANCE


@for_each("tokens", [1, 37, 128, 300])
def test_full_block_mask_hides_nothing_for_any_number_of_tokens(tokens: int) -> None:
    mask = full_block_mask("cpu")
    q, k, v = qkv(tokens)
    assert isinstance(mask, BlockMask)
    assert relative_error(attend(q, k, v, backend="flex", mask=mask), plain(q, k, v)) <= TOLERANCE


def test_compiled_flex_with_the_full_mask_is_softmax_attention() -> None:
    q, k, v = qkv(150, width=32)
    compiled = torch.compile(lambda q, k, v, mask: attend(q, k, v, backend="flex", mask=mask), fullgraph=True)
    mask = full_block_mask("cpu")
    assert relative_error(compiled(q, k, v, mask), plain(q, k, v)) <= TOLERANCE


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_model_with_flex_is_the_model_with_sdpa(name: str) -> None:
    both = pair(name)
    flex = copy_of(both.theirs, both.config, attention="flex")
    arguments = call(both.config)
    with torch.no_grad():
        assert relative_error(flex(**arguments).sample, both.ours(**arguments).sample) <= TOLERANCE
        with pytest.raises(ValueError, match="'flex' takes BlockMask, got a Tensor"):
            flex(**arguments, attention_kwargs={"attention_mask": torch.ones(2, 128)})


@for_each(
    "backend, mask, message",
    [
        ("sdpa", full_block_mask("cpu"), "'sdpa' takes Tensor, got a BlockMask: choose another"),
        ("flex", torch.ones(1, 1, 1, 37), "'flex' takes BlockMask, got a Tensor: choose another"),
        ("sdpa-flash", torch.ones(1, 1, 1, 37), "'sdpa-flash' takes no mask, got a Tensor: choose another"),
        ("flash", None, "'flash' is not known: choose one of sdpa, flex"),
        ("SDPA", None, "'SDPA' is not known"),
    ],
)
def test_wrong_backend_or_mask_is_named(backend: str, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(*qkv(), backend=backend, mask=mask)


# -- norm and rotation ------------------------------------------------------------------------------------------------

Tables = tuple[Tensor, Tensor]
TEXT_LEN = 5


FORMULAS = ("eager", "compiled")


def by(formula: str, norm: RotaryNorm) -> Callable[..., Tensor]:
    """One of the norm's two formulas: that of eager runs, or the one for the compiler, run as it is written."""
    if formula == "eager":
        return norm
    torch.compiler.reset()  # which else has seen too many norms
    return torch.compile(norm, backend="eager", fullgraph=True)


def norm_and_tables(tokens: int = 37) -> tuple[RotaryNorm, Tables]:
    generator = torch.Generator().manual_seed(2)
    norm = RotaryNorm(64, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=generator))
        norm.bias.copy_(torch.randn(64, generator=generator))
    cos, sin = torch.randn(2, tokens - TEXT_LEN, 64, generator=generator)
    return norm, (cos, sin)


def upstreams(x: Tensor, norm: nn.LayerNorm, tables: Tables) -> Tensor:
    """Norm in x's dtype, then upstream's rotation of the video tokens, whose fp32 is float64 for float64 tables."""
    from diffusers.models.embeddings import apply_rotary_emb

    normed = F.layer_norm(x, (64,), norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).transpose(1, 2)
    text, video = normed[:, :, :TEXT_LEN], normed[:, :, TEXT_LEN:]
    return torch.cat([text, apply_rotary_emb(video, tables)], dim=2).transpose(1, 2)


def exactly(x: Tensor, norm: nn.LayerNorm, tables: Tables) -> Tensor:
    """The same in float64."""
    weight, bias, x = norm.weight.double(), norm.bias.double(), x.double()
    normed = F.layer_norm(x, (64,), weight, bias, norm.eps)
    swapped = torch.stack([-normed[..., 1::2], normed[..., 0::2]], dim=-1).flatten(-2)
    cos, sin = (table.double()[:, None] for table in tables)
    turned = normed[:, TEXT_LEN:] * cos + swapped[:, TEXT_LEN:] * sin
    return torch.cat([normed[:, :TEXT_LEN], turned], dim=1)


@for_each("formula", FORMULAS)
def test_norm_and_rotation_are_upstreams_in_fp32(formula: str) -> None:
    norm, tables = norm_and_tables()
    x = qkv()[1]
    ours = by(formula, norm)(x, join_rotary(*tables, text_len=TEXT_LEN))
    assert relative_error(ours, upstreams(x, norm, tables)) <= 1e-6
    assert relative_error(ours, exactly(x, norm, tables)) <= 1e-6
    assert torch.equal(by(formula, norm)(x, None), F.layer_norm(x, (64,), norm.weight, norm.bias, norm.eps))


@for_each("dtype", [torch.bfloat16, torch.float16], "formula", FORMULAS)
def test_norm_and_rotation_round_once(dtype: torch.dtype, formula: str) -> None:
    """Nearer to the exact result than upstream, which rounds between norm and rotation."""
    norm, tables = norm_and_tables()
    norm.to(dtype)
    x = qkv(dtype=dtype)[1]
    exact = exactly(x, norm, tables)
    ours = by(formula, norm)(x, join_rotary(*tables, text_len=TEXT_LEN))
    assert ours.dtype == dtype
    assert relative_error(ours, exact) < 0.9 * relative_error(upstreams(x, norm, tables), exact)
    assert relative_error(ours, exact.to(dtype)) < 0.2 * torch.finfo(dtype).eps


@for_each("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_formulas_of_norm_and_rotation_are_one(dtype: torch.dtype) -> None:
    norm, tables = norm_and_tables()
    norm.to(dtype)
    x, rotary, outs = qkv(dtype=dtype)[1], join_rotary(*tables, text_len=TEXT_LEN), []
    for formula in FORMULAS:
        run = by(formula, norm)
        with torch.no_grad():
            plain = run(x, rotary)
        leaf = x.clone().requires_grad_()
        out = run(leaf, rotary)
        grads = torch.autograd.grad(out.float().square().sum(), [leaf, norm.weight, norm.bias])
        outs.append((plain, out.detach(), grads))
    (plain, eager, eager_grads), (compiled, _, compiled_grads) = outs
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 8
    assert relative_error(plain, compiled) <= tolerance
    rounded = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # eager, for a derivative: after the norm, too
    assert relative_error(eager, compiled) <= rounded
    for ours, reference in zip(eager_grads, compiled_grads, strict=True):
        # torch's own derivative of a norm in half precision, which diffusers' has too, sums a weight's gradient in it
        assert relative_error(ours, reference) <= max(4 * rounded, TOLERANCE)


class Given(TorchFunctionMode):
    """What SDPA is given."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.tensors = args[:3]
        return function(*args, **(kwargs or {}))


def test_sdpa_gets_keys_and_values_with_each_heads_rows_together_in_eager_runs_on_the_cpu() -> None:
    """Its kernel takes a tenth longer otherwise; the output lies as the queries do. Elsewhere nothing is copied."""
    for device in ("cpu", "meta"):
        with Given() as given:
            attend(*torch.empty(2, 37, 3, 3, 64, device=device).unbind(2), backend="sdpa")
        assert [tuple(tensor.shape) for tensor in given.tensors] == 3 * [(2, 3, 37, 64)]
        assert [tensor.is_contiguous() for tensor in given.tensors] == [False, *2 * [device == "cpu"]]

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        (node,) = graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        seen.extend(each.meta["example_value"] for each in node.args[:3])
        return graph.forward

    seen: list[Tensor] = []
    run = torch.compile(lambda qkv: attend(*qkv.unbind(2), backend="sdpa"), backend=look, fullgraph=True)
    run(torch.empty(2, 37, 3, 3, 64))
    assert [(tuple(tensor.shape), tensor.is_contiguous()) for tensor in seen] == 3 * [((2, 3, 37, 64), False)]


@for_each("offset", [0.0, 30.0, 1000.0], "formula", FORMULAS)
def test_norm_is_stable_for_rows_far_from_zero(offset: float, formula: str) -> None:
    norm, tables = norm_and_tables()
    x = qkv()[1] + offset
    exact = exactly(x, norm, tables)
    ours = relative_error(by(formula, norm)(x, join_rotary(*tables, text_len=TEXT_LEN)), exact)
    assert ours <= max(1e-6, 1.05 * relative_error(upstreams(x, norm, tables), exact))
