"""What each launch of a lowered graph must read, write and compute, from Inductor's own schedule.

Bytes: each element of memory that a launch must read counts once, and each that it writes once, however often the code
touches it; so a view counts its own part of a buffer, and a broadcast what is stored. Library calls and templates count
their inputs and outputs, attention without its repeated reads of keys and values.

Generated kernels are counted from the loads and stores that Inductor scheduled; library calls and templates from the
layouts of their arguments and results.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cogx_fast.runtime.explain.footprint import Runs, TooManyOffsets, offsets, union

aten = torch.ops.aten


class CountError(RuntimeError):
    """The counts would not be true; the message says why."""


@dataclass(kw_only=True)
class Work:
    """Of one launch."""

    is_library: bool
    is_called: bool
    """A library's, or a template."""
    read_bytes: int = 0
    written_bytes: int = 0
    flops: int = 0
    products: str = "bf16"
    exponentials: int = 0
    is_attention: bool = False


def count(graph: Any) -> list[Work]:
    """The work of each launch of a generated graph, in the order of its code.

    Args:
        graph: Inductor's ``GraphLowering`` after code generation, the current one (``V.graph``).

    Raises:
        CountError: a matrix product or attention of the graph belongs to no launch, or to several.
    """
    counted: dict[Any, set[int]] = defaultdict(set)
    works: list[Work] = []
    for node in graph.scheduler.nodes:
        if _is_nothing(node):
            continue
        if _is_result(node):  # one of several of the library call before it
            works[-1].written_bytes += _layout_bytes(node.node)
        else:
            works.append(_work(graph, node))
        for origin in _origins(node):
            if _product(origin) is not None:
                counted[origin].add(len(works) - 1)
    products = [origin for origin in graph.graph.nodes if _product(origin) is not None]
    for origin in products:
        # a generated kernel that only prepares the arguments of a library's call names it among its origins, too
        takers = [i for i in counted[origin] if works[i].is_called] or list(counted[origin])
        if len(takers) != 1:
            raise CountError(f"{origin} belongs to {len(takers)} launches, expected 1")
        _add_product(works[takers[0]], origin)
    return works


# ----------------------------------------------------------------------------------------------------------- bytes


def _work(graph: Any, node: Any) -> Work:
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    called = [part.node for part in node.get_nodes() if part.is_template() or part.is_extern()]
    work = Work(is_library=isinstance(node, ExternKernelSchedulerNode), is_called=bool(called))
    for item in called:
        work.read_bytes += sum(_layout_bytes(argument) for argument in _distinct(_arguments(item)))
    if called and len(node.get_nodes()) == 1:
        work.written_bytes = _layout_bytes(called[0])
        return work
    inside = set() if work.is_library else _never_stored(node)
    already = {argument.get_name() for item in called for argument in _arguments(item)}
    work.read_bytes += _accessed(graph, node.read_writes.reads, inside | already)
    work.written_bytes += _accessed(graph, node.read_writes.writes, inside)
    return work


def _accessed(graph: Any, accesses: Iterable[Any], without: set[str]) -> int:
    """Bytes of the distinct elements of these loads, or these stores."""
    from torch._inductor.dependencies import MemoryDep, WeakDep

    by_buffer: dict[str, list[Any]] = defaultdict(list)
    for access in accesses:
        if not isinstance(access, WeakDep) and access.name not in without:
            by_buffer[access.name].append(access)
    total = 0
    for name, found in by_buffer.items():
        whole = int(graph.get_numel(name))
        elements = min(whole, _elements(found, whole)) if all(isinstance(a, MemoryDep) for a in found) else whole
        total += elements * graph.get_dtype(name).itemsize
    return total


def _elements(accesses: list[Any], whole: int) -> int:
    sets: list[Runs] = []
    for access in accesses:
        sizes = {symbol: int(size) for symbol, size in access.ranges.items()}
        try:
            sets.append(offsets(access.index, sizes))
        except TooManyOffsets:
            return min(whole, sum(int(item.get_numel()) for item in accesses))
    return len(union(sets))


def _never_stored(node: Any) -> set[str]:
    """Buffers that only this launch uses, and that therefore stay in registers."""
    from torch._inductor.scheduler import OutputNode

    parts = set(node.get_nodes()) | {node}
    local = set()
    for buffer in node.get_outputs():
        users = {user.node for user in buffer.users}
        if not any(isinstance(user, OutputNode) for user in users) and users <= parts:
            local.add(buffer.get_name())
    return local


def _arguments(item: Any) -> Iterator[Any]:
    for argument in item.inputs:
        yield from argument if isinstance(argument, list | tuple) else (argument,)


def _distinct(arguments: Iterable[Any]) -> list[Any]:
    """Each buffer part once: the same view twice is one."""
    return list(
        {
            (a.get_name(), str(a.get_layout().offset), str(a.get_size()), str(a.get_stride())): a for a in arguments
        }.values()
    )


def _layout_bytes(item: Any) -> int:
    """Of what a layout covers; a broadcast dimension holds one element."""
    from torch._inductor.ir import MultiOutputLayout, NoneLayout

    if isinstance(getattr(item, "layout", None), MultiOutputLayout | NoneLayout):
        return 0
    stored = (int(size) for size, stride in zip(item.get_size(), item.get_stride(), strict=True) if stride != 0)
    return math.prod(stored) * item.get_dtype().itemsize


def _is_nothing(node: Any) -> bool:
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return isinstance(node, NopKernelSchedulerNode)


def _is_result(node: Any) -> bool:
    from torch._inductor.ir import MultiOutput

    return isinstance(node.node, MultiOutput)


# ------------------------------------------------------------------------------------------------------ operations

_LIBRARY_ATTENTION = {
    aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
}  # fmt: skip
_FIRST_FACTOR = {
    aten.mm: 0, aten.bmm: 0, aten._int_mm: 0, aten._scaled_mm: 0, aten.addmm: 1, aten.baddbmm: 1,
    aten._addmm_activation: 1,
}  # fmt: skip
_PRODUCTS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}


def _origins(node: Any) -> set[Any]:
    return {origin for part in node.get_nodes() if part.node is not None for origin in part.node.get_origins()}


def _product(origin: Any) -> str | None:
    """ "matmul" or "attention", if the operator is one."""
    if origin.op != "call_function":
        return None
    target = getattr(origin.target, "overloadpacket", origin.target)
    if target in _FIRST_FACTOR:
        return "matmul"
    is_flex = target is torch.ops.higher_order.flex_attention
    return "attention" if is_flex or target in _LIBRARY_ATTENTION else None


def _add_product(work: Work, origin: Any) -> None:
    if _product(origin) == "attention":
        query, key, value = (origin.args[i].meta["val"] for i in range(3))
        scores = math.prod(query.shape[:-1]) * key.shape[-2]
        work.flops += 2 * scores * (query.shape[-1] + value.shape[-1])
        work.exponentials += scores
        work.is_attention = True
        return
    first = _FIRST_FACTOR[origin.target.overloadpacket]
    left, right = (origin.args[first + i].meta["val"] for i in range(2))
    work.flops += 2 * math.prod(left.shape) * right.shape[-1]
    work.products = _PRODUCTS.get(left.dtype, "bf16")
