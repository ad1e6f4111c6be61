"""The one loop over the blocks: begin, every block, head. What may differ between runs stands in the slots.

| slot | what it decides | its values |
|---|---|---|
| call_block | how a block is computed | eager (here); compiled (``compiled``); packaged (``package``) |
| begin, head | the same of what is before and after them | eager (``model.transformer``); compiled (``compiled``) |
| residency | where a block's weights are when it is called | here; on the host (``streaming``); shared (``sharded``) |
| reuse | which blocks a step computes | all of them (here); as a schedule says (``step_cache``) |
| split | which part of a step this process computes | all of it (here); of the batch, of the stream (``parallel``) |

A runner keeps nothing of a call, so several threads may run at once.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens (text first), T text tokens,
V video tokens, E width of text, D model width, L layers, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogx_fast.attention.attend import Mask, Rotary
from cogx_fast.attention.exchange import Exchange
from cogx_fast.attention.masks import LayerBlocks, SparseBlocks
from cogx_fast.model.layers import patchify, unpatchify
from cogx_fast.model.transformer import Block, CogVideoXTransformer, Conditioning
from cogx_fast.runtime import composition

if TYPE_CHECKING:
    from cogx_fast.runtime.baked import Table
    from cogx_fast.runtime.compiling.compile import Compilation


class Inputs(NamedTuple):
    """What a step computes with, as ``CogVideoXModel.forward`` prepares it."""

    latents_BFCHW: Tensor
    """Noisy latents (with the image's behind them along C for image-to-video)."""
    text_BTE: Tensor
    """The text encoder's output."""
    timestep_B: Tensor
    """Diffusion timesteps, 0 to 1000."""
    ofs_B: Tensor | None = None
    """1.5 image-to-video's offset."""
    rotary: Rotary | None = None
    """``(cos_SK, sin_SK)`` of the joint stream, fp32."""
    position_1SD: Tensor | None = None
    """Positions added to the joint stream."""
    mask: Mask | SparseBlocks = None
    """For the attention backend; with ``SparseBlocks`` each layer has its own, and the video tokens stand in their
    order, in which the tables are, too."""
    table: Table | None = None
    """The schedule's conditioning, in which the timesteps' is; None: it is computed."""


class ForBlocks(NamedTuple):
    """What every block is given besides the stream."""

    mods_B12D: Sequence[Tensor]
    """Each layer's modulation."""
    is_text_S1: Tensor
    rotary: Rotary | None
    mask: Mask | SparseBlocks | Exchange

    def of(self, layer: int) -> tuple[Tensor, Tensor, Rotary | None, Mask | LayerBlocks | Exchange]:
        """That layer's modulation ``mod_B12D``, the text's selector ``is_text_S1``, rotary tables and mask."""
        mask = self.mask.of_layer(layer) if isinstance(self.mask, SparseBlocks | Exchange) else self.mask
        return self.mods_B12D[layer], self.is_text_S1, self.rotary, mask

    def of_last(self, videos: int) -> ForBlocks:
        """The same for the last videos of the batch alone; a mask has to be one for all of them."""
        mods_BL12D = torch.stack([mod_B12D[-videos:] for mod_B12D in self.mods_B12D], 1)
        return self._replace(mods_B12D=mods_BL12D.unbind(1))  # laid out as all of them are


class ComputeBlocks(Protocol):
    """What ``Slots.reuse`` is given to compute blocks with."""

    def __call__(self, x_BSD: Tensor, first: int, last: int, /, *, videos: int | None = None) -> Tensor:
        """The stream after the blocks from ``first`` to ``last`` exclusive.

        Args:
            x_BSD: the stream before them.
            first: number of a block.
            last: number of a block.
            videos: how many of the batch's last videos the stream holds; None: all of them.
        """


def call_eagerly(layer: int, block: Block) -> Callable[..., Tensor]:
    """What computes a block: the block itself."""
    return block


@dataclass(frozen=True)
class CallWith:
    """Has each block computed by a function in place of ``Block.compute``. Hooks on a block run around that."""

    computes: Sequence[Callable[..., Tensor] | None]
    """For each layer; None is the block's own."""

    def __call__(self, layer: int, block: Block) -> Callable[..., Tensor]:
        """The block with that function."""
        return partial(block, compute=self.computes[layer])


def on_device(blocks: Iterable[Any], first: int, last: int, device: torch.device) -> Iterable[tuple[int, Block]]:
    """Blocks whose weights lie on the device where they are needed."""
    return enumerate(list(blocks)[first:last], first)


def compute_all(
    compute: ComputeBlocks, x_BSD: Tensor, num_layers: int, model: CogVideoXTransformer, inputs: Inputs
) -> Tensor:
    """Every block in every step."""
    stream = [x_BSD]
    del x_BSD  # the first block's input is not held while the others run
    return compute(stream.pop(), 0, num_layers)


Reuse = Callable[[ComputeBlocks, Tensor, int, CogVideoXTransformer, Inputs], Tensor]
"""(computes blocks, x_BSD before them, their number, model, the call's inputs) -> x_BSD after them"""


class Whole:
    """The whole step in this process."""

    def step(self, model: CogVideoXTransformer, inputs: Inputs, compute: Callable[[Inputs], Tensor]) -> Tensor:
        """The prediction for all videos: of those that this process computes, and of the others."""
        return compute(inputs)

    def enter(self, x_BSD: Tensor, inputs: ForBlocks) -> tuple[Tensor, ForBlocks]:
        """Before the blocks: this process's part of the stream and of what goes with it."""
        return x_BSD, inputs

    def leave(self, x_BSD: Tensor, text_len: int, video_len: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        """After them: ``patches_BVP``, which ``head`` makes of any tokens."""
        return head(x_BSD[:, text_len:])


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How each part of a step is done. The default values cost nothing and can be traced; a value that cannot says so
    by ``is_traceable = False``."""

    begin: Callable[..., tuple[Tensor, Tensor, Conditioning]] = CogVideoXTransformer.begin
    call_block: Callable[[int, Block], Callable[..., Tensor]] = call_eagerly
    head: Callable[..., Tensor] = CogVideoXTransformer.head
    residency: Callable[..., Iterable[tuple[int, Block]]] = on_device
    reuse: Reuse = compute_all
    split: Whole = Whole()  # noqa: RUF009  # it holds nothing

    def eagerly(self) -> Slots:
        """The same, with every part computed eagerly."""
        return replace(self, begin=CogVideoXTransformer.begin, call_block=call_eagerly, head=CogVideoXTransformer.head)


def run(model: CogVideoXTransformer, slots: Slots, inputs: Inputs, reuse: Reuse | None = None) -> Tensor:
    """One step: the prediction, ``(B, F, C_out, H, W)`` in the latents' dtype (H and W down to whole patches).

    Args:
        model: whose parts are computed.
        slots: how each is.
        inputs: the call's.
        reuse: in place of ``slots.reuse``.
    """
    return slots.split.step(model, inputs, lambda part: _step(model, slots, part, reuse or slots.reuse))


def _step(model: CogVideoXTransformer, slots: Slots, inputs: Inputs, reuse: Reuse) -> Tensor:
    latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask, table = inputs
    looked_up = None if table is None else table.look_up(timestep_B)
    order_V, restore_V = mask.order if isinstance(mask, SparseBlocks) else (None, None)
    patch = model.patch_embed.patch_size, model.patch_embed.patch_size_t
    x_BSD, is_text_S1, conditioning = slots.begin(
        model, patchify(latents_BFCHW, *patch), text_BTE, timestep_B, ofs_B, position_1SD, order_V, looked_up
    )
    for_blocks = ForBlocks(conditioning.mod_BL12D.unbind(1), is_text_S1, rotary, mask)
    text_len, tokens = text_BTE.shape[1], x_BSD.shape[1]
    x_BSD, for_blocks = slots.split.enter(x_BSD, for_blocks)
    is_checkpointed = model.gradient_checkpointing and torch.is_grad_enabled()

    def compute(x_BSD: Tensor, first: int, last: int, /, *, videos: int | None = None) -> Tensor:
        given = for_blocks if videos is None else for_blocks.of_last(videos)
        for layer, block in slots.residency(model.transformer_blocks, first, last, x_BSD.device):
            call = slots.call_block(layer, block)
            if is_checkpointed:
                call = partial(model._gradient_checkpointing_func or _checkpoint, call)
            x_BSD = call(x_BSD, *given.of(layer))
        return x_BSD

    stream = [x_BSD]
    del x_BSD
    x_BSD = reuse(compute, stream.pop(), len(model.transformer_blocks), model, inputs)
    patches_BVP = slots.split.leave(
        x_BSD, text_len, tokens - text_len, lambda part: slots.head(model, part, conditioning.out_B2D)
    )
    if restore_V is not None:
        patches_BVP = patches_BVP.index_select(1, restore_V)
    return unpatchify(patches_BVP, latents_BFCHW.shape, *patch)


def _checkpoint(call: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """A block of which the backward pass keeps the input only, and computes the rest again."""
    return cast(Tensor, checkpoint(call, *inputs, use_reentrant=False))


class Runner:
    """Runs a model's steps with these slots, eagerly.

    Args:
        slots: how each part of a step is done.
    """

    compilation: Compilation | None = None
    """How the model is compiled, and what that made; None: it is not."""

    package: str | None = None
    """The package that its blocks' code comes from, in words."""

    def __init__(self, slots: Slots | None = None) -> None:
        self.slots = slots or Slots()

    def __call__(self, model: CogVideoXTransformer, inputs: Inputs) -> Tensor:
        """``run`` with these slots."""
        return run(model, self.slots, inputs)

    def use(self, slots: Slots) -> None:
        """Run with other slots from the next step on; ``begin``, ``call_block`` and ``head`` stay the runner's own.

        Raises:
            ValueError: they do not go together, or with how the model is compiled (``composition``).
        """
        composition.check(self.features(slots))
        mine = self.slots
        self.slots = replace(slots, begin=mine.begin, call_block=mine.call_block, head=mine.head)

    def features(self, slots: Slots | None = None) -> composition.Features:
        """What decides what else goes with it: its slots (or these in their place), and how the model is compiled."""
        compiled = None if self.compilation is None else self.compilation.config
        return {**composition.of_slots(slots or self.slots), **composition.of_compile(compiled)}

    def follow_attached(self, model: CogVideoXTransformer) -> None:
        """Take note of what was attached to the model's modules, or taken away, since the last call."""

    def for_copy(self) -> Runner:
        """What a copied or pickled model has in its place: compiled code stays with its model, a copy compiles anew."""
        copied = Runner(self.slots.eagerly())
        copied.compilation = self.compilation
        return copied

    def refuse_packaged(self, what: str) -> None:
        """Refuse to change what a package's compiled code has settled.

        Args:
            what: the change, e.g. "the attention backend cannot be changed".

        Raises:
            ValueError: the blocks' code comes from a package.
        """
        if self.package is not None:
            raise ValueError(
                f"{what}: the model's blocks run compiled code of {self.package}; use load(..., compile=True), or "
                "export a package that is made so"
            )


__all__ = [
    "CallWith", "ComputeBlocks", "ForBlocks", "Inputs", "Reuse", "Runner", "Slots", "Whole", "call_eagerly",
    "compute_all", "on_device", "run",
]  # fmt: skip
