"""Streamed blocks: the runner's ``residency`` slot for a model that is larger than the device's memory.

The blocks' weights lie in host memory (pinned where there is CUDA), each block's one after the other as bytes. On the
device are two slots of that size, which are seen as a block's weights. While a block computes in one of them, the next
one's bytes are copied into the other: one copy a block, on a stream of its own. Where a copy may begin and a block may
compute is said by events, never by waiting on the host, and all of it happens around what computes a block: compiled
code sees weights on the device, as always.

Between steps nothing is kept of the weights on the device, so what is changed in the host's holds from the next step
on. The embedding, the conditioning and the head lie on the device.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cogx_fast.model.tracing import is_traced
from cogx_fast.model.transformer import Block
from cogx_fast.runtime.composition import Feature, OffloadError
from cogx_fast.runtime.tensors import hash_block, plain_tensors, unflatten

SLOTS = 2
"""One to compute from, one to copy to: copies are as fast with more, since each is the whole link's."""
_ALIGNMENT = 256  # bytes; what CUDA's allocator and its libraries' vector loads go by


class Copies(Protocol):
    """Copies to a device that go on beside what computes there. ``Any`` is a moment on the device: an event."""

    def mark(self) -> Any:
        """The moment when everything that was asked to compute so far has been done."""

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Copy after that moment; returns the moment when it is done."""

    def wait(self, moment: Any) -> None:
        """Let what is asked to compute from now on begin after that moment."""


class SideStream:
    """Copies on a CUDA stream of their own.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        target.record_stream(self._copying)  # freed, it is given to nobody before the copy is done
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def wait(self, moment: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(moment)


class InOrder:
    """Copies that are done when they are asked for, where the host computes itself."""

    def mark(self) -> Any:
        return None

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        return target.copy_(source)

    def wait(self, moment: Any) -> None:
        pass


def copies_to(device: torch.device) -> Copies:
    """How copies are made there."""
    return SideStream(device) if device.type == "cuda" else InOrder()


class _Piece(NamedTuple):
    """Where in a block's bytes one of its plain tensors is."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """That tensor in some memory. It is no view to autograd or the compiler, which would look at the whole."""
        tensor = torch.empty(0, dtype=self.dtype, device=memory.device)
        return tensor.set_(memory.untyped_storage(), self.offset // self.dtype.itemsize, self.shape, self.stride)


class HostPart:
    """The weights of a block, or of another part, in host memory as bytes, of which its parameters become views.

    Args:
        part: its weights may lie anywhere.

    Raises:
        OffloadError: they are not there, since something else moves them.
    """

    def __init__(self, part: nn.Module) -> None:
        members: Iterator[dict[str, Any]]
        members = (each for module in part.modules() for each in (module._parameters, module._buffers))
        self._places = [(each, name) for each in members for name, tensor in each.items() if tensor is not None]
        tensors = [each[name] for each, name in self._places]
        if any(tensor.is_meta for tensor in tensors):
            raise OffloadError(
                f"a {type(part).__name__} that is to lie in host memory has no weights: something else moves them "
                "(sequential offload?). Take that away with pipe.remove_all_hooks(): offload='blocks' does its work"
            )
        self.layout = hash_block(part), tuple(_pieces(tensors))
        _, pieces = self.layout
        last = pieces[-1]
        size = last.offset + _extent(last.shape, last.stride) * last.dtype.itemsize
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        with torch.no_grad():
            for leaf, piece in zip(_leaves(tensors), pieces, strict=True):
                piece.of(self.memory).copy_(leaf)
        self.tensors: list[Any] = tensors
        self.tensors = self.seen_in(self.memory, frozen=False)
        self.show(self.tensors)

    def is_of(self, part: nn.Module) -> bool:
        """Whether the part's weights are still those, whatever values they have by now."""
        members = (each for module in part.modules() for each in (module._parameters, module._buffers))
        held = [tensor for each in members for tensor in each.values() if tensor is not None]
        return len(held) == len(self.tensors) and all(map(operator.is_, held, self.tensors))

    def seen_in(self, memory: Tensor, *, frozen: bool) -> list[Any]:
        """The weights as some memory has them, quantized ones made of its bytes; frozen: without gradients."""
        leaves = iter([piece.of(memory) for piece in self.layout[1]])
        seen: list[Any] = []
        for like in self.tensors:
            tensor = unflatten(like, leaves)
            wants_grad = like.requires_grad and not frozen
            is_parameter = isinstance(like, nn.Parameter)
            seen.append(nn.Parameter(tensor, requires_grad=wants_grad) if is_parameter else tensor)
        return seen

    def show(self, tensors: Iterable[Any]) -> None:
        """Have the part compute with these."""
        for (members, name), tensor in zip(self._places, tensors, strict=True):
            members[name] = tensor


class _Slot:
    """Memory of the device for one block at a time."""

    def __init__(self, size: int, device: torch.device, free: Any) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.free = free
        """When what computed from it is done."""
        self._seen: dict[Any, list[Any]] = {}

    def fill(self, host: HostPart, copies: Copies) -> tuple[list[Any], Any]:
        """Copy a block there; returns its weights, and when they are there."""
        if host.layout not in self._seen:
            with torch.inference_mode(False), torch.no_grad():
                self._seen[host.layout] = host.seen_in(self.memory, frozen=True)
        size = host.memory.numel()
        return self._seen[host.layout], copies.copy(host.memory, self.memory[:size], self.free)


class StreamedBlocks:
    """Blocks whose weights are copied to the device as they are needed. A value of ``Slots.residency``.

    Args:
        copies_to: how copies are made to a device.
    """

    feature = Feature.STREAMED
    is_traceable = False
    """It decides between calls of compiled code."""

    def __init__(self, copies_to: Callable[[torch.device], Copies] = copies_to) -> None:
        self._copies_to = copies_to
        self._hosts: WeakKeyDictionary[nn.Module, HostPart] = WeakKeyDictionary()
        self._slots: deque[_Slot] = deque()
        self._copies: Copies | None = None
        self._pass = threading.Lock()
        """Held while blocks compute: the slots are one thread's at a time."""

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamedBlocks, (self._copies_to,)  # a copy of the model has weights of its own

    def hold(self, block: nn.Module) -> HostPart:
        """Have a block's weights in host memory, if they are not there yet."""
        host = self._hosts.get(block)
        if host is None or not host.is_of(block):
            host = self._hosts[block] = HostPart(block)
        return host

    def __call__(
        self, blocks: Iterable[Block], first: int, last: int, device: torch.device
    ) -> Iterator[tuple[int, Block]]:
        """The blocks from ``first`` to before ``last``, each with its weights on the device while it is used.

        Raises:
            OffloadError: gradients are asked for, or it is traced.
        """
        if is_traced():
            raise OffloadError("offload='blocks' copies outside of compiled code: use load(..., compile=True)")
        if torch.is_grad_enabled():
            raise OffloadError(
                "offload='blocks' keeps no weights on the device for a backward pass: call the model under "
                "torch.no_grad() (pipelines do), or train it without offload"
            )
        blocks = list(blocks)
        with self._pass:
            hosts = [self.hold(block) for block in blocks]
            copies = self._prepare(device, max(host.memory.numel() for host in hosts))
            waiting = deque(range(first, last))
            filled: deque[tuple[_Slot, list[Any], Any]] = deque()

            def fill() -> None:
                slot = self._slots[0]
                self._slots.rotate(-1)
                filled.append((slot, *slot.fill(hosts[waiting.popleft()], copies)))

            for _ in range(min(SLOTS, last - first)):
                fill()
            for layer in range(first, last):
                slot, weights, there = filled.popleft()
                copies.wait(there)
                host = hosts[layer]
                host.show(weights)
                try:
                    yield layer, blocks[layer]
                finally:
                    host.show(host.tensors)
                    slot.free = copies.mark()
                if waiting:
                    fill()

    def _prepare(self, device: torch.device, size: int) -> Copies:
        """Have slots of that size, or larger, on the device."""
        if not self._slots or self._slots[0].memory.device != device or self._slots[0].memory.numel() < size:
            self.release()
            self._copies = self._copies_to(device)
            with torch.inference_mode(False):
                self._slots.extend(_Slot(size, device, self._copies.mark()) for _ in range(SLOTS))
        assert self._copies is not None
        return self._copies

    def release(self, *, elsewhere_than: torch.device | None = None) -> None:
        """Give the slots' memory back; with ``elsewhere_than`` unless it is that device's."""
        if self._slots and self._slots[0].memory.device != elsewhere_than:
            self._slots.clear()


class Offload:
    """Brings each block to host memory as its weights come (``weights.assemble.Transform``)."""

    def check(self, model: Any, store: Any) -> None:
        """Have the model stream its blocks."""
        self._streamed = streamed_blocks(model)

    def apply(self, part: nn.Module, name: str) -> None:
        """Bring a block there."""
        if isinstance(part, Block):
            self._streamed.hold(part)


def stream_blocks(model: Any, device: torch.device) -> None:
    """Have a model's blocks lie in host memory and be streamed to the device; the rest of it moves there.

    Args:
        model: a ``CogVideoXModel``, its weights anywhere; changed in place.
        device: where it computes.

    Raises:
        As ``streamed_blocks``.
    """
    streamed = streamed_blocks(model)
    model.merged.look(model)
    for block in model.transformer_blocks:
        streamed.hold(block)
    model.merged.note(model)
    model.to(device)


def streamed_blocks(model: Any) -> StreamedBlocks:
    """What streams a model's blocks, from now on if they were not.

    Raises:
        OffloadError: (a ValueError) the model runs a package.
        ValueError: it is compiled with ``scope="model"``.
    """
    streamed = model.runner.slots.residency
    if not isinstance(streamed, StreamedBlocks):
        if model.runner.package is not None:
            raise OffloadError(
                f"the model runs {model.runner.package} on weights that lie on its device: load_package(..., "
                "offload='blocks') loads one whose blocks are streamed"
            )
        streamed = StreamedBlocks()
        model.runner.use(replace(model.runner.slots, residency=streamed))
    return streamed


@contextmanager
def kept_on_host(model: Any, convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While a model is moved: parts in host memory stay there, and what is made of them elsewhere is given back.

    Args:
        model: a ``CogVideoXModel``.
        convert: what is done to its tensors.

    Raises:
        OffloadError: it gives them another dtype.
    """
    residency, baked = model.runner.slots.residency, model.inputs.baked
    held = {"transformer_blocks": residency if isinstance(residency, StreamedBlocks) else None, "modulation": baked}
    held = {name: holder for name, holder in held.items() if holder is not None}
    parts = {name: model._modules[name] for name in held}
    dtypes = {each.dtype for part in parts.values() for each in part.parameters() if each.is_floating_point()}
    changed = {dtype for dtype in dtypes if convert(torch.empty(0, dtype=dtype)).dtype != dtype}
    if changed:
        raise OffloadError(
            f"weights in host memory keep their dtype ({', '.join(map(str, changed))}): load the model with dtype=..."
        )
    model._modules.update(dict.fromkeys(parts))
    try:
        yield
    finally:
        model._modules.update(parts)
        for holder in held.values():
            holder.release(elsewhere_than=model.device)


def check_offload(offload: Any) -> None:
    """Raise ``OffloadError`` for another kind of offload than the one that there is."""
    if offload not in (None, "blocks"):
        raise OffloadError(
            f"offload is {offload!r}, expected 'blocks' or None (pipelines have enable_model_cpu_offload())"
        )


def _leaves(tensors: Iterable[Any]) -> list[Tensor]:
    return [leaf for tensor in tensors for leaf in plain_tensors(tensor)]


def _pieces(tensors: Iterable[Any]) -> Iterator[_Piece]:
    offset = 0
    for leaf in _leaves(tensors):
        yield _Piece(offset, leaf.dtype, leaf.shape, leaf.stride())
        offset += _extent(leaf.shape, leaf.stride()) * leaf.dtype.itemsize
        offset += -offset % _ALIGNMENT


def _extent(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Values from the first to the last of a tensor in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


__all__ = [
    "SLOTS", "Copies", "HostPart", "Offload", "OffloadError", "StreamedBlocks", "check_offload",
    "copies_to", "kept_on_host", "stream_blocks", "streamed_blocks",
]  # fmt: skip
