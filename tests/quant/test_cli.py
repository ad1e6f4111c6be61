"""``cogx-fast recipes`` and ``cogx-fast quantize``."""

from __future__ import annotations

import quant
from cogx_fast.cli.quantize import render
from quant.apply import LinearReport
from tests.conftest import report, run_cli


def test_recipes_lists_every_one_with_its_hardware():
    listed = {each["name"]: each for each in report(run_cli("recipes", "--json"))["recipes"]}
    assert tuple(listed) == quant.recipe_names()
    assert listed["fp8-dynamic"]["hardware"] == "CUDA ≥ 8.9"
    assert listed["int8-dynamic"]["hardware"] == "any device"
    text = run_cli("recipes").out
    assert all(name in text and each["description"] in text for name, each in listed.items())


def test_quantize_says_what_cannot_be(tmp_path):
    out = tmp_path / "out"
    for recipe, message in (("int9", "recipe is 'int9'"), ("fp8-dynamic", "needs CUDA ≥ 8.9")):
        finished = run_cli("quantize", "tiny", "--recipe", recipe, "--out", out)
        assert finished.status == 2
        assert message in finished.err
        assert not out.exists()


def test_the_report_for_people():
    def linear(fqn, scheme, sqnr_db, reason=None):
        after = 100 if scheme else 200
        return LinearReport(
            fqn=fqn, shape=(10, 10), scheme=scheme, reason=reason, bytes_before=200, bytes_after=after, sqnr_db=sqnr_db
        )

    lines = render(
        [
            linear("blocks.0.net.0", "int8-dynamic", 40.0),
            linear("blocks.1.net.0", "int8-dynamic", 42.0),
            linear("blocks.1.net.2", None, None, "too small"),
            linear("head", None, None, "the last"),
        ]
    ).splitlines()
    cells = [line.split() for line in lines]
    assert cells[2] == ["blocks.*.net.0", "2", "400", "B", "200", "B", "40.0", "to", "42.0", "dB", "int8-dynamic"]
    assert cells[3] == ["blocks.*.net.2", "1", "200", "B", "200", "B", "–", "–"]
    assert cells[6][:6] == ["all", "4", "800", "B", "600", "B"]
    assert lines[7:] == ["left as they are: blocks.*.net.2 (too small)", "left as they are: head (the last)"]


def test_quantize_writes_what_load_reads(tmp_path):
    import cogx_fast

    finished = run_cli("quantize", "tiny", "--recipe", "int8-weight-only", "--out", tmp_path / "out", "--json")
    done = report(finished)
    assert done["bytes_after"] < 0.6 * done["bytes_before"]
    assert len(done["linears"]) == 31
    model = cogx_fast.load(tmp_path / "out")
    assert quant.recipe_of(model) == quant.load_recipe("int8-weight-only")


def test_quantize_takes_the_nearest_when_told(tmp_path):
    finished = run_cli("quantize", "tiny", "--recipe", "fp8-dynamic", "--nearest", "--out", tmp_path / "out", "--json")
    assert {linear["scheme"] for linear in report(finished)["linears"]} == {"int8-dynamic", None}
    assert finished.err.count("\n") == 1
    assert "int8-dynamic in place of fp8-dynamic" in finished.err
