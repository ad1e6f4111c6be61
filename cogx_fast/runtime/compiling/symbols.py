"""Which sizes torch takes as symbols when it compiles: marked on a call's tensors, just before it does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cogx_fast.attention.attend import Mask, Rotary
from cogx_fast.attention.exchange import Exchange
from cogx_fast.attention.masks import LayerBlocks, SparseBlocks
from cogx_fast.model.transformer import CogVideoXTransformer, Conditioning
from cogx_fast.runtime.runner import Inputs

_BATCH_HINT = 2
"""The batch that kernels are tuned for where the graph holds for every batch; guidance doubles a batch of one."""
_FLEX = ("flex", "flex-flash")


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """How sizes are marked.

    Suffixes: B batch, S joint tokens, D model width.
    """

    dynamic: bool
    """False: none is; each size is compiled apart."""
    cuda_graphs: bool
    """Calls on CUDA are recorded and replayed."""

    def mark_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        """For a graph of the whole step."""
        latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask, table = inputs
        self._mark((latents_BFCHW, text_BTE, timestep_B, ofs_B), batch_of=model)
        self._mark((latents_BFCHW,), 1, 3, 4)
        self._mark((text_BTE, position_1SD), 1)
        self._mark(table or (), 0)
        self._mark_tokens(model, rotary, mask)

    def mark_streams(self, model: nn.Module, streams: Sequence[Tensor | None], *, half: bool) -> None:
        """What a step cache gives to a graph of the whole step: (B, S, D), or with ``half`` of half the batch."""
        self._mark(streams, 1, batch_of=model, shape="half" if half else "batch")

    def mark_begin(
        self,
        model: CogVideoXTransformer,
        patches_BVP: Tensor,
        text_BTE: Tensor,
        timestep_B: Tensor,
        ofs_B: Tensor | None,
        position_1SD: Tensor | None,
        order_V: Tensor | None,
        conditioning: Conditioning | None,
    ) -> None:
        """For a graph of what stands before the blocks; the arguments are ``CogVideoXTransformer.begin``'s."""
        self._mark((patches_BVP, text_BTE, timestep_B, ofs_B, *(conditioning or ())), batch_of=model)
        self._mark((patches_BVP, text_BTE, position_1SD), 1)
        self._mark((order_V,), 0)

    def mark_head(self, model: CogVideoXTransformer, x_BVD: Tensor, out_B2D: Tensor) -> None:
        """For a graph of what stands after them; the arguments are ``CogVideoXTransformer.head``'s."""
        self._mark((x_BVD, out_B2D), batch_of=model)
        self._mark((x_BVD,), 1)

    def mark_block(
        self,
        block: nn.Module,
        x_BSD: Tensor,
        mod_B12D: Tensor,
        is_text_S1: Tensor,
        rotary: Rotary | None,
        mask: Mask | LayerBlocks | Exchange,
    ) -> None:
        """For a graph of one block; the arguments are ``Block.compute``'s."""
        self._mark((x_BSD, mod_B12D), batch_of=block, one_apart=isinstance(mask, Exchange) and len(x_BSD) == 1)
        self._mark((x_BSD,), 1)
        self._mark((is_text_S1,), 0)
        self._mark_tokens(block, rotary, mask)

    def _mark(
        self,
        tensors: Sequence[Tensor | None],
        *dims: int,
        batch_of: nn.Module | None = None,
        one_apart: bool = False,
        shape: Literal["batch", "half"] = "batch",
    ) -> None:
        """Have torch take these dimensions as symbols; with ``batch_of``, the module called, dimension 0 is B.

        An ordinary symbol is never 1: torch compiles sizes of 1 apart. So B is an unbacked one, which holds for 1 too
        (measured: benchmarks/NOTES.md) and of which torch must know that it is not 0: quantizing of activations asks.
        Not so for one video of an ``Exchange``, which has a graph of its own.
        """
        if not self.dynamic:
            return
        from torch._dynamo.decorators import mark_dynamic, mark_unbacked

        present = [tensor for tensor in tensors if tensor is not None]
        is_one_apart = one_apart or (batch_of is not None and self._is_one_apart(present, batch_of))
        for tensor in present:
            if is_one_apart:
                mark_dynamic(tensor, 0)
            elif batch_of is not None:
                hint = _BATCH_HINT if shape == "batch" else _BATCH_HINT // 2
                mark_unbacked(tensor, 0, hint_override=hint, shape_id=shape, **_batch_bounds(mark_unbacked))
            if dims and getattr(tensor, "_dynamo_dynamic_indices", None) != {*dims}:
                mark_dynamic(tensor, list(dims))

    def _is_one_apart(self, tensors: list[Tensor], module: nn.Module) -> bool:
        """Whether a batch of one has a graph of its own, because of what cannot be done with an unbacked symbol.

        torch 2.11, which cannot be told its bounds, reckons with sizes of 0 and so fuses nothing (22 launches a
        block in place of 9). CUDA graphs are not recorded with one. Flex attention's derivative asks whether
        it is above 1, and so does that of the whole model.
        """
        from torch._dynamo.decorators import mark_unbacked

        is_on_cuda = any(tensor.is_cuda for tensor in tensors)
        if not _batch_bounds(mark_unbacked) or (self.cuda_graphs and is_on_cuda):
            return True
        is_whole = isinstance(module, CogVideoXTransformer)
        asks = (is_on_cuda and is_whole) or any(getattr(each, "backend", None) in _FLEX for each in module.modules())
        is_differentiated = any(tensor.requires_grad for tensor in (*tensors, *module.parameters()))
        return asks and torch.is_grad_enabled() and is_differentiated

    def _mark_tokens(
        self, module: nn.Module, rotary: Rotary | None, mask: Mask | LayerBlocks | SparseBlocks | Exchange
    ) -> None:
        self._mark(rotary or (), 0)
        if isinstance(mask, Exchange):
            self._mark((mask.whole_S,), 0)
            mask = mask.mask
        if isinstance(mask, LayerBlocks | SparseBlocks):
            self._mark((mask.counts_PQ,), 1)
            self._mark((mask.columns_PQQ,), 1, 2)
        if isinstance(mask, SparseBlocks):
            self._mark(tuple(mask.order), 0)
        if isinstance(mask, Tensor):
            self._mark((mask,), *(dim for dim in (2, 3) if mask.shape[dim] > 1), batch_of=module)


def quantizes_activations(model: nn.Module) -> bool:
    """Whether a weight is quantized in another way than torchao's weight-only ones, which say so."""
    missing = object()
    subclasses = (tensor for tensor in model.parameters() if hasattr(tensor, "__tensor_flatten__"))
    return any(getattr(tensor, "act_quant_kwargs", missing) is not None for tensor in subclasses)


@functools.cache
def _batch_bounds(mark_unbacked: Callable[..., Any]) -> dict[str, int]:
    """That a batch is 1 or more, and no more than cuDNN's attention takes, as arguments of torch's ``mark_unbacked``.

    Quantizing of activations asks the one, torch 2.13's choice between attention kernels the other; 2.11 cannot be
    told either.
    """
    return {"min": 1, "max": 65535} if "min" in inspect.signature(mark_unbacked).parameters else {}


__all__ = ["Symbols", "quantizes_activations"]
