"""Which sizes torch takes as symbols when it compiles: marked on a call's tensors, just before it does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogx_fast.model.attention import Mask, Rotary
from cogx_fast.model.masks import LayerBlocks, SparseBlocks
from cogx_fast.runtime.runner import Inputs

_BATCH_HINT = 2
"""The batch that kernels are tuned for where the graph holds for every batch; guidance doubles a batch of one."""


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """How sizes are marked.

    Suffixes: B batch, S joint tokens, D model width.
    """

    dynamic: bool
    """False: none is; each size is compiled apart."""
    cuda_graphs: bool
    """Calls on CUDA are recorded and replayed."""
    quantizes_activations: bool
    """A product of the model does (``quantizes_activations``)."""

    def mark_inputs(self, inputs: Inputs) -> None:
        """For a graph of the whole step."""
        latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask = inputs
        self._mark((latents_BFCHW, text_BTE, timestep_B, ofs_B), batch=True)
        self._mark((latents_BFCHW,), 1, 3, 4)
        self._mark((text_BTE, position_1SD), 1)
        self._mark_tokens(rotary, mask)

    def mark_block(
        self,
        block: nn.Module,
        x_BSD: Tensor,
        mod_B12D: Tensor,
        is_text_S1: Tensor,
        rotary: Rotary | None,
        mask: Mask | LayerBlocks,
    ) -> None:
        """For a graph of one block; the arguments are ``Block.compute``'s."""
        self._mark((x_BSD, mod_B12D), batch=True)
        self._mark((x_BSD,), 1)
        self._mark((is_text_S1,), 0)
        self._mark_tokens(rotary, mask)

    def _mark(self, tensors: tuple[Tensor | None, ...], *dims: int, batch: bool = False) -> None:
        """Have torch take these dimensions as symbols; ``batch``: dimension 0 is B.

        An ordinary symbol is never 1: torch compiles sizes of 1 apart. So B is an unbacked one, which holds for 1 too
        (measured: benchmarks/NOTES.md) and of which torch must know that it is not 0: quantizing of activations asks.
        CUDA graphs are not recorded with unbacked symbols; there B = 1 is apart. So it is with quantized activations in
        versions of torch that cannot be told.
        """
        if not self.dynamic:
            return
        from torch._dynamo.decorators import mark_dynamic, mark_unbacked

        for tensor in tensors:
            if tensor is None:
                continue
            if batch and not self._is_one_apart(tensor.device):
                mark_unbacked(tensor, 0, hint_override=_BATCH_HINT, shape_id="batch", **_batch_bounds(mark_unbacked))
            elif batch:
                mark_dynamic(tensor, 0)
            if dims and getattr(tensor, "_dynamo_dynamic_indices", None) != {*dims}:
                mark_dynamic(tensor, list(dims))

    def _is_one_apart(self, device: torch.device) -> bool:
        from torch._dynamo.decorators import mark_unbacked

        if self.cuda_graphs and device.type == "cuda":
            return True
        return self.quantizes_activations and not _batch_bounds(mark_unbacked)

    def _mark_tokens(self, rotary: Rotary | None, mask: Mask | LayerBlocks | SparseBlocks) -> None:
        self._mark(rotary or (), 0)
        if isinstance(mask, LayerBlocks | SparseBlocks):
            self._mark((mask.counts_PQ,), 1)
            self._mark((mask.columns_PQQ,), 1, 2)
        if isinstance(mask, SparseBlocks):
            self._mark(tuple(mask.order), 0)
        if isinstance(mask, Tensor):
            self._mark((mask,), *(dim for dim in (2, 3) if mask.shape[dim] > 1), batch=True)


def quantizes_activations(model: nn.Module) -> bool:
    """Whether a weight is quantized in another way than torchao's weight-only ones, which say so."""
    missing = object()
    subclasses = (tensor for tensor in model.parameters() if hasattr(tensor, "__tensor_flatten__"))
    return any(getattr(tensor, "act_quant_kwargs", missing) is not None for tensor in subclasses)


@functools.cache
def _batch_bounds(mark_unbacked: Callable[..., Any]) -> dict[str, int]:
    """That a batch is 1 or more, and no more than cuDNN's attention takes, as arguments of torch's ``mark_unbacked``.

    Quantizing of activations asks the one, torch 2.13's choice between attention kernels the other; 2.11 cannot be
    told either, and asks for neither but with quantized activations.
    """
    return {"min": 1, "max": 65535} if "min" in inspect.signature(mark_unbacked).parameters else {}


__all__ = ["Symbols", "quantizes_activations"]
