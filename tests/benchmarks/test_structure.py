"""The table of what the compiler makes holds, and a regression of each kind is caught and explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gate, structure
from benchmarks.structure import CASES, Case
from cogx_fast.measure.explain import Explanation
from tests.benchmarks import planted

pytestmark = pytest.mark.timeout(900)  # one test waits for every case
BLOCK = CASES["5b/block/bf16/sdpa"]


@pytest.fixture(scope="module")
def found() -> dict[str, Explanation]:
    """Every gated case, measured."""
    return {name: structure.measure(case) for name, case in CASES.items()}


def test_the_recorded_table_holds(found: dict[str, Explanation]) -> None:
    verdict = structure.check(found)
    if verdict.not_binding:
        pytest.skip(verdict.not_binding)
    assert verdict.passed, f"\n{verdict}\nor: make perf-accept"


def test_every_case_is_recorded_with_its_kernels() -> None:
    recorded = {row.case for row in gate.read(structure.EXPECTED).values()}
    assert recorded == {gate.VERSIONS, *CASES}
    kernels = structure._read_kernels(structure.EXPECTED)
    assert kernels.keys() == CASES.keys()
    assert all(len(lines) > 10 for lines in kernels.values())


# -- planted regressions -----------------------------------------------------------------------------------------------


def _copy(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.to_out[0] = planted._Copy(block.attn1.to_out[0])


def _defuse(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1 = _with_backend(planted._Defused(block.attn1), block.attn1)


def _upcast(model: Any) -> None:
    for block in model.transformer_blocks:
        block.ff = planted._Upcast(block.ff)


def _break(model: Any) -> None:
    for block in model.transformer_blocks:
        block.ff.register_forward_hook(_breaking_hook)


def _breaking_hook(module: Any, arguments: Any, output: Any) -> None:
    torch._dynamo.graph_break()


def _with_backend(module: Any, attention: Any) -> Any:
    module.backend = attention.backend  # what the model asks of its attentions
    return module


@pytest.fixture(scope="module")
def good() -> Explanation:
    return structure.measure(BLOCK, sizes=1)


def test_measuring_again_finds_the_same(found: dict[str, Explanation], good: Explanation) -> None:
    assert structure.metrics(good) == structure.metrics(found[BLOCK.name])  # sizes are symbolic: one says the same
    assert structure.kernels(good) == structure.kernels(found[BLOCK.name])


@pytest.mark.parametrize(
    ("plant", "grown", "words"),
    [
        (_break, {"graphs", "breaks"}, "+break: Call to `torch._dynamo.graph_break()`"),
        (_copy, {"copy", "launches", "bytes"}, "+  copy fused_clone"),
        (
            _defuse,
            {"bytes", "inductor_bytes"},
            "+  pointwise fused__scaled_dot_product_flash_attention_for_cpu__to_copy_add_flip",
        ),
        (_upcast, {"bytes", "peak_activation_bytes"}, "+  "),
    ],
)
def test_a_planted_regression_fails_and_is_explained(
    good: Explanation, tmp_path: Path, plant: Callable[[Any], None], grown: set[str], words: str
) -> None:
    table = tmp_path / "structure.csv"
    structure.accept({BLOCK.name: good}, table)
    assert structure.check({BLOCK.name: good}, table).passed
    model = BLOCK.model()
    plant(model)
    verdict = structure.check({BLOCK.name: structure.measure(BLOCK, model, sizes=1)}, table)
    assert grown <= {entry.split(":")[0].split()[-1] for entry in verdict.regressions}, str(verdict)
    assert any(words in note for note in verdict.notes), str(verdict)
    assert f"  {BLOCK.name},{sorted(grown)[0]}," in str(verdict)  # the row that would replace it


def test_a_missing_row_fails(good: Explanation, tmp_path: Path) -> None:
    table = tmp_path / "structure.csv"
    structure.accept({BLOCK.name: good}, table)
    table.write_text("".join(line for line in table.read_text().splitlines(keepends=True) if ",copy," not in line))
    verdict = structure.check({BLOCK.name: good}, table)
    assert verdict.missing == [f"{BLOCK.name} copy is 3"]
    assert structure.check({"another": good}, table).missing


def test_an_unclaimed_win_fails(good: Explanation, tmp_path: Path) -> None:
    table = tmp_path / "structure.csv"
    structure.accept({BLOCK.name: good}, table)
    text = table.read_text()
    held = structure.metrics(good)["bytes"]
    table.write_text(text.replace(f",bytes,{held},", f",bytes,{held + 1000},"))
    verdict = structure.check({BLOCK.name: good}, table)
    assert [entry.split(":")[0] for entry in verdict.wins] == [f"{BLOCK.name} bytes"]


def test_a_recompile_more_is_a_regression(good: Explanation, tmp_path: Path) -> None:
    table = tmp_path / "structure.csv"
    structure.accept({BLOCK.name: good}, table)
    pinned = Case(variant="5b", dynamic=False)
    verdict = structure.check({BLOCK.name: structure.measure(pinned)}, table)
    assert any("recompiles:" in entry for entry in verdict.regressions), str(verdict)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(
    good: Explanation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(structure, "measure", lambda case: good)
    for function in (structure.check, structure.accept):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "structure.csv",))
    only = ["--only", BLOCK.name]
    assert structure.main([*only, "--check"]) == 1
    assert f"NO ROW: {BLOCK.name} graphs is 3" in capsys.readouterr().out
    assert structure.main([*only, "--accept", "--json", str(tmp_path / "found.json")]) == 0
    assert structure.main([*only, "--check"]) == 0
    assert structure.main(["--only", "nothing"]) == 2
