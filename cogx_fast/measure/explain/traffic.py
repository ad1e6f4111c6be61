"""What each launch of a lowered graph must read, write and compute, from Inductor's own schedule.

Bytes: each element of memory that a launch must read counts once, and each that it writes once, however often the code
touches it; so a view counts its own part of a buffer, and a broadcast what is stored. Library calls and templates count
their inputs and outputs, attention without its repeated reads of keys and values.

Generated kernels are counted from the loads and stores that Inductor scheduled; library calls and templates from the
layouts of their arguments and results.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogx_fast.measure.explain.footprint import TooManyOffsets, offsets, union

aten = torch.ops.aten

KINDS = ("pointwise", "reduction", "matmul", "attention", "copy", "other")
"""Of launches; "other" are a library's that are none of them."""
_LIBRARY_COPIES = ("copy", "copy_", "clone", "_to_copy", "contiguous", "cat")
_MOVES = {"load", "store", "output", "to_dtype", "to_dtype_bitcast", "get_index", "index_expr", "masked_subblock0"}


class CountError(RuntimeError):
    """The counts would not be true; the message says why."""


@dataclass(kw_only=True)
class Work:
    """Of one launch: of a library's call, a template or a generated loop nest."""

    name: str
    """The library's operator, or the operators that are fused in what is generated."""
    is_library: bool
    is_called: bool
    """A library's, or a template."""
    loops: str = ""
    """Of what is generated: "pointwise", "reduction", or "copy" where values are only moved or cast."""
    read_bytes: int = 0
    written_bytes: int = 0
    flops: int = 0
    products: str = "bf16"
    exponentials: int = 0
    is_attention: bool = False

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        if self.is_attention:
            return "attention"
        if self.loops and not self.is_called:
            return self.loops
        last = self.name.rpartition(".")[2]
        return "matmul" if self.flops else "copy" if last in _LIBRARY_COPIES else "other"


def regions(graph: Any) -> list[Any]:
    """The graphs nested in a graph, one for each use."""
    from torch._inductor.ir import InvokeSubgraph

    return [nested(node) for node in graph.scheduler.nodes if isinstance(node.node, InvokeSubgraph)]


def nested(node: Any) -> Any:
    """The graph that a launch of another runs."""
    return node.node.subgraph.graph


def count(graph: Any, regions: Mapping[int, list[Work]] | None = None) -> list[Work]:
    """The work of each launch of a generated graph, in the order of its code.

    Args:
        graph: Inductor's ``GraphLowering`` after code generation, the current one (``V.graph``).
        regions: the works of the graphs that are nested in it, counted before, by their id.

    Raises:
        CountError: a matrix product or attention of the graph belongs to no launch, or to several.
    """
    from torch._inductor.ir import InvokeSubgraph

    counted: dict[Any, set[int]] = defaultdict(set)
    works: list[Work] = []
    for node in graph.scheduler.nodes:
        if _is_nothing(node):
            continue
        if isinstance(node.node, InvokeSubgraph):
            works += [dataclasses.replace(work) for work in (regions or {})[id(nested(node))]]
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
    is_library = isinstance(node, ExternKernelSchedulerNode)
    work = Work(
        name=_name(node), is_library=is_library, is_called=bool(called), loops="" if is_library else _loops(node)
    )
    for item in called:
        work.read_bytes += sum(_layout_bytes(argument) for argument in _distinct(_arguments(item)))
    if work.name in _PRODUCTS_OF_PATTERNS:
        rows_by_inner = next(_arguments(called[0]))
        work.flops = 2 * math.prod(map(_int, rows_by_inner.get_size())) * _int(called[0].get_size()[-1])
    if called and len(node.get_nodes()) == 1:
        work.written_bytes = _layout_bytes(called[0])
        return work
    inside = set() if work.is_library else _never_stored(node)
    already = {argument.get_name() for item in called for argument in _arguments(item)}
    work.read_bytes += _accessed(graph, node.read_writes.reads, inside | already)
    work.written_bytes += _accessed(graph, node.read_writes.writes, inside)
    return work


def _name(node: Any) -> str:
    from torch._inductor.utils import get_fused_kernel_name

    called = str(getattr(node.node, "python_kernel_name", None) or "")
    if called:
        return called.removeprefix("extern_kernels.").removeprefix("torch.ops.").removesuffix(".default")
    return get_fused_kernel_name(node.get_nodes(), "original_aten")


def _loops(node: Any) -> str:
    if node.is_reduction():
        return "reduction"
    done = {name for part in node.get_nodes() for name in getattr(getattr(part, "_body", None), "op_counts", ())}
    return "copy" if done and done <= _MOVES else "pointwise"


def _accessed(graph: Any, accesses: Iterable[Any], without: set[str]) -> int:
    """Bytes of the distinct elements of these loads, or these stores."""
    from torch._inductor.dependencies import MemoryDep, WeakDep

    by_buffer: dict[str, list[Any]] = defaultdict(list)
    for access in accesses:
        if not isinstance(access, WeakDep) and access.name not in without:
            by_buffer[access.name].append(access)
    total = 0
    for name, found in by_buffer.items():
        whole = _int(graph.get_numel(name))
        elements = min(whole, _elements(found, whole)) if all(isinstance(a, MemoryDep) for a in found) else whole
        total += elements * graph.get_dtype(name).itemsize
    return total


def _elements(accesses: list[Any], whole: int) -> int:
    try:
        return len(
            union(
                offsets(_with_hints(access.index), {symbol: _int(size) for symbol, size in access.ranges.items()})
                for access in accesses
            )
        )
    except TooManyOffsets:
        return min(whole, sum(_int(item.get_numel()) for item in accesses))


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
    stored = (_int(size) for size, stride in zip(item.get_size(), item.get_stride(), strict=True) if stride != 0)
    return math.prod(stored) * item.get_dtype().itemsize


def _int(size: Any) -> int:
    """A size; a symbolic one as in the call that was compiled."""
    from torch._inductor.virtualized import V

    sizevars: Any = V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint  # its name until torch 2.12
    return int(hint(size))


def _with_hints(index: Any) -> Any:
    """An index whose only variables are those of its loops, and what depends on data."""
    from torch._inductor.virtualized import V
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    sizes = (SymT.SIZE, SymT.UNBACKED_INT, SymT.PRECOMPUTED_SIZE)
    index = V.graph.sizevars.remove_precomputed_replacements(index)
    return index.xreplace({symbol: _int(symbol) for symbol in index.free_symbols if symbol_is_type(symbol, sizes)})


def _is_nothing(node: Any) -> bool:
    from torch._inductor.ir import AssertScalar
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, AssertScalar)


def _is_result(node: Any) -> bool:
    from torch._inductor.ir import MultiOutput

    return isinstance(node.node, MultiOutput)


def peak_bytes(graph: Any) -> int:
    """The most that a generated graph holds at once of what it makes itself: not its inputs; results until its end.

    Args:
        graph: as for ``count``. Buffers that one launch makes and uses alone are in no memory.
    """
    from torch._inductor.scheduler import OutputNode

    nodes = [node for node in graph.scheduler.nodes if not _is_nothing(node)]
    place = {part: index for index, node in enumerate(nodes) for part in {*node.get_nodes(), node}}
    change = [0] * (len(nodes) + 1)
    for index, node in enumerate(nodes):
        inside = _never_stored(node)
        for buffer in node.get_outputs():
            if buffer.get_name() in inside or buffer.get_aliases() or buffer.get_mutations():
                continue
            users = [user.node for user in buffer.users]
            is_result = any(isinstance(user, OutputNode) for user in users)
            last = len(nodes) if is_result else max((place.get(user, index) for user in users), default=index) + 1
            size = _layout_bytes(buffer.node)
            change[index] += size
            change[last] -= size
    return max(itertools.accumulate(change), default=0)


# ------------------------------------------------------------------------------------------------------ operations

_LIBRARY_ATTENTION = {
    aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_flash_attention_for_cpu,
}  # fmt: skip
_FIRST_FACTOR = {
    aten.mm: 0, aten.bmm: 0, aten._int_mm: 0, aten._scaled_mm: 0, aten.addmm: 1, aten.baddbmm: 1,
    aten._addmm_activation: 1, aten._weight_int8pack_mm: 0,
}  # fmt: skip
_PRODUCTS_OF_PATTERNS = {"_weight_int8pack_mm"}  # found in place of several operators, which then are no product
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
        scores = _product_of(query.shape[:-1]) * _size(key.shape[-2])
        work.flops += 2 * scores * _size(query.shape[-1] + value.shape[-1])
        work.exponentials += scores
        work.is_attention = True
        return
    first = _FIRST_FACTOR[origin.target.overloadpacket]
    left = origin.args[first].meta["val"]
    work.flops += 2 * _product_of(left.shape) * _size(origin.meta["val"].shape[-1])
    work.products = _PRODUCTS.get(left.dtype, "bf16")


def _product_of(shape: Any) -> int:
    return math.prod(_size(size) for size in shape)


def _size(size: Any) -> int:
    """A size of a traced tensor; a symbolic one as in the call that was compiled."""
    return size if isinstance(size, int) else _int(size.node.expr)
