"""A budget of memory: the recipe and the layout that keep to it, with the shortest steps that are predicted."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import pytest
import torch

import cogx_fast
from cogx_fast.config import PRESETS
from cogx_fast.measure.devices import get_device
from cogx_fast.pipelines.budget import (
    RECIPE,
    BudgetError,
    Clock,
    Plan,
    by_recipe,
    choose_plan,
    describe,
    foresee,
    read_memory,
)
from cogx_fast.pipelines.memory import estimate, released
from cogx_fast.sizes import Tokens, count_tokens, default_video
from quant.apply import recipe_of
from tests.cases import for_each
from tests.conftest import report, run_cli
from tests.pipes import make_pipe

GIB = 1 << 30
H100 = get_device("h100")


def test_a_budget_is_read_or_named() -> None:
    assert (read_memory("12GB"), read_memory("11.5 GiB"), read_memory(7)) == (12 * 10**9, round(11.5 * GIB), 7)
    for wrong in ("12", "GB", "1.2.3GB", -1, 0, True):
        with pytest.raises(BudgetError, match="expected bytes"):
            cogx_fast.accelerate(None, memory=wrong)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(BudgetError, match="there is none"):
            cogx_fast.accelerate(None, memory="12GB")


@for_each("options", [{}, {"quant": None}, {"quant": "int8-weight-only"}])
def test_an_impossible_budget_leaves_the_pipeline_as_it_was(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_pipe("CogVideoXPipeline", "5b")

    def parts() -> dict[str, list[int]]:
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        return {name: [id(part), *map(id, part.parameters())] for name, part in modules.items()}

    before = parts()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100.name)
    with pytest.raises(BudgetError, match=r"too little for this pipeline at .*: it takes 1\.\d GiB or more"):
        cogx_fast.accelerate(pipe, memory=GIB + 1, **options)
    assert parts() == before


@pytest.mark.parametrize("gpu", [H100.name, "a GPU that is not described"])
def test_a_recipe_is_chosen_only_where_it_is_open_and_nothing_exact_fits(gpu: str) -> None:
    """5b has 10.4 GiB of weights in bf16; where its blocks are streamed nothing has to be quantized."""
    pipe = released(PRESETS["5b"])
    whole: dict[str, Any] = {"streams": False}  # scope="model"
    assert foresee(pipe, "12GB", gpu) is None
    assert foresee(pipe, "16GB", gpu, **whole) is None
    assert foresee(pipe, "12GB", gpu, **whole) == RECIPE
    assert foresee(pipe, "12GB", gpu, **whole, is_open=False, quant=RECIPE) is None
    with pytest.raises(BudgetError, match=r"it takes 13\.\d GiB or more"):
        foresee(pipe, "12GB", gpu, **whole, is_open=False)
    with pytest.raises(BudgetError, match=r"it takes 9\.\d GiB or more"):
        foresee(pipe, "9GB", gpu, **whole)
    torch.nn.Module.to(pipe.transformer, torch.float32)  # and what it is going to be counts
    assert foresee(pipe, "16GB", gpu) is None
    assert foresee(pipe, "16GB", gpu, **whole, dtype=torch.bfloat16) is None
    with pytest.raises(BudgetError, match="too little"):
        foresee(pipe, "16GB", gpu, **whole, is_open=False)


def plans(clock: Clock | None, *gigabytes: int) -> list[Plan | None]:
    pipe, size = released(PRESETS["5b"]), default_video(PRESETS["5b"])
    needs = by_recipe(estimate(pipe, count_tokens(PRESETS["5b"], size), size), pipe.transformer)
    return [choose_plan(needs, pipe.text_encoder, each * 10**9, clock) for each in gigabytes]


def test_the_shortest_step_that_fits_is_chosen_and_quantizing_has_to_pay() -> None:
    """Blocks are streamed where their copies hide; where they do not, half as many bytes may be faster."""
    config = PRESETS["5b"]
    tokens = count_tokens(config, default_video(config))
    found: dict[float, Any] = {}
    for speed, recipe in ((1, None), (1.95, None), (2, RECIPE), (8, RECIPE)):  # 1.97: copies make steps 1.05 × as long
        fast = dataclasses.replace(
            H100, bf16=speed * H100.bf16, bandwidth=speed * H100.bandwidth, boost_hz=speed * H100.boost_hz
        )
        clock = Clock(device=fast, config=config, tokens=tokens)
        found[speed] = plans(clock, 4, 12, 24, 80)
        assert [plan and (plan.recipe, plan.kind, plan.vae_tiling) for plan in found[speed]] == [
            None, (recipe, "model" if recipe else "blocks", True), (None, "model", False), (None, "none", False)
        ]  # fmt: skip
        for plan in found[speed][1:]:
            assert plan.step_seconds == clock.step_seconds(plan.recipe, plan.kind)
        assert clock.step_seconds("a file's", "none") is None
    few = Tokens(text=1, grid=(1, 1, 1))  # then steps are as long as weights are large
    chosen = plans(Clock(device=H100, config=config, tokens=few), 12, 24, 80)
    assert [plan and (plan.recipe, plan.kind) for plan in chosen] == [
        (RECIPE, "model"),
        (None, "model"),
        (None, "none"),
    ]
    unknown = plans(None, 4, 12, 24, 80)
    assert [each and dataclasses.replace(each, step_seconds=None) for each in found[1]] == unknown
    streamed, resident = found[1][1], found[1][3]
    assert streamed.seconds == pytest.approx(50 * resident.step_seconds + streamed.copy_seconds)
    host = (8.87 + 0.41) * GIB  # T5's encoder and the VAE
    assert streamed.copy_seconds == pytest.approx(host / 25.2e9, rel=0.02)
    assert resident.copy_seconds == 0


@pytest.mark.parametrize(("options", "recipe"), [({}, RECIPE), ({"quant": None}, None)], ids=["open", "none"])
def test_the_pipeline_gets_the_recipe_that_is_chosen(
    options: dict[str, Any], recipe: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That what is chosen then fits, tests on the stand-in for a GPU hold (tests/cuda_standin)."""
    module = sys.modules["cogx_fast.pipelines.accelerate"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100.name)
    monkeypatch.setattr(module, "foresee", lambda *_, is_open, **__: RECIPE if is_open else None)
    monkeypatch.setattr(module, "fit", lambda *_: "fitted")
    pipe = cogx_fast.accelerate(make_pipe("CogVideoXPipeline", "5b"), memory="12GB", **options)
    found = recipe_of(pipe.transformer)
    assert (found and found.name) == recipe


def test_a_plan_is_said_in_words_with_its_time_or_why_there_is_none() -> None:
    config = PRESETS["5b"]
    clock = Clock(device=H100, config=config, tokens=count_tokens(config, default_video(config)))
    (timed,), (untimed,) = plans(clock, 8), plans(None, 8)
    words = describe(timed, H100.name)
    assert "streamed and its schedule baked, VAE tiled, the text encoder in int8; predicted peaks: text 5." in words
    assert re.search(r"predicted time by the ceilings of NVIDIA H100 80GB HBM3: 0\.71 s a step and 36 s for 50,", words)
    assert "no time is predicted (" in describe(untimed, "a GPU")


@pytest.mark.parametrize("preset", ["2b", "5b"])
def test_info_says_what_is_chosen_for_cards_that_there_are(preset: str) -> None:
    facts = report(run_cli("info", preset, "--memory", "--json"))
    cards = {card["gigabytes"]: card["plan"] for card in facts["cards"]}
    small = "model" if preset == "2b" else "blocks"
    assert [cards[size]["kind"] for size in (8, 12, 80)] == [small, small, "none"]
    assert [size for size, plan in cards.items() if plan["text_int8"]] == [8]
    for size, plan in cards.items():
        assert 0 < max(plan["peaks"].values()) <= size * 10**9
        assert (plan["recipe"], plan["seconds"]) == (None, None)
    assert "12 GB" in run_cli("info", preset, "--memory").out
    timed = report(run_cli("info", preset, "--memory", "--device", "rtx4090", "--json"))["cards"]
    floor = report(run_cli("roofline", "--preset", preset, "--device", "rtx4090", "--json"))["floor_seconds"]
    for card in timed:
        assert card["plan"]["step_seconds"] == pytest.approx(floor)
        assert card["plan"]["seconds"] == pytest.approx(50 * floor + card["plan"]["copy_seconds"])
    assert "what the ceilings of rtx4090 allow" in run_cli("info", preset, "--memory", "--device", "rtx4090").out
