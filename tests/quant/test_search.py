"""Sensitivities are what they say; the search keeps its budget and finds what brute force finds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import quant
from quant import search, sensitivity
from quant.recipe import parse_recipe
from quant.schemes import SCHEMES
from quant.search import Move, Tried, order_moves, to_recipe
from quant.sensitivity import Errors, measure, prediction_error, quantized, references, sqnr_db
from tests.cases import for_each

RECIPE = parse_recipe(
    'name = "base"\ndescription = "d"\n[[rule]]\nmatch = "blocks.*.*"\nscheme = "int8-dynamic"\n'
    '[[rule]]\nmatch = "last"\nskip = "the last one"\n'
)


class Toy(nn.Module):
    """Two blocks of two linears and one more; the second block's output hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(2)])
        self.last = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (block[1](block[0](x)) for block in self.blocks)
        return self.last(first + 0.01 * second)


def call(model: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
    return model(sample["x"])


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy().eval()


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]


NAMES = [f"blocks.{block}.{index}" for block in range(2) for index in range(2)]


def test_an_error_is_that_of_the_model_with_this_linear_quantized(toy: Toy, samples: list) -> None:
    found = measure(toy, samples, {NAMES[1]: ["int8-weight-only", "fp8-weight-only"]}, RECIPE, call=call)
    assert list(found) == [(NAMES[1], "int8-weight-only"), (NAMES[1], "fp8-weight-only")]
    other = Toy().eval()
    rules = f'name = "t"\ndescription = "d"\n[[rule]]\nmatch = "{NAMES[1]}"\nscheme = "fp8-weight-only"\n'
    quant.quantize(other, parse_recipe(rules))
    with torch.no_grad():
        wrong = sum((call(other, s) - call(toy, s)).square().sum().item() for s in samples)
        size = sum(call(toy, s).square().sum().item() for s in samples)
        inside = [toy.blocks[0][0](s["x"]) for s in samples]
        own = sum((other.blocks[0][1](x) - toy.blocks[0][1](x)).square().sum().item() for x in inside)
        own /= sum(toy.blocks[0][1](x).square().sum().item() for x in inside)
    errors = found[NAMES[1], "fp8-weight-only"]
    assert errors.prediction == pytest.approx(wrong / size, rel=1e-4)
    assert errors.own == pytest.approx(own, rel=1e-4)
    assert errors.prediction > found[NAMES[1], "int8-weight-only"].prediction  # 3 bits of mantissa against 7


def test_afterwards_the_weights_are_the_very_same(toy: Toy, samples: list) -> None:
    before = dict(toy.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    with quantized(toy, dict.fromkeys(NAMES, "int8-dynamic"), RECIPE):
        assert type(toy.blocks[0][0].weight) is not nn.Parameter
    measure(toy, samples, {name: ["int8-dynamic"] for name in NAMES}, RECIPE, call=call)
    with pytest.raises(RuntimeError):  # from within the model
        prediction_error(toy, {NAMES[0]: "int8-dynamic"}, [{"x": torch.zeros(1, 3)}], [torch.zeros(1)], RECIPE, call)
    after = dict(toy.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_what_is_known_is_not_measured_again(toy: Toy, samples: list) -> None:
    known = {(NAMES[0], "int8-dynamic"): Errors(own=1.0, prediction=2.0)}
    seen: list[tuple[int, int]] = []
    candidates = {NAMES[0]: ["int8-dynamic"], NAMES[2]: ["int8-dynamic"]}
    found = measure(
        toy, samples, candidates, RECIPE, known=known, call=call, on_measured=lambda done, n: seen.append((done, n))
    )
    assert found is known
    assert found[NAMES[0], "int8-dynamic"] == Errors(own=1.0, prediction=2.0)
    assert found[NAMES[2], "int8-dynamic"].prediction < 1e-5
    assert seen == [(1, 2), (2, 2)]


def test_fp8_is_emulated_where_it_cannot_run_and_the_impossible_is_refused(samples: list) -> None:
    toy = Toy().eval().bfloat16()  # fp8 matmul is for bf16
    samples = [{"x": sample["x"].bfloat16()} for sample in samples]
    assert sensitivity.is_measurable("fp8-dynamic", toy, NAMES[0])
    assert not sensitivity.is_measurable("int4-weight-only", toy, NAMES[0])
    error = prediction_error(toy, {NAMES[0]: "fp8-dynamic"}, samples, references(toy, samples, call), RECIPE, call)
    assert 20 < sqnr_db(error) < 40
    with (
        pytest.raises(quant.QuantError, match=r"blocks.0.0: int4-weight-only can be neither run nor emulated"),
        quantized(toy, {NAMES[0]: "int4-weight-only"}, RECIPE),
    ):
        pass
    with pytest.raises(quant.QuantError, match="nowhere is no linear"):
        measure(toy, samples, {"nowhere": ["int8-dynamic"]}, RECIPE, call=call)


def test_decibels() -> None:
    assert sqnr_db(0.001) == pytest.approx(30)
    assert sqnr_db(0.0) == math.inf


# -- the search --------------------------------------------------------------------------------------------------------

ERRORS = {  # relative squared errors that add, as in a made-up model
    ("a", "fast"): Errors(own=0, prediction=8e-3), ("a", "slow"): Errors(own=0, prediction=1e-3),
    ("b", "fast"): Errors(own=0, prediction=2e-3), ("b", "slow"): Errors(own=0, prediction=1.9e-3),
    ("c", "fast"): Errors(own=0, prediction=1e-4), ("c", "slow"): Errors(own=0, prediction=math.inf),
    ("d", "fast"): Errors(own=0, prediction=0.5), ("d", "slow"): Errors(own=0, prediction=3e-4),
}  # fmt: skip
SIZES = {"a": 5.0, "b": 3.0, "c": 1.0, "d": 2.0}


def cost(linear: str, scheme: str | None) -> float:
    return SIZES[linear] * {None: 1.0, "slow": 0.8, "fast": 0.5}[scheme]


def error_of(mix: Mapping[str, str]) -> float:
    return sum(ERRORS[pair].prediction for pair in mix.items())


def test_steps_are_in_order_of_worth_and_each_starts_from_the_one_before() -> None:
    moves = order_moves(ERRORS, cost)
    assert [move.worth for move in moves] == sorted((move.worth for move in moves), reverse=True)
    assert [move.scheme for move in moves if move.linear == "a"] == ["slow", "fast"]
    assert [move.scheme for move in moves if move.linear == "b"] == ["fast"]  # slow adds as much and saves less
    assert sum(move.saves for move in moves) == pytest.approx(sum(SIZES.values()) / 2)
    assert not any(move.linear == "c" and move.scheme == "slow" for move in moves)
    assert Move(linear="x", scheme="y", saves=1, adds=-1).worth == math.inf


@for_each("budget", [0.0, 1e-4, 5e-4, 2e-3, 3e-3, 4e-3, 9e-3, 1e-2, 0.02, 1.0])
def test_the_budget_is_kept_and_the_best_mix_nearly_found(budget: float) -> None:
    found = search.search(order_moves(ERRORS, cost), cost, error_of, budget=budget)
    assert error_of(found.best.mix) <= budget
    options = [[None, "slow", "fast"]] * 4
    every = [
        {name: scheme for name, scheme in zip("abcd", choice, strict=True) if scheme}
        for choice in itertools.product(*options)
    ]
    least = min(sum(cost(n, mix.get(n)) for n in "abcd") for mix in every if error_of(mix) <= budget)
    assert found.best.seconds <= least + 0.1 * sum(SIZES.values())  # greedy, at most one step behind
    assert found.best in found.tried
    assert [each.seconds for each in found.tried] == sorted(each.seconds for each in found.tried)


def test_errors_that_do_not_add_are_measured_not_believed() -> None:
    found = search.search(order_moves(ERRORS, cost), cost, lambda mix: 3 * error_of(mix), budget=9e-3)
    assert 3 * error_of(found.best.mix) <= 9e-3
    assert found.best.mix


def test_a_mix_becomes_a_recipe_for_the_model(toy: Toy) -> None:
    mix = {NAMES[0]: "int8-dynamic", NAMES[2]: "int8-dynamic", NAMES[3]: "fp8-weight-only"}
    best = Tried(mix=mix, error=1e-3, seconds=1.0)
    recipe = to_recipe(RECIPE, best, NAMES, name="mixed", model="toy", budget_db=29)
    assert "30.0 dB SQNR, 29 asked for" in recipe.description
    assert [rule.match for rule in recipe.rules if rule.scheme == "int8-dynamic"] == [("blocks.*.0",)]
    assert parse_recipe(recipe.to_toml()) == recipe
    planned = quant.plan(toy, recipe).choices
    assert {name: choice.scheme for name, choice in planned.items()} == {
        NAMES[0]: "int8-dynamic", NAMES[1]: None, NAMES[2]: "int8-dynamic", NAMES[3]: "fp8-weight-only", "last": None,
    }  # fmt: skip
    assert planned["last"].reason == "the last one"
    assert "did not fit into the budget" in str(planned[NAMES[1]].reason)
    assert set(recipe.schemes) <= set(SCHEMES)


def test_nothing_that_fits_is_a_recipe_too(toy: Toy) -> None:
    found = search.search(order_moves(ERRORS, cost), cost, lambda mix: 1.0, budget=0.0)
    assert found.best.mix == {}
    recipe = to_recipe(RECIPE, Tried(mix={}, error=0.0, seconds=1.0), NAMES, name="none", model="toy", budget_db=60)
    assert all(choice.scheme is None for choice in quant.plan(toy, recipe).choices.values())
