"""Which offsets an access touches, beside trying every one."""

from __future__ import annotations

import itertools

import pytest
import sympy

from cogx_fast.measure.explain import footprint
from cogx_fast.measure.explain.footprint import TooManyOffsets, offsets, union
from tests.cases import for_each

a, b, c = sympy.symbols("a b c", integer=True, nonnegative=True)
FloorDiv, ModularIndexing = sympy.Function("FloorDiv"), sympy.Function("ModularIndexing")


class Identity(sympy.Function):
    """As Inductor's: keeps an expression together, and sympy would print it as a matrix."""


def _tried(index: sympy.Expr, sizes: dict[sympy.Symbol, int]) -> set[int]:
    integer = {"FloorDiv": lambda x, d: x // d, "ModularIndexing": lambda x, d, m: x // d % m}
    function = sympy.lambdify(list(sizes), index.replace(Identity, lambda x: x), modules=[integer])
    return {int(function(*point)) for point in itertools.product(*(range(size) for size in sizes.values()))}


def _listed(runs: footprint.Runs) -> set[int]:
    runs = runs.written_out()
    return {i for start, end in zip(runs.starts.tolist(), runs.ends.tolist(), strict=True) for i in range(start, end)}


CASES = [
    (sympy.Integer(7), {}),
    (a, {a: 5}),
    (12 * a + b + 3, {a: 5, b: 4}),  # a view of part of each row
    (4 * a + b, {a: 5, b: 4}),  # rows without gaps
    (2 * a + b, {a: 5, b: 4}),  # overlapping rows
    (b, {a: 5, b: 4}),  # broadcast
    (8 * a + 2 * b - c + 1, {a: 3, b: 4, c: 2}),  # pairs exchanged
    (100 - 3 * a, {a: 7}),
    (20 * a + 4 * b + 40 * c, {a: 2, b: 5, c: 3}),
    (FloorDiv(a, 3) + 10 * b, {a: 11, b: 2}),
    (ModularIndexing(a, 1, 6) + 9 * FloorDiv(a, 6), {a: 24}),
    (a + ModularIndexing(a, 1, 2) + 50 * b, {a: 9, b: 3}),
    (Identity(FloorDiv(a, 2)) + 7 * b, {a: 9, b: 3}),
]


@for_each("index, sizes", CASES)
def test_offsets_are_those_of_trying_every_point(index: sympy.Expr, sizes: dict[sympy.Symbol, int]) -> None:
    found = offsets(index, sizes)
    expected = _tried(index, sizes)
    assert _listed(found) == expected
    assert len(found) == len(expected)


def test_a_union_counts_what_is_common_once() -> None:
    both = union([offsets(12 * a + b, {a: 5, b: 4}), offsets(12 * a + b + 2, {a: 5, b: 4})])
    assert len(both) == 5 * 6
    assert len(both.written_out().starts) == 5


@for_each("moved", [0, 1, 2, 4, 7, 10, 29, 100])
def test_a_union_is_that_of_its_elements(moved: int) -> None:
    """Also where one lies in the other's gaps, reaches into its repetitions or is repeated otherwise."""
    sizes = {a: 3, b: 4, c: 2}
    for one, other in itertools.product((30 * a + 5 * b + c, 30 * a + 2 * b, 7 * b + 3 * c, 9 * a + 7 * b), repeat=2):
        both = union([offsets(one, sizes), offsets(other + moved, sizes)])
        expected = _tried(one, sizes) | _tried(other + moved, sizes)
        assert _listed(both) == expected
        assert len(both) == len(expected)


def test_large_regular_sets_cost_little() -> None:
    assert len(offsets(9216 * a + b + 3072, {a: 35552, b: 3072})) == 35552 * 3072
    assert len(offsets(9216 * a + b + 3072, {a: 35552, b: 3072}).starts) == 1
    assert len(offsets(3072 * a + 64 * b + c, {a: 35552, b: 48, c: 64}).starts) == 1


def test_what_depends_on_data_or_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TooManyOffsets):
        offsets(a + sympy.Symbol("tmp0"), {a: 5})
    monkeypatch.setattr(footprint, "MOST_ENUMERATED", 10)
    with pytest.raises(TooManyOffsets):
        offsets(FloorDiv(a, 2), {a: 11})
    monkeypatch.setattr(footprint, "MOST_RUNS", 10)
    with pytest.raises(TooManyOffsets):
        offsets(3 * a + 10 * b, {a: 11, b: 2})
