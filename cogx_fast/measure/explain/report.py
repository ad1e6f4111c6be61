"""What is said of a compiled model: graphs, breaks, recompiles, kernels and what they move and compute, seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cogx_fast.measure.explain.traffic import KINDS


class Size(NamedTuple):
    """What the model is called with."""

    batch: int
    """Videos in one call; guidance doubles them."""
    frames: int
    height: int
    """Pixels."""
    width: int
    step: str = ""
    """Which kind of step of a step cache; of the first kind, and without one, nothing."""

    def __str__(self) -> str:
        return " × ".join(map(str, self[:4])) + (f" in a step of {self.step}" if self.step else "")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch of a graph: a generated kernel (on a CPU a loop nest; several may stand in one function) or a call of
    a library's. Bytes and operations are counted as ``measure.explain.traffic`` says.
    """

    name: str
    """The operators that are fused in it, or the library's operator."""
    kind: str
    """One of ``traffic.KINDS``."""
    is_generated: bool
    read_bytes: int
    written_bytes: int
    flops: int
    """Of matrix products and attention, a multiplication and an addition counted as two."""

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.read_bytes:,} B read, {self.written_bytes:,} B written"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph that was captured and compiled."""

    function: str
    """The function it is of."""
    size: int
    """Which of the sizes it was compiled at, and its bytes and operations hold for."""
    runs: int
    """How often one call of the model at that size runs it."""
    runs_at: tuple[int, ...]
    """The same at each of the sizes."""
    is_symbolic: bool
    """Compiled for more sizes than that one."""
    operators: int
    """Captured, before anything is fused."""
    launches: int
    """Functions that the generated code calls: generated ones and libraries'."""
    kernels: tuple[Kernel, ...]
    """In the order of the generated code."""
    inductor_bytes: int
    """Read and written by Inductor's own count, which charges a view as its whole buffer at most."""
    peak_bytes: int
    """The most that one run holds at once of what it makes, its results among it."""

    @property
    def bytes(self) -> int:
        """Read and written by one run."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Of one run."""
        return sum(kernel.flops for kernel in self.kernels)


@dataclass(frozen=True, kw_only=True)
class Break:
    """A place where capturing had to stop, and the rest became another graph."""

    reason: str
    file: str
    line: int
    code: str
    """The line's text."""


@dataclass(frozen=True, kw_only=True)
class Recompile:
    """A function that was compiled before, and had to be again."""

    function: str
    cause: str
    """The first thing that the graphs at hand do not allow for."""
    size: int
    """Which of the sizes made it."""


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """What a second start finds in the cache that the first one filled."""

    hits: int
    misses: int
    bypassed: int
    """Graphs that the cache does not take."""
    seconds: float
    """Compiling, the second time."""


@dataclass(frozen=True, kw_only=True)
class KindTotal:
    """All kernels of a kind in one call of the model."""

    kernels: int
    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model becomes when it is compiled. ``print`` it for a table."""

    device: str
    dtype: str
    scope: str
    mode: str
    attention: str
    sizes: tuple[Size, ...]
    parameters: int
    weights: Mapping[str, int]
    """Bytes of the weights and buffers by dtype, or by the type of quantized ones."""
    graphs: tuple[Graph, ...]
    breaks: tuple[Break, ...]
    recompiles: tuple[Recompile, ...]
    seconds: Mapping[str, float]
    """Compiling by phase: "dynamo" captures, "aot" prepares the graph, "inductor" lowers, fuses and writes code,
    "build" compiles that to machine code."""
    cache: CacheUse | None
    """None where nothing was built."""

    @property
    def first(self) -> tuple[Graph, ...]:
        """The graphs of the first size, which totals hold for."""
        return tuple(graph for graph in self.graphs if graph.size == 0)

    @property
    def kinds(self) -> dict[str, KindTotal]:
        """Kernels by kind in one call of the model at the first size, of what is compiled."""
        runs = [(kernel, graph.runs) for graph in self.first for kernel in graph.kernels]
        return {
            kind: KindTotal(
                kernels=sum(n for kernel, n in runs if kernel.kind == kind),
                bytes=sum(n * kernel.bytes for kernel, n in runs if kernel.kind == kind),
                flops=sum(n * kernel.flops for kernel, n in runs if kernel.kind == kind),
            )
            for kind in KINDS
            if any(kernel.kind == kind for kernel, _ in runs)
        }

    @property
    def total(self) -> KindTotal:
        """Of every kind."""
        kinds: Sequence[KindTotal] = list(self.kinds.values())
        return KindTotal(
            kernels=sum(kind.kernels for kind in kinds),
            bytes=sum(kind.bytes for kind in kinds),
            flops=sum(kind.flops for kind in kinds),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, totals included."""
        kinds = {kind: dataclasses.asdict(total) for kind, total in self.kinds.items()}
        return {
            **dataclasses.asdict(self),
            "sizes": [size._asdict() for size in self.sizes],
            "kinds": kinds,
            "total": dataclasses.asdict(self.total),
        }

    def __str__(self) -> str:
        from cogx_fast.measure.explain.text import render

        return render(self)


__all__ = ["Break", "CacheUse", "Explanation", "Graph", "Kernel", "KindTotal", "Recompile", "Size"]
