"""Step schedules: what they hold, their files, and where they come from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import cogx_fast
from cogx_fast.attention.plan import hash_config
from cogx_fast.config import PRESETS
from cogx_fast.runtime.step_caching.step_schedule import NAMED, StepCacheError, StepSchedule
from cogx_fast.runtime.step_caching.step_schedule_file import (
    choose_strategy,
    read_schedule,
    render_schedule,
    write_schedule,
)
from tests.cases import for_each
from tests.runtime.generations import LAYERS, counted, generate, make, schedule, timesteps


@for_each("name", NAMED, "steps", [20, 50])
def test_named_schedules_compute_so_many_times_fewer_blocks(name: str, steps: int) -> None:
    config = PRESETS["5b"]
    model: Any = type("Model", (), {"transformer_blocks": [None] * config.num_layers})
    made = NAMED[name].schedule(model, list(range(steps, 0, -1)))
    assert made.steps == steps
    assert made.blocks[0] == made.blocks[-1] == config.num_layers
    assert made.speedup == pytest.approx(NAMED[name].speedup, rel=0.1)


def test_teacache_skips_what_its_rule_skips() -> None:
    """The rule as its authors' loop has it, on the model's own embedding."""
    model = make(num_attention_heads=2)
    steps = timesteps(30)
    chosen: Any = choose_strategy("teacache:0.2", model.config)
    made = chosen.schedule(model, steps.tolist())
    coefficients = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)
    whole, added, before = [], 0.0, None
    for index, timestep in enumerate(steps):
        with torch.no_grad():
            emb = model.time_embedding(timestep[None], torch.float32)
        if before is None or index == len(steps) - 1:
            whole.append(True)
            added = 0.0
        else:
            change = ((emb - before).abs().mean() / before.abs().mean()).item()
            added += sum(c * change ** (4 - power) for power, c in enumerate(coefficients))
            whole.append(added >= 0.2)
            added = 0.0 if whole[-1] else added
        before = emb
    assert [count == LAYERS for count in made.blocks] == whole
    assert set(made.blocks) == {0, LAYERS}


def test_first_block_skips_where_its_threshold_allows() -> None:
    model = make()
    model.set_step_cache("first-block:1e9")
    assert counted(model, timesteps(4)) == [4, 1, 1, 1]
    model = make()
    model.set_step_cache("first-block:0")
    assert counted(model, timesteps(4)) == [4, 4, 4, 4]


def test_a_schedule_survives_its_file(tmp_path: Path) -> None:
    several = (
        schedule(4, 1),
        schedule(4, 0, forecast="linear", config_hash="0f", error=0.25, origin='say "é"\n'),
        schedule(4, 0, forecast="fitted", weights=((), (1.0, -0.25)), unconditional=(1, 0), timesteps=(999, 3)),
    )
    for made in several:
        write_schedule(made, tmp_path / "s.toml")
        assert read_schedule(tmp_path / "s.toml") == made
        assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


@for_each("old, new, message", [
    ("format = 1", "format = 2", "format is 2"), ("[4, 1]", "[1, 1]", "first step"), ("[4, 1]", "[4, 9]", "0 to 4"),
    ("[4, 1]", "[4, true]", "whole numbers"), ("[4, 1]", "[]", "needs a step"), ("[4, 1]", "4", "whole numbers"),
    ('"reuse"', '"magic"', "forecast is 'magic'"), ("num_layers = 4", "layers = 4", "unknown keys layers"),
    ("num_layers = 4", "", "num_layers is missing"), ("num_layers = 4", 'num_layers = "4"', "expected a int"),
    ("format = 1", "format = ", "Invalid value"),
    ("format = 1", "format = 1\nunconditional = [1]", "unconditional"),
    ("format = 1", "format = 1\nunconditional = [1, 1]", "step 1 is not whole"),
    ("format = 1", "format = 1\nunconditional = [0, 0]", "one half of the batch"),
    ("format = 1", "format = 1\nweights = [[], [1.0]]", "weights go with"),
    ('"reuse"', '"fitted"', "weights go with"),
    ('"reuse"', '"fitted"\nweights = [[], []]', "step 1 has the weights"),
    ('"reuse"', '"fitted"\nweights = [[], [nan]]', "step 1 has the weights"),
    ('"reuse"', '"fitted"\nweights = [[], ["1"]]', "list of numbers"),
    ("format = 1", "format = 1\ntimesteps = [9]", "1 timesteps for 2 steps"),
])  # fmt: skip
def test_damaged_files_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = render_schedule(schedule(4, 1))
    assert old in text
    (tmp_path / "s.toml").write_text(text.replace(old, new))
    with pytest.raises(StepCacheError, match=message):
        cogx_fast.load(tmp_path / "nothing there", step_cache=tmp_path / "s.toml")  # before anything is loaded


@for_each("value, message", [
    ("slow", "'slow', expected quality, balanced"), ("teacache:much", "a number"), ("teacache:-1", "a number"),
    ("mask:1,2", "a 0 or 1"), ("mask:", "a 0 or 1"), ("mask:0,1", "begin with 1"), (7, "is a int"),
])  # fmt: skip
def test_what_is_no_step_cache_is_refused_before_anything_is_loaded(value: Any, message: str) -> None:
    with pytest.raises(StepCacheError, match=message):
        cogx_fast.load("nothing there", step_cache=value)


def test_another_models_schedule_is_refused() -> None:
    model = make()
    with pytest.raises(StepCacheError, match="3 layers"):
        model.set_step_cache(StepSchedule(blocks=(3, 1), num_layers=3))
    model.set_step_cache(schedule(4, 1, config_hash=hash_config(model.config)))
    with pytest.raises(StepCacheError, match="another configuration"):
        model.set_step_cache(schedule(4, 1, config_hash="0f"))


def test_another_number_of_steps_adapts_a_schedule_and_refuses_a_mask() -> None:
    model = make()
    model.set_step_cache(schedule(4, 4, 1, 1, 4))
    with pytest.warns(UserWarning, match="for 5 steps .* in 9"):
        assert counted(model, timesteps(9)) == [4, 4, 4, 1, 1, 1, 1, 4, 4]
    model = make()
    model.set_step_cache("mask:1,0,1")
    with pytest.raises(StepCacheError, match=r"3 steps .* in 4"):
        generate(model, timesteps(4))


def test_another_schedulers_timesteps_are_told() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 4, timesteps=tuple(timesteps(3).tolist())))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(model, timesteps(3))
        generate(model, timesteps(3).float())
    with pytest.warns(UserWarning, match="timesteps from 999 to 1 .* spaced in another way"):
        generate(model, torch.tensor([999, 700, 1]))
