"""Find the fastest mix of schemes whose error stays under a budget.

Errors of single linears are small and independent of each other, so that their squares nearly add. Greedily, each next
step is the one that saves the most time for the error it adds; along that order the real error of a mix is measured,
by bisection, to find how far the budget reaches, and beyond that what still fits is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quant.recipe import Recipe, Rule, of_all_blocks
from quant.sensitivity import Errors, sqnr_db

_EXACT_DB = 999.0
"""Written where nothing is lost; TOML has an infinity that JSON lacks."""

Mix = Mapping[str, str]
"""Schemes by the names of the linears that have one."""
Cost = Callable[[str, str | None], float]
"""(linear, scheme or None) -> seconds a step"""


@dataclass(frozen=True, kw_only=True)
class Move:
    """A linear from one scheme (or none) to a faster one."""

    linear: str
    scheme: str
    saves: float
    """Seconds a step."""
    adds: float
    """Relative squared error of the prediction."""

    @property
    def worth(self) -> float:
        """Seconds saved for each unit of error; what adds none comes first."""
        return math.inf if self.adds <= 0 else self.saves / self.adds


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A mix whose error was measured."""

    mix: Mix
    error: float
    """Relative squared error of the prediction."""
    seconds: float
    """Estimated, of the linears that the search is about."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: Tried
    tried: tuple[Tried, ...]
    """Every mix that was measured, by time."""


def order_moves(errors: Mapping[tuple[str, str], Errors], cost: Cost) -> list[Move]:
    """All steps worth taking, best first; a linear's later steps start from its earlier ones."""
    options: dict[str, dict[str, float]] = {}
    for (linear, scheme), error in errors.items():
        options.setdefault(linear, {})[scheme] = error.prediction
    moves = []
    for linear, schemes in options.items():
        seconds, added = cost(linear, None), 0.0
        while True:
            steps = [
                Move(linear=linear, scheme=scheme, saves=seconds - cost(linear, scheme), adds=error - added)
                for scheme, error in schemes.items()
                if cost(linear, scheme) < seconds and math.isfinite(error)
            ]
            if not steps:
                break
            move = max(steps, key=lambda step: (step.worth, step.saves))
            moves.append(move)
            seconds, added = seconds - move.saves, added + move.adds
    return sorted(moves, key=lambda move: move.worth, reverse=True)  # stable: a linear's steps stay in order


def search(
    moves: Sequence[Move], cost: Cost, evaluate: Callable[[Mix], float], *, budget: float, extra: int = 8
) -> Found:
    """The fastest mix whose measured error is within the budget.

    Args:
        moves: from ``order_moves``.
        cost: of a linear.
        evaluate: measures a mix's relative squared error.
        budget: the largest error allowed, as a relative squared error.
        extra: how many further steps are tried behind where the budget ends.

    Returns:
        The mix, which is empty if not even the first step fits, and all that was measured.
    """
    tried: dict[tuple[tuple[str, str], ...], Tried] = {}

    def attempt(mix: Mix) -> Tried:
        key = tuple(sorted(mix.items()))
        if key not in tried:
            error = evaluate(mix) if mix else 0.0
            linears = {move.linear for move in moves}
            tried[key] = Tried(mix=mix, error=error, seconds=sum(cost(name, mix.get(name)) for name in linears))
        return tried[key]

    fits, fails = 0, len(moves) + 1
    while fails - fits > 1:
        # everything first: often it fits; then halves
        middle = len(moves) if fails > len(moves) else (fits + fails) // 2
        if attempt(_apply(moves[:middle])).error <= budget:
            fits = middle
        else:
            fails = middle
    best = attempt(_apply(moves[:fits]))
    skipped = {move.linear for move in moves[fits : fits + 1]}
    attempts = 0
    for move in moves[fits + 1 :]:
        if attempts == extra:
            break
        if move.linear in skipped or best.error + move.adds > budget:
            skipped.add(move.linear)  # its later steps start from this one
            continue
        attempts += 1
        further = attempt({**best.mix, move.linear: move.scheme})
        if further.error <= budget:
            best = further
        else:
            skipped.add(move.linear)
    return Found(best=best, tried=tuple(sorted(tried.values(), key=lambda each: each.seconds)))


def to_recipe(
    base: Recipe, found: Tried, searched: Sequence[str], *, name: str, model: str, budget_db: float
) -> Recipe:
    """A mix as a recipe: a rule for each scheme, the reason for the rest, and base's own reasons to skip.

    Args:
        base: the recipe whose quantized linears were searched over.
        found: the mix and its error.
        searched: all linears that could have had a scheme.
        name: of the recipe.
        model: what it was found with, for the description.
        budget_db: what was allowed, as SQNR of the prediction in dB.
    """
    groups: dict[str | None, list[str]] = {}
    for linear in searched:
        groups.setdefault(found.mix.get(linear), []).append(linear)
    rest = groups.pop(None, [])
    rules = [Rule(match=_patterns(names, searched), scheme=scheme) for scheme, names in sorted(groups.items())]
    if rest:
        rules.append(Rule(match=_patterns(rest, searched), skip="its error did not fit into the budget of the search"))
    measured = min(sqnr_db(found.error), _EXACT_DB)
    return Recipe(
        name=name,
        description=f"found for {model}: predicted noise at {measured:.1f} dB SQNR, {budget_db:g} asked for",
        rules=(*rules, *(rule for rule in base.rules if rule.scheme is None)),
        quality={"searched_on": model, "noise_sqnr_db": round(measured, 2)},
    )


def _patterns(names: Sequence[str], searched: Sequence[str]) -> tuple[str, ...]:
    """The names, with one pattern in place of those of all blocks."""
    wide = {name: of_all_blocks(name) for name in searched}
    outside = {wide[name] for name in searched if name not in set(names)}
    return tuple(dict.fromkeys(name if wide[name] in outside else wide[name] for name in names))


def _apply(moves: Sequence[Move]) -> dict[str, str]:
    return {move.linear: move.scheme for move in moves}


__all__ = ["Cost", "Found", "Mix", "Move", "Tried", "order_moves", "search", "to_recipe"]
