"""``cogx-fast quantize --search`` on the tiny pipeline: the recipe keeps its budget, a search goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import quant
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.tune import recipe as recipe_search
from tests.conftest import report, run_cli
from tests.support import small

OPTIONS = (
    "--steps", "2", "--samples", "2", "--schemes", "int8-dynamic,int8-weight-only", "--device", "cpu", "--dtype", "fp32"
)  # fmt: skip


def search(out: Path, *options: str, budget: str = "38") -> Any:
    arguments = ("quantize", "tiny", "--search", "--budget", budget, "--out", str(out), *OPTIONS, *options)
    return run_cli(*arguments, "--json")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("search") / "mixed.toml"
    return out, report(search(out))


def test_the_recipe_keeps_the_budget(searched: tuple[Path, dict[str, Any]]) -> None:
    out, found = searched
    assert found["best"]["noise_sqnr_db"] >= 38
    assert found["searched"] == 24
    assert 0 < found["best"]["quantized"] <= 24
    assert 0.5 <= found["best"]["time"] < 1
    assert len(found["linears"]) == 48
    assert found["best"] in found["tried"]
    assert 20 < found["video_psnr_db"] < 100
    recipe = quant.load_recipe(out)
    assert (recipe.name, recipe.quality["searched_on"]) == ("mixed", "tiny")
    with Image.open(found["plot"]) as picture:
        assert picture.size[0] > 500


def test_a_search_goes_on_where_it_was(
    searched: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, found = searched
    again = tmp_path / out.name
    for path in out.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = json.loads(again.with_suffix(".search.json").read_text())
    last = sorted(state["errors"])[-1]
    expected = state["errors"].pop(last)
    kept = {
        pair: {key: value * (1 + 1e-12) for key, value in errors.items()} for pair, errors in state["errors"].items()
    }
    state["errors"] = kept  # which are not what would be measured
    again.with_suffix(".search.json").write_text(json.dumps(state))
    monkeypatch.setattr(recipe_search, "calibrate", lambda *_, **__: pytest.fail("the inputs were kept"))
    resumed = report(search(again, "--no-check"))
    assert json.loads(again.with_suffix(".search.json").read_text())["errors"] == kept | {last: expected}
    assert resumed["best"] == pytest.approx(found["best"])
    assert again.read_text() == out.read_text()


def test_what_belongs_to_another_search_is_not_mixed_in(searched: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = searched
    other = tmp_path / out.name
    for path in out.parent.glob("*.calibration.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = search(other, "--prompts", "the digit one moving up")
    assert (done.status, "was recorded for something else: remove it" in done.err) == (2, True)
    other.with_suffix(".search.json").write_text('{"key": "another", "errors": {}, "mixes": {}}')
    done = search(other)
    assert (done.status, "left by a search with another model" in done.err) == (2, True)
    other.with_suffix(".search.json").write_text("{")
    done = search(other)
    assert (done.status, "not what a search left behind" in done.err) == (2, True)


def test_all_blocks_alike_make_a_recipe_for_any_depth(searched: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for path in searched[0].parent.glob("*.calibration.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = report(search(tmp_path / searched[0].name, "--by-kind", "--no-check"))
    assert {each["linear"] for each in found["linears"]} == {
        f"transformer_blocks.*.{name}" for name in ("attn1.to_qkv", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    }
    assert found["best"]["noise_sqnr_db"] >= 38
    chosen = [each for each in found["linears"] if each["chosen"]]
    assert found["best"]["quantized"] == 6 * len(chosen) > 0
    deeper = CogVideoXModel(small("5b", num_layers=3))
    planned = quant.plan(deeper, tmp_path / searched[0].name).choices
    assert sum(choice.scheme is not None for choice in planned.values()) == 3 * len(chosen)


def test_bad_options_are_named(tmp_path: Path) -> None:
    done = run_cli("quantize", "tiny", "--search", "--out", tmp_path / "a.toml")
    assert "--search needs --budget DB and --out FILE.toml" in done.err
    done = search(tmp_path / "a.toml", "--schemes", "int3")
    assert "scheme is 'int3', expected one of int8-dynamic" in done.err
    done = run_cli("quantize", "5b", "--search", "--budget", "20", "--out", tmp_path / "a.toml")
    assert done.status != 0


def test_text_says_what_was_found(searched: tuple[Path, dict[str, Any]]) -> None:
    out, found = searched
    done = run_cli("quantize", "tiny", "--search", "--budget", "38", "--out", out, *OPTIONS, "--no-check")
    assert f"{found['best']['quantized']} of 24 linears" in done.out
    assert "estimated from h100's stated ceilings" in done.out
    assert "transformer_blocks.*.ff.net.2" in done.out
