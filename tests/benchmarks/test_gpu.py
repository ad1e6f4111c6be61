"""The battery on the CPU: every line of it, with defects planted that must cost only themselves."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as battery
from benchmarks.gpu import cases, models, pool, report, steps, wheels, worker
from cogx_fast.model.backends import BACKENDS
from cogx_fast.runtime.plan import BUILT_IN
from tests.conftest import run_cli

STEPS = r"tiny/ours/sdpa/block$|tiny/diffusers/(eager|model|model/fp8-row)$"
ONLY = rf"ceiling|planted|attention/tiny/(sdpa|sdpa-cudnn)$|{STEPS}"


@dataclasses.dataclass(frozen=True)
class Ran:
    out: Path
    text: str
    status: int

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        cases_found = json.loads((self.out / "results.json").read_text())["cases"]
        return {result["case"]: result for result in cases_found}

    @property
    def rows(self) -> dict[str, dict[str, str]]:
        with (self.out / "results.csv").open() as file:
            return {row["case"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp("battery")
    plants = [word for plant in cases.PLANTS for word in ("--plant", plant)]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--only", ONLY, "--out", str(out)]
    child = subprocess.run([*command, *plants], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    return Ran(out, child.stdout, child.returncode)


def test_a_failing_and_a_hanging_case_cost_only_themselves(ran: Ran) -> None:
    assert ran.status == 0
    assert ran.results["planted/failing"]["status"] == "failed"
    assert "RuntimeError: planted" in ran.results["planted/failing"]["error"]
    assert "Traceback" in ran.results["planted/failing"]["log"]
    hanging = ran.results["planted/hanging"]
    assert hanging["status"] == "timeout"
    assert 3 <= hanging["seconds"] < 60  # it would hang for an hour
    others = {name: result["status"] for name, result in ran.results.items() if not name.startswith("planted/")}
    assert {others.pop(name) for name in ("tiny/diffusers/model/fp8-row", "attention/tiny/sdpa-cudnn")} == {
        "unsupported"
    }
    assert set(others.values()) == {"done"}


def test_nothing_is_timed_on_red(ran: Ran) -> None:
    red = ran.results["planted/wrong"]
    assert red["status"] == "red"
    assert red["error_fp32"] > 0.1 > worker.LIMIT_EXACT * red["error_diffusers"]
    assert "seconds_step" not in red
    assert ran.rows["planted/wrong"]["ms_p50"] == ""
    assert f"RED: planted/wrong: its error against fp32 is {red['error_fp32']:.2e}" in ran.text


def test_every_case_has_its_figures(ran: Ran) -> None:
    peer = ran.rows["tiny/diffusers/model"]
    assert float(peer["ratio_to_compiled_peer"]) == 1
    for name in ("tiny/ours/sdpa/block", "tiny/diffusers/eager", "tiny/diffusers/model"):
        row = ran.rows[name]
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p80"])
        ratio = float(row["ms_p50"]) / float(peer["ms_p50"])
        assert float(row["ratio_to_compiled_peer"]) == pytest.approx(ratio)
        for column in ("tflops", "share_of_bf16_ceiling", "peak_gib", "compile_cold_s", "compile_warm_s", "error_fp32"):
            assert float(row[column]) > 0
        assert all(sum(found["kernels"].values()) > 0 for found in ran.results[name]["by_layers"])
        assert float(row["error_fp32"]) < worker.LIMIT_EXACT * float(row["error_diffusers"])
    assert ran.rows["tiny/diffusers/model"]["extrapolated"] == "True"
    assert ran.rows["tiny/ours/sdpa/block"]["extrapolated"] == "False"


def test_results_end_with_a_table_and_lie_in_files(ran: Ran) -> None:
    lines = ran.text.splitlines()
    assert "error: relative, of one layer's model, against fp32" in ran.text.split("\n\n")[-1]
    assert any(line.startswith("tiny/ours/sdpa/block ") for line in lines[-12:])
    assert "THE TIMES MEAN NOTHING" in ran.text  # nobody shall take them for a result
    assert "UNSUPPORTED here: tiny/diffusers/model/fp8-row, attention/tiny/sdpa-cudnn" in lines
    assert {path.name for path in ran.out.iterdir()} == {
        "results.json", "results.csv", "ceilings.json", "ratios.png", "kernels.png", "roofline.png"
    }  # fmt: skip
    assert set(json.loads((ran.out / "ceilings.json").read_text())) == {"bf16", "fp8", "int8", "bandwidth"}
    roofline = ("roofline", "--preset", "5b", "--device", "h100", "--ceilings", ran.out / "ceilings.json")
    assert "measured bf16" in run_cli(*roofline).out


# ------------------------------------------------------------------------------------------------------------- planning


def test_every_backend_and_recipe_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "recipe_names", lambda: ["fp8-dynamic", "int4-weight-only"])
    planned = cases.plan(models=["5b", "2b", "1.5-5b"], quick=False)
    names = [case.name for case in planned]
    assert len(set(names)) == len(names)
    for model in ("5b", "2b", "1.5-5b"):
        ours = [case for case in planned if case.model == model and case.kind == "step" and case.owner == cases.OURS]
        assert {case.attention for case in ours} == set(BACKENDS)
        assert {case.quant for case in ours} == {"", "fp8-dynamic", "int4-weight-only"}
        assert {case.scope for case in ours} == {"eager", "block", "model"}
        assert {f"{model}/diffusers/eager", f"{model}/diffusers/model", f"{model}/diffusers/model/fp8-row"} <= set(
            names
        )
    first = next(case for case in planned if case.kind == "step")
    assert (first.model, first.layers, first.extrapolated) == ("5b", (42,), False)
    assert next(case for case in planned if case.name == "5b/diffusers/model").extrapolated
    full = cases.plan(models=["5b"], quick=False, full=True)
    assert not next(case for case in full if case.name == "5b/diffusers/model").extrapolated


def test_sparse_plans_are_right_where_they_are_dense_and_timed_where_they_are_sparse() -> None:
    chosen = {case.name: case for case in cases.plan(models=["5b"], quick=False)}
    case = chosen["5b/ours/flex/radial/block"]
    assert (case.layers, case.attention_plan) == ((42,), "radial")
    assert "5b/ours/flex/tiles/block" in chosen
    case = dataclasses.replace(case, model="tiny", quick=True)
    threshold = BUILT_IN["radial"](case.config).dense_above
    cpu = torch.device("cpu")
    assert models.arguments(case, torch.float32, cpu)["timestep"].max() < threshold
    assert models.arguments(case, torch.float32, cpu, dense=True)["timestep"].min() >= threshold
    upstream = models.upstream(case.config, torch.float32, cpu)
    eager = dataclasses.replace(case, scope="eager")
    assert models.prepare(eager, upstream).attention_plan == BUILT_IN["radial"](case.config)


def test_the_sizes_are_the_real_ones() -> None:
    tokens = {model: cases.Case(name="", kind="step", limit=1, model=model).tokens.joint for model in cases.MODELS}
    assert tokens == {"2b": 17_776, "5b": 17_776, "1.5-5b": 45_106}


def test_the_budget_ends_it_and_the_rest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run(case: cases.Case, device: str, *, limit: float) -> dict[str, Any]:
        limits.append(limit)
        return {"case": case.name, "status": "done", "seconds": 0.0}

    monkeypatch.setattr(pool, "run", run)
    planned = cases.plan(models=["5b"], quick=False)[:3]
    results = battery.carry_out(planned, "cpu", budget=30, out=tmp_path)
    assert all(0 < limit <= 30 for limit in limits)
    assert len(limits) == 3
    none = battery.carry_out(planned, "cpu", budget=10, out=tmp_path)
    assert [result["status"] for result in none["cases"]] == ["no time"] * 3
    assert f"NO TIME LEFT for: {planned[0].name}" in report.table_of(none, planned)
    (tmp_path / "none.json").write_text(json.dumps(none))
    (tmp_path / "all.json").write_text(json.dumps(results))
    battery.carry_out(planned, "cpu", budget=30, out=tmp_path, again=tmp_path / "none.json")
    assert len(limits) == 6
    battery.carry_out(planned, "cpu", budget=30, out=tmp_path, again=tmp_path / "all.json")
    assert len(limits) == 6


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert battery.main([]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_a_step_of_all_layers_from_two_numbers_of_them() -> None:
    assert steps.at_layers([(1, 3.0), (3, 7.0)], 42) == 1 + 2 * 42
    assert steps.at_layers([(42, 5.0)], 42) == 5.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("triton_tem_fused_flex_attention_2", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("triton_tem_fused_addmm_1", "products"),
        ("triton_per_fused_native_layer_norm_0", "generated"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert steps.kind_of(name) == kind


# --------------------------------------------------------------------------------------------------------------- wheels


def _wheel(folder: Path, name: str, *requires: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def test_wheels_of_what_is_missing_and_of_no_more(tmp_path: Path) -> None:
    class Store(wheels.Fetch):
        def __init__(self) -> None:
            self.python = "3.12"

        def __call__(self, name: str) -> Path:
            needs = {
                "diffusers": ("Pillow", "importlib_metadata>=2", "jax; extra == 'x'", "tomli; python_version < '3.11'"),
                "torchao": ("torch>=2.11", "old-thing>=2"),
            }  # fmt: skip
            return _wheel(tmp_path, name, *needs.get(name, ()))

    found = wheels.needed(["diffusers", "torchao"], {"pillow": "", "old_thing": "1.0"}, Store())
    assert [path.name.partition("-1.0")[0] for path in found] == [
        "diffusers",
        "torchao",
        "importlib-metadata",
        "old-thing",
    ]


def test_pieces_are_bounded() -> None:
    assert wheels.pieces({"a": 50, "b": 30, "c": 20, "d": 10}, 60) == [["a", "d"], ["b", "c"]]
    with pytest.raises(ValueError, match="more than a piece"):
        wheels.pieces({"a": 61}, 60)


def test_the_tested_versions_are_fetched() -> None:
    versions = wheels.constraints((ROOT / "constraints.txt").read_text(), "3.12")
    assert versions["diffusers"] == "0.42.1"
    assert wheels.constraints((ROOT / "constraints.txt").read_text(), "3.10")["diffusers"] == "0.41.0"


# -------------------------------------------------------------------------------------------------------------- on CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_both_backends_that_run_everywhere_are_right_at_real_shapes(attention: str) -> None:
    case = cases.Case(name="5b", kind="step", limit=300, model="5b", layers=(1,), attention=attention, scope="block")
    assert worker.correctness(case, torch.device("cuda"))["red"] == ""


@pytest.mark.gpu
def test_a_case_in_a_process_of_its_own_on_the_gpu() -> None:
    case = next(case for case in cases.plan(models=["5b"], quick=False) if case.name == "ceiling/bf16")
    result = pool.run(case, "cuda", limit=120)
    assert result["status"] == "done", result
    assert result["value"] > 1
