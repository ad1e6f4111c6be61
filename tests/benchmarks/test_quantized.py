"""The recipes' quality on the tiny pipeline: the measurement runs, and the recorded figures hold their bars."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import quant
from benchmarks.tiny import quantized
from cogx_fast.video import quality
from quant.recipe import SHIPPED


def accuracy(digit: float, motion: float = 1.0) -> quality.Accuracy:
    return quality.Accuracy(
        count=50, digit=digit, motion=motion, frame_agreement=1.0, digit_by_motion={}, digit_by_digit={}
    )


def test_a_recipe_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "DTYPE", torch.float32)  # which every CPU computes quickly
    out = tmp_path / "figures.json"
    status = quantized.main(["int8-weight-only", "--steps", "1", "--prompts", "2", "--out", str(out)])
    before, found = json.loads(out.read_text())
    assert (before["recipe"], found["recipe"]) == ("bf16", "int8-weight-only")
    assert 30 < found["worst_psnr_db"] < found["psnr_db"] < 80
    assert status == int(not found["passed"])
    assert "int8-weight-only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "psnr_db", "digit", "holds"),
    [
        ("int8-weight-only", 35.1, 0.97, True), ("int8-weight-only", 34.9, 0.99, False),
        ("int8-dynamic", 28.1, 0.97, True), ("int8-dynamic", 27.9, 0.99, False), ("int8-dynamic", 40.0, 0.96, False),
    ],
)  # fmt: skip
def test_the_bars(name: str, psnr_db: float, digit: float, holds: bool) -> None:
    assert (
        quantized.passed(quant.load_recipe(name), psnr_db, accuracy(digit), accuracy(0.985)) is np.bool_(holds).item()
    )


def test_figures_are_written_into_the_recipe_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "int8-dynamic.toml"
    path.write_text((SHIPPED / "int8-dynamic.toml").read_text(encoding="utf-8"), encoding="utf-8")
    for psnr in (41.04, 42.0):
        row = {"psnr_db": psnr, "digit": 0.98, "motion": 1.0}
        quantized.write(quant.load_recipe(path), row, accuracy(0.99))
    written = quant.load_recipe(path)
    assert written.quality == {
        "measured_on": "tiny, all prompts, 50 steps, against bf16", "psnr_db": 42.0, "digit": 0.98, "motion": 1.0,
        "digit_bf16": 0.99,
    }  # fmt: skip
    shipped = quant.load_recipe("int8-dynamic")
    assert (written.rules, written.requires, written.description) == (
        shipped.rules,
        shipped.requires,
        shipped.description,
    )


def test_shipped_figures_hold_the_bars() -> None:
    for name in set(quant.recipe_names()) - {"int4-weight-only"}:  # which no CPU runs
        recipe = quant.load_recipe(name)
        assert recipe.quality is not None, name
        found = accuracy(recipe.quality["digit"], recipe.quality["motion"])
        assert quantized.passed(recipe, recipe.quality["psnr_db"], found, accuracy(recipe.quality["digit_bf16"])), name


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_every_recipe_holds_its_bars() -> None:
    assert quantized.main([]) == 0
