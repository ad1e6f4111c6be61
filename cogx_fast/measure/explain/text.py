"""An explanation for people: tables and lines."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cogx_fast.terminal import pairs, scaled, table

if TYPE_CHECKING:
    from cogx_fast.measure.explain.report import Explanation, KindTotal

_PHASES = {
    "dynamo": "capturing (dynamo)", "aot": "preparing (AOTAutograd)", "inductor": "fusing and writing code (inductor)",
    "build": "building machine code",
}  # fmt: skip
_MOST_LISTED = 12


def render(found: Explanation) -> str:
    """As the command line prints it."""
    sections = [_head(found), _kinds(found), _graphs(found), *_kernels(found), *_breaks(found), *_recompiles(found)]
    return "\n\n".join([*sections, _seconds(found)])


def _head(found: Explanation) -> str:
    weights = " · ".join(f"{name} {scaled(size, 'B')}" for name, size in found.weights.items())
    counts = (len(found.graphs), len(found.breaks), len(found.recompiles))
    words = [_count(number, noun) for number, noun in zip(counts, ("graph", "break", "recompile"), strict=True)]
    return pairs([
        ("compiled", f"{found.scope} scope, {found.mode or 'default'} mode, attention {found.attention}"),
        ("on", f"{found.device}, {found.dtype}"),
        ("called with", "; ".join(str(size) for size in found.sizes) + " (videos × frames × height × width)"),
        ("weights", f"{found.parameters:,} parameters: {weights}"),
        ("found", ", ".join(words)),
    ])  # fmt: skip


def _kinds(found: Explanation) -> str:
    def row(name: str, total: KindTotal) -> tuple[str, ...]:
        flops = scaled(total.flops, "FLOP") if total.flops else "–"
        return name, f"{total.kernels:,}", scaled(total.bytes, "B"), flops

    rows = [row(kind, total) for kind, total in found.kinds.items()]
    header = ("one call, what is compiled", "kernels", "read and written", "operations")
    return table(header, [*rows, row("total", found.total)], last_is_total=True)


def _graphs(found: Explanation) -> str:
    rows = [
        (
            graph.function,
            str(found.sizes[graph.size]) + (" and others" if graph.is_symbolic else ""),
            ", ".join(map(str, graph.runs_at)),
            str(graph.operators),
            str(len(graph.kernels)),
            scaled(graph.bytes, "B"),
            scaled(graph.inductor_bytes, "B"),
            scaled(graph.peak_bytes, "B"),
        )
        for graph in found.graphs
    ]
    header = ("graph", "compiled at", "runs", "operators", "kernels", "bytes a run", "Inductor's", "held at once")
    return table(header, rows)


def _kernels(found: Explanation) -> list[str]:
    """The kernels of the first size that move most, the same one of several runs or places in one line."""
    counts: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for graph in found.first:
        for kernel in graph.kernels:
            counts[kernel.kind, kernel.name] += graph.runs
            moved[kernel.kind, kernel.name] += graph.runs * kernel.bytes
    rows = [
        (f"{kind} {_short(name)}", f"{counts[kind, name]:,}", scaled(size, "B"))
        for (kind, name), size in moved.most_common(_MOST_LISTED)
    ]
    return [table(("what moves most", "times", "read and written"), rows)] if rows else []


def _short(name: str) -> str:
    words = name.removeprefix("fused_")
    return words if len(words) <= 72 else f"{words[:70]} …"


def _breaks(found: Explanation) -> list[str]:
    if not found.breaks:
        return []
    lines = [f"break   {item.file}:{item.line}   {item.code}\n        {item.reason}" for item in found.breaks]
    return ["\n".join(lines)]


def _recompiles(found: Explanation) -> list[str]:
    if not found.recompiles:
        return []
    lines = [f"recompile   {item.function} at {found.sizes[item.size]}: {item.cause}" for item in found.recompiles]
    return ["\n".join(lines)]


def _seconds(found: Explanation) -> str:
    rows = [(_PHASES[phase], f"{seconds:.2f}") for phase, seconds in found.seconds.items() if seconds]
    rows.append(("compiled afresh, in a cache of its own", f"{sum(found.seconds.values()):.2f}"))
    text = table(("compiling", "seconds"), rows, last_is_total=True)
    if found.cache is None:
        return text
    cache = found.cache
    bypassed = f", {cache.bypassed} that AOTAutograd's cache does not take" if cache.bypassed else ""
    again = f"a second start with that cache: {cache.seconds:.2f} s, {cache.hits} found, {cache.misses} not{bypassed}"
    return f"{text}\n{again}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


__all__ = ["render"]
