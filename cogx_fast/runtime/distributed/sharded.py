"""Sharded weights: the runner's ``residency`` slot for ranks whose GPUs cannot hold all blocks.

Each rank keeps its share of every block's weights, by torch's FSDP2. While a block computes, the shares of the next one
are gathered from all ranks; what was gathered is freed as soon as the block is done. The embedding, the conditioning
and the head are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cogx_fast.model.transformer import Block
from cogx_fast.runtime import composition
from cogx_fast.runtime.attached import on_modules, refuse
from cogx_fast.runtime.composition import Feature, ShardError
from cogx_fast.runtime.tensors import is_wrapper

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_INSTEAD = "use a pipeline without offload; its other parts may have their own (pipe.vae.enable_tiling(), …)"


class ShardedBlocks:
    """Blocks whose weights are gathered from all ranks as they are needed. A value of ``Slots.residency``.

    Args:
        device: where this rank's shares lie and its blocks compute.
        digest: of the weights while they were whole (``parallel.digest_weights``).
    """

    feature = Feature.SHARDED
    is_traceable = False
    """It gathers between calls of compiled code."""

    def __init__(self, device: torch.device, digest: str) -> None:
        self.device, self.digest = device, digest

    def __call__(
        self, blocks: Iterable[Any], first: int, last: int, device: torch.device
    ) -> Iterator[tuple[int, Block]]:
        """The blocks from ``first`` to before ``last``; while one computes, the next one's weights are gathered."""
        few = list(blocks)[first:last]
        for block in few[:1]:
            block.unshard(async_op=True)
        for layer, (block, following) in enumerate(zip_longest(few, few[1:]), first):
            if following is not None:
                following.unshard(async_op=True)
            yield layer, block


def shard_blocks(model: Any, mesh: DeviceMesh, digest: str) -> None:
    """Have a model's blocks keep a share of their weights on each rank, on the mesh's device; the rest stays whole.

    Args:
        model: a ``CogVideoXModel``, the same on every rank, its weights anywhere; changed in place, for good.
        mesh: of one dimension, with all ranks.
        digest: of its weights.
    """
    from torch.distributed.fsdp import fully_shard, share_comm_ctx

    model.merged.look(model)
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    share_comm_ctx(list(model.transformer_blocks))  # one pair of streams gathers for all of them
    device = next(model.transformer_blocks[0].parameters()).device
    model.runner.use(replace(model.runner.slots, residency=ShardedBlocks(device, digest)))
    model.merged.note(model)


def is_asked_for(parallel: Any) -> bool:
    """Whether ``parallel`` (as of ``cogx_fast.load``) shards weights."""
    return bool(getattr(parallel, "shard_weights", False))


def check_shardable(model: Any) -> None:
    """Refuse a model whose blocks FSDP2 cannot shard, looking at types alone: it may be on the meta device.

    Raises:
        ShardError: its weights are quantized, or a package's.
    """
    if any(map(is_wrapper, model.transformer_blocks.parameters())):
        composition.check({**composition.named(Feature.SHARDED), Feature.QUANTIZED: "quantized weights"})
    model.runner.refuse_packaged("shard_weights=True needs weights that can be divided")


def sharded(model: Any) -> ShardedBlocks | None:
    """What gathers a model's blocks, if they are sharded."""
    residency = model.runner.slots.residency
    return residency if isinstance(residency, ShardedBlocks) else None


def refuse_sharded(model: Any, what: str, instead: str) -> None:
    """Refuse what needs whole weights.

    Args:
        model: a ``CogVideoXModel``.
        what: e.g. "set_loras".
        instead: what to do.

    Raises:
        ShardError: the model's are sharded.
    """
    if sharded(model):
        raise ShardError(f"{what} needs whole weights, and this model's are sharded over the job's ranks: {instead}")


def refuse_moved(model: Any) -> None:
    """Refuse hooks that move or cast a sharded model's weights.

    Raises:
        AttachedError: (a ValueError) there are some; the message names them.
    """
    if sharded(model):
        found = [replace(each, remedy=_INSTEAD) for each in on_modules(model) if each.kind == "placing"]
        refuse(found, "sharded weights stay where they are")


def check_conversion(model: Any, convert: Callable[[Tensor], Tensor]) -> None:
    """Refuse to move or cast shares, whose place and dtype FSDP2 goes by.

    Args:
        model: a ``CogVideoXModel``.
        convert: what would be done to its tensors.

    Raises:
        ShardError: the model is sharded, and it does.
    """
    found = sharded(model)
    if found is None:
        return
    like = torch.empty(0, dtype=model.dtype, device=found.device)
    converted = convert(like)
    if (converted.dtype, converted.device) != (like.dtype, like.device):
        raise ShardError(
            f"sharded weights stay in {like.dtype} on {like.device} (asked for: {converted.dtype} on "
            f"{converted.device}): load the model with dtype=..., and {_INSTEAD}"
        )


__all__ = [
    "ShardError", "ShardedBlocks", "check_conversion", "check_shardable", "is_asked_for",
    "refuse_moved", "refuse_sharded", "shard_blocks", "sharded",
]  # fmt: skip
