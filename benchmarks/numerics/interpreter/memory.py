"""Every load and store must lie in the buffer that its pointer came from.

A pointer remembers which argument of the kernel it was made from, through all arithmetic on it. So an access that
leaves its tensor for a neighbour's memory is found, which no address sanitizer of a pool of GPU memory would see.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime import interpreter as ti

from benchmarks.numerics.interpreter.races import Races
from benchmarks.numerics.interpreter.rounding import Handle

_BASE = "base"
"""The attribute of a pointer that holds the address of the argument that it was made from."""


class MemoryFault(Exception):
    """An access outside of a buffer, or one that races with another program's."""


class Memory:
    """The buffers of the launch that runs."""

    def __init__(self) -> None:
        self.kernel = ""
        self.program = 0
        self.races: Races | None = None
        """What touched what, where races are looked for."""
        self._buffers: dict[int, tuple[int, int]] = {}

    @contextmanager
    def launch(self, kernel: str, tensors: Iterable[Any], *, races: bool) -> Any:
        """For the programs of one launch; ``tensors`` are the kernel's arguments."""
        self.kernel, self.races = kernel, Races() if races else None
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._buffers[tensor.data_ptr()] = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        try:
            yield
        finally:
            self._buffers, self.races = {}, None

    def check(self, pointers: Handle, mask: Any, *, writes: bool) -> None:
        """Where ``mask`` is True.

        Raises:
            MemoryFault: an access outside of the buffer, or a race.
        """
        base = pointers.attr.get(_BASE)
        if base is None:
            raise MemoryFault(f"{self.kernel}: a pointer whose buffer is not known")
        places = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if not places.size:
            return
        start, end = self._buffers[base]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(places.min()), int(places.max()) + size
        if low < start or high > end:
            verb = "writes" if writes else "reads"
            raise MemoryFault(
                f"{self.kernel}, program {self.program}: {verb} bytes {low - start} to {high - start} of a buffer of "
                f"{end - start}"
            )
        if self.races is not None:
            elements = (places - np.uint64(start)) // np.uint64(size)
            other = self.races.touch(elements, (start, size), (end - start) // size, self.program, writes=writes)
            if other is not None:
                raise MemoryFault(f"{self.kernel}, program {self.program}: {other}")


MEMORY = Memory()


def mark(handle: Handle, tensor: Any) -> None:
    """The handle is a pointer to that tensor, an argument of the kernel."""
    handle.attr[_BASE] = tensor.data_ptr()


_load, _store = ti.InterpreterBuilder.create_masked_load, ti.InterpreterBuilder.create_masked_store


def _checked_load(self: Any, pointers: Handle, mask: Handle, *rest: Any, **named: Any) -> Handle:
    MEMORY.check(pointers, mask.data, writes=False)
    return _load(self, pointers, mask, *rest, **named)


def _checked_store(self: Any, pointers: Handle, value: Handle, mask: Handle, *rest: Any) -> Any:
    MEMORY.check(pointers, mask.data, writes=True)
    return _store(self, pointers, value, mask, *rest)


def _refused(self: Any, *_: Any) -> Any:
    raise NotImplementedError(f"{MEMORY.kernel}: atomic operations and tensor descriptors are not checked here")


def _keeping_base(method: Any, of: int) -> Any:
    """The method, whose result is a pointer into the same buffer as its argument number ``of``."""

    def call(self: Any, *arguments: Any) -> Handle:
        out = method(self, *arguments)
        if _BASE in arguments[of].attr:
            out.attr[_BASE] = arguments[of].attr[_BASE]
        return out

    return call


def install() -> None:
    builder: Any = ti.InterpreterBuilder
    builder.create_masked_load, builder.create_masked_store = _checked_load, _checked_store
    for name in ("atomic_cas", "atomic_rmw", "descriptor_load", "descriptor_store"):
        setattr(builder, f"create_{name}", _refused)
    places = {"addptr": 0, "bitcast": 0, "splat": 1, "broadcast": 0, "expand_dims": 0, "reshape": 0, "trans": 0}
    for name, of in places.items():
        setattr(builder, f"create_{name}", _keeping_base(getattr(builder, f"create_{name}"), of))


__all__ = ["MEMORY", "Memory", "MemoryFault", "install", "mark"]
