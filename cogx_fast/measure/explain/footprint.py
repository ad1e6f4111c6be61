"""Which elements of a buffer an access touches, exactly: sets of offsets, from an index expression and its ranges.

A set is kept as sorted, disjoint runs, and how often and how far apart all of them are repeated: so the rows of a view
of a large buffer cost one run, as contiguous ones do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy  # type: ignore[import-untyped]

MOST_ENUMERATED = 1 << 25
MOST_RUNS = 1 << 25


class TooManyOffsets(ValueError):
    """The set cannot be held; a bound must do."""


@dataclass(frozen=True)
class Runs:
    """A set of offsets: those from ``starts[i]`` up to ``ends[i]``, and all of them again at each repetition."""

    starts: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    repetitions: tuple[tuple[int, int], ...] = ()
    """(stride, times), the inner ones first, that do not reach into each other."""

    def __len__(self) -> int:
        return int((self.ends - self.starts).sum()) * math.prod(times for _, times in self.repetitions)

    @classmethod
    def of(cls, starts: Any, ends: Any) -> Runs:
        """Any runs, joined where they overlap or touch."""
        order = np.argsort(starts, kind="stable")
        starts, reached = starts[order], np.maximum.accumulate(ends[order])
        is_first = np.concatenate([[True], starts[1:] > reached[:-1]])
        last = np.concatenate([np.flatnonzero(is_first)[1:] - 1, [len(starts) - 1]])
        return cls(starts[is_first], reached[last])

    def repeated(self, stride: int, times: int) -> Runs:
        """The union of this set moved by 0, stride, 2·stride and so on."""
        if stride == 0 or times == 1:
            return self
        if not self.repetitions and len(self.starts) == 1 and stride <= self.ends[0] - self.starts[0]:
            return Runs(self.starts, self.ends + stride * (times - 1))
        reach = self.ends[-1] - self.starts[0] + sum(step * (count - 1) for step, count in self.repetitions)
        if stride >= reach:
            return dataclasses.replace(self, repetitions=(*self.repetitions, (stride, times)))
        return self.written_out()._moved(stride, times)

    def written_out(self) -> Runs:
        """The same set without repetitions."""
        runs = Runs(self.starts, self.ends)
        for stride, times in self.repetitions:
            runs = runs._moved(stride, times)
        return runs

    def _moved(self, stride: int, times: int) -> Runs:
        if len(self.starts) * times > MOST_RUNS:
            raise TooManyOffsets(f"{len(self.starts) * times} runs")
        moves = stride * np.arange(times, dtype=np.int64)[:, None]
        return Runs.of((self.starts + moves).ravel(), (self.ends + moves).ravel())


def union(sets: Iterable[Runs]) -> Runs:
    """The elements of any of the sets.

    Raises:
        TooManyOffsets: too many runs to hold.
    """
    held = list(sets)
    common: list[tuple[int, int]] = []  # the outer repetitions, which are those of the union, too
    for same, *others in zip(*(reversed(item.repetitions) for item in held), strict=False):
        if any(other != same for other in others):
            break
        common.insert(0, same)
    inner = [
        dataclasses.replace(item, repetitions=item.repetitions[: len(item.repetitions) - len(common)]).written_out()
        for item in held
    ]
    whole = Runs.of(np.concatenate([item.starts for item in inner]), np.concatenate([item.ends for item in inner]))
    for stride, times in common:
        whole = whole.repeated(stride, times)
    return whole


def offsets(index: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> Runs:
    """Every value of ``index`` while its variables run from 0 to their sizes.

    Variables that are only multiplied by a constant repeat what the others make; those inside divisions and remainders
    are tried one by one.

    Raises:
        TooManyOffsets: too many to try, or the index depends on data.
    """
    if index.free_symbols - set(sizes):
        raise TooManyOffsets(f"{index} depends on data")
    strides: dict[sympy.Symbol, int] = {}
    constant, rest = 0, sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(index)):
        coefficient, symbol = term.as_coeff_Mul()
        if term.is_Integer:
            constant += int(term)
        elif symbol in sizes:
            strides[symbol] = strides.get(symbol, 0) + int(coefficient)
        else:
            rest += term
    for symbol in rest.free_symbols & set(strides):
        rest += strides.pop(symbol) * symbol
    found = _enumerate(rest, sizes)
    for symbol, stride in sorted(strides.items(), key=lambda item: abs(item[1])):
        constant += min(0, stride * (sizes[symbol] - 1))
        found = found.repeated(abs(stride), sizes[symbol])
    return dataclasses.replace(found, starts=found.starts + constant, ends=found.ends + constant)


def _enumerate(index: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> Runs:
    # sympy would print Inductor's Identity, which only keeps an expression together, as a matrix
    index = index.replace(lambda part: type(part).__name__ == "Identity", lambda part: part.args[0])
    symbols = sorted(index.free_symbols, key=str)
    if math.prod(sizes[symbol] for symbol in symbols) > MOST_ENUMERATED:
        raise TooManyOffsets(f"{index} over {[sizes[symbol] for symbol in symbols]}")
    grids = np.meshgrid(*(np.arange(sizes[symbol], dtype=np.int64) for symbol in symbols), indexing="ij", sparse=True)
    integer = {
        "FloorDiv": lambda a, b: a // b,
        "ModularIndexing": lambda a, divisor, modulus: a // divisor % modulus,
        "Mod": lambda a, b: a % b,
        "PythonMod": lambda a, b: a % b,
    }
    values = sympy.lambdify(symbols, index, modules=[integer, "numpy"])(*grids)
    values = np.unique(np.asarray(values, dtype=np.int64))
    return Runs.of(values, values + 1)
