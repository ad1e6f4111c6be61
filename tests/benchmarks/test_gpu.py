"""The GPU gate on the CPU: its judge by injected times, planted regressions, and its runner against the clock."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import budget, measure, models, ranks, suite, table, wheels
from benchmarks.gpu.cases import CACHES, HELD, MODELS, RECIPES, STEPS, Case, plan
from benchmarks.gpu.measure import OURS, PEER
from cogx_fast.attention.backends import BACKENDS
from cogx_fast.attention.plan import BUILT_IN
from cogx_fast.measure import contest, devices, timing
from cogx_fast.model import layers
from cogx_fast.model.cpu import computes
from cogx_fast.runtime.step_cache import StepCache
from cogx_fast.runtime.step_schedule_file import foresee_schedule
from tests.conftest import run_cli

CPU = torch.device("cpu")
BLOCK = Case(model="tiny", part="block")
CEILINGS = {"bf16": 1e-3, "fp8": 2e-3, "int8": 2e-3, "bandwidth": 1e-2}
FACTS = {"error": 1e-3, "first_call": 1.0}
HONEST = layers.FeedForward.forward


class Clock:
    """Time that passes only where a test lets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float) -> Callable[[], Tensor]:
        """A step that takes so long."""

        def step() -> Tensor:
            self.now += seconds
            return torch.zeros(4) + 1

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "clock", lambda _: made)
    return made


def _suite(baselines: Path, *, accept: bool = False) -> suite.Suite:
    made = suite.Suite(CPU, quick=True, baselines=baselines, accept=accept)
    made.ceilings = CEILINGS
    return made


def _judged(clock: Clock, baselines: Path, ours: float, case: Case = BLOCK, *, accept: bool = False) -> suite.Found:
    steps = {OURS: clock.step(ours), PEER: clock.step(1.0)}
    return _suite(baselines, accept=accept).judge(case, steps, FACTS)


# ------------------------------------------------------------------------------------------------------------ the judge


def test_without_a_table_it_says_so_and_records(clock: Clock, tmp_path: Path) -> None:
    found = _judged(clock, tmp_path, 0.8)
    assert found.verdict.passed
    assert found.recorded == f"no baseline yet: recorded in {tmp_path / 'cpu.csv'}"
    rows = gate.read(tmp_path / "cpu.csv")
    assert rows[str(BLOCK), "ratio"] == gate.Row(str(BLOCK), "ratio", "0.8", suite.MARGINS["ratio"])
    held = {row.metric for row in rows.values() if row.case == str(BLOCK) and row.margin != gate.NOTE}
    assert held == {"ratio", "percent_of_ceilings", "peak_mib", "launches"}
    assert float(rows[str(BLOCK), "seconds"].value) == 0.8
    assert {row.metric for row in rows.values() if row.case == gate.VERSIONS} == {"torch", "diffusers", "torchao"}
    other = dataclasses.replace(BLOCK, recipe="int8-dynamic")  # one that the table lacks joins it
    assert "no baseline yet" in _judged(clock, tmp_path, 0.5, other).recorded
    assert (str(BLOCK), "ratio") in gate.read(tmp_path / "cpu.csv")


def test_the_per_cent_is_of_the_least_time_by_the_ceilings(clock: Clock, tmp_path: Path) -> None:
    floor = measure.floor_seconds(BLOCK, measure.describe(CPU, CEILINGS))
    assert _judged(clock, tmp_path, 2 * floor).metrics["percent_of_ceilings"] == pytest.approx(50)
    twice = measure.describe(CPU, {name: 2 * value for name, value in CEILINGS.items()})
    assert measure.floor_seconds(BLOCK, twice) == pytest.approx(floor / 2)


@pytest.mark.parametrize(("now", "passed"), [(0.8, True), (0.83, True), (0.84, False), (0.85, False)])
def test_a_slow_down_beyond_the_margin_fails(clock: Clock, tmp_path: Path, now: float, passed: bool) -> None:
    _judged(clock, tmp_path, 0.8)
    found = _judged(clock, tmp_path, now)
    assert (found.verdict.passed, found.recorded) == (passed, "")
    if not passed:
        assert f"REGRESSION: {BLOCK} ratio: 0.8 -> {now}" in str(found.verdict)
        assert f"  {BLOCK},ratio,{now},{suite.MARGINS['ratio']}" in str(found.verdict).splitlines()
    assert gate.read(tmp_path / "cpu.csv")[str(BLOCK), "ratio"].value == "0.8"  # a red run changes nothing


def test_a_lower_share_of_the_ceilings_fails_alone(clock: Clock, tmp_path: Path) -> None:
    """When diffusers became slower, too, the ratio says nothing."""
    _judged(clock, tmp_path, 0.8)
    steps = {OURS: clock.step(1.0), PEER: clock.step(1.25)}
    verdict = _suite(tmp_path).judge(BLOCK, steps, FACTS).verdict
    assert [line.split()[1] for line in verdict.regressions] == ["percent_of_ceilings:"]


def test_what_is_slow_once_is_timed_again(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _judged(clock, tmp_path, 0.8)
    honest, seconds = measure.traffic, [2.0]

    def traffic(step: Any, device: torch.device) -> measure.Traffic:
        seconds[0] = 0.8  # what slowed it down is over
        return honest(step, device)

    def ours() -> Tensor:
        return clock.step(seconds[0])()

    monkeypatch.setattr(measure, "traffic", traffic)
    found = _suite(tmp_path).judge(BLOCK, {OURS: ours, PEER: clock.step(1.0)}, FACTS)
    assert found.verdict.passed
    assert found.metrics["ratio"] == pytest.approx(0.8)
    assert len(found.seconds) == 10


def test_what_is_faster_is_told_and_recorded_when_asked(clock: Clock, tmp_path: Path) -> None:
    _judged(clock, tmp_path, 0.8)
    found = _judged(clock, tmp_path, 0.5)
    assert found.verdict.passed
    assert any(told.startswith(f"{BLOCK} ratio: 0.8 -> 0.5") for told in found.verdict.told)
    assert _judged(clock, tmp_path, 0.5, accept=True).recorded == f"recorded in {tmp_path / 'cpu.csv'}"
    assert not _judged(clock, tmp_path, 0.8).verdict.passed


def test_peers_are_recorded_and_held_to_nothing(clock: Clock, tmp_path: Path) -> None:
    peer = dataclasses.replace(BLOCK, owner="diffusers", recipe="eager")
    _judged(clock, tmp_path, 1.2, peer)
    assert {row.margin for row in gate.read(tmp_path / "cpu.csv").values() if row.case == str(peer)} == {gate.NOTE}
    assert _judged(clock, tmp_path, 9.9, peer).verdict.passed


def test_kernels_that_are_no_longer_seen_are_missed(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _judged(clock, tmp_path, 0.8)
    honest = measure.traffic
    monkeypatch.setattr(measure, "traffic", lambda *seen: dataclasses.replace(honest(*seen), launches=None))
    verdict = _judged(clock, tmp_path, 0.8).verdict
    assert [row.partition(",0 is")[0] for row in verdict.stale] == [f"{BLOCK},launches,8"]


def test_another_version_is_not_judged_and_not_recorded(clock: Clock, tmp_path: Path) -> None:
    _judged(clock, tmp_path, 0.8)
    path = tmp_path / "cpu.csv"
    path.write_text(path.read_text().replace("diffusers,0.", "diffusers,9."))
    found = _judged(clock, tmp_path, 1.6)
    assert found.recorded == ""
    assert "the table holds for" in found.verdict.not_binding


# ------------------------------------------------------------------------------------------------------ planted defects


def _run(monkeypatch: pytest.MonkeyPatch, clock: Clock, baselines: Path, forward: Any = HONEST) -> suite.Found:
    """The real case, of which only the times are made up: ours takes 0.8 of diffusers' time."""
    honest_run = contest.run

    def run(model: Any, arguments: Any) -> Tensor:
        clock.now += 0.8 if "cogx_fast" in type(model).__module__ else 1.0
        return honest_run(model, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(contest, "run", run)
        patch.setattr(layers.FeedForward, "forward", forward)
        torch.compiler.reset()
        return _suite(baselines).run(BLOCK)


def _copying(self: Any, x: Tensor) -> Tensor:
    return HONEST(self, x.clone())


def _holding(self: Any, x: Tensor) -> Tensor:
    large = x.repeat(*[1] * (x.dim() - 1), 64)
    return HONEST(self, x) + 0 * large[..., : x.shape[-1]]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table of the honest model."""
    folder = tmp_path_factory.mktemp("baselines")
    with pytest.MonkeyPatch.context() as patch:
        made = Clock()
        patch.setattr(timing, "clock", lambda _: made)
        found = _run(patch, made, folder)
    assert found.recorded
    assert found.metrics["ratio"] == pytest.approx(0.8)
    assert 0 < found.notes["error"] < suite.LIMIT_EXACT * float(found.notes["peer_error"])
    for seen in found.traffic.values():
        assert 0 < sum(seen.kernels.values()) <= sum(seen.kinds.values())
    return folder


def test_the_honest_model_passes(clock: Clock, honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, clock, honest).verdict.passed


@pytest.mark.parametrize(("planted", "metric"), [(_copying, "launches"), (_holding, "peak_mib")])
def test_a_planted_defect_is_caught(
    planted: Any, metric: str, clock: Clock, honest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = _run(monkeypatch, clock, honest, planted).verdict
    assert not verdict.passed
    assert any(line.startswith(f"{BLOCK} {metric}:") for line in verdict.regressions), str(verdict)


def test_nothing_is_timed_on_red(clock: Clock, honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(suite.Suite, "judge", lambda *_: timed.append("timed"))
    with pytest.raises(suite.RedError, match="relative error against fp32"):
        _run(monkeypatch, clock, honest, lambda self, x: 1.5 * HONEST(self, x))
    assert not timed


# ------------------------------------------------------------------------------------------------ peaks of a pipeline


@pytest.fixture
def no_bf16() -> None:
    if not computes(torch.bfloat16):
        pytest.skip("peaks are predicted in 16 bits, which kernels of this CPU bring to 32")


@pytest.mark.usefixtures("no_bf16")
def test_what_decoding_and_a_call_hold_is_what_is_predicted(tmp_path: Path) -> None:
    made, lines = _suite(tmp_path / "baselines"), []
    cases = [case for case in plan(quick=True) if case.part in HELD]
    assert [str(case) for case in cases] == [
        "tiny/decode/whole", "tiny/decode/tiled", "tiny/call/none", "tiny/call/model", "tiny/call/blocks"
    ]  # fmt: skip
    for case in cases[:3]:
        found = made.run(case)
        assert found.metrics["peak_mib"] == pytest.approx(found.notes["predicted_mib"], rel=suite.LIMIT_PEAK)
        lines.append({"test": runner.TEST.format(case), "outcome": "passed", "found": suite.as_json(found),
                      "ceilings": CEILINGS, "environment": made.facts})  # fmt: skip
    whole, tiled, _ = (line["found"]["metrics"]["peak_mib"] for line in lines)
    assert tiled < 0.5 * whole
    for case in cases[3:]:
        with pytest.raises(models.UnsupportedError, match="a GPU's memory"):
            made.run(case)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = "\n".join(runner.report.write(ledger, cases, tmp_path))
    assert f"tiny/call/none {'':10}" in report
    assert "predicted, GiB" in report
    assert not (tmp_path / "ratios.png").exists()
    path = tmp_path / "baselines" / "cpu.csv"
    row = gate.read(path)[str(cases[0]), "peak_mib"]
    path.write_text(path.read_text().replace(str(row), str(dataclasses.replace(row, value=f"{0.9 * whole:.2f}"))))
    assert [line.split()[1] for line in made.run(cases[0]).verdict.regressions] == ["peak_mib:"]


@pytest.mark.usefixtures("no_bf16")
def test_a_decoder_that_holds_more_than_is_predicted_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKLCogVideoX

    honest, case = AutoencoderKLCogVideoX.decode, Case(model="tiny", part="decode", recipe="whole")
    held = torch.Tensor()

    def holding(self: Any, latents: Tensor, **options: Any) -> Any:
        nonlocal held
        held = latents.repeat(1, 2000, 1, 1, 1)
        return honest(self, latents, **options)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode", holding)
    with pytest.raises(suite.RedError, match="MiB at its peak, predicted are"):
        _suite(tmp_path).run(case)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- the plan


def test_every_variant_recipe_scope_and_kernel_is_in_the_plan() -> None:
    cases = plan()
    assert len({str(case) for case in cases}) == len(cases)
    ours = {(case.model, case.part, case.recipe, case.scope) for case in cases if case.owner == "ours"}
    assert {(model, part, recipe, scope) for model in MODELS for part in ("block", "step") for recipe in RECIPES
            for scope in ("block", "model")} <= ours  # fmt: skip
    assert set(BACKENDS) <= {case.recipe for case in cases if case.part == "attention"}
    assert [str(case) for case in cases if case.part == "block"][:2] == ["5b/block/bf16", "5b/block/fp8-dynamic"]
    assert {case.tokens.joint for case in cases if case.model == "5b"} == {17_776}
    assert {case.tokens.joint for case in cases if case.model == "1.5-5b"} == {45_106}
    assert {case.config.num_layers for case in cases if case.model == "5b" and case.part in ("step", *HELD)} == {42}
    assert {case.model for case in cases if case.part in HELD} == {"5b", "1.5-5b"}
    sparse = next(case for case in cases if str(case) == "5b/step/radial")
    assert 0.3 < sparse.kept < 0.5
    assert BUILT_IN["radial"](sparse.config).choice == ((1,),) * 42


def test_a_loop_has_the_step_cache_and_its_floor_is_of_fewer_blocks() -> None:
    block, *loops = [
        case for case in plan() if case.model == "5b" and (case.part == "loop" or str(case) == "5b/block/bf16")
    ]
    assert {case.recipe for case in loops} == set(CACHES)
    device = devices.DEVICES["h100"]
    whole = STEPS * measure.floor_seconds(block, device)
    for case in loops:
        schedule = foresee_schedule(case.recipe, case.config, STEPS)
        assert whole / schedule.speedup < measure.floor_seconds(case, device) < 1.1 * whole / schedule.speedup
        small = dataclasses.replace(case, model="tiny")
        model = models.prepare(small, models.upstream(small, torch.device("cpu")), quick=True)
        assert isinstance(model.runner.slots.reuse, StepCache)
    step = models.loop(lambda **given: (given["timestep"],), loops[0], torch.device("cpu"))
    assert step().tolist() == [1, 1]


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
        ("triton_red_fused__scaled_dot_product_cudnn_attention_add_mul_1", "generated"),
        ("triton_red_fused__scaled_mm_abs_amax_2", "generated"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert measure.kind_of(name) == kind


# ----------------------------------------------------------------------------------------------------------- the runner

ONLY = r"--only=tiny/attention/(sdpa|sdpa-cudnn|flex-default)$"


@dataclasses.dataclass(frozen=True)
class Ran:
    text: str
    out: Path


def _session(out: Path) -> Ran:
    """The first part of a session on a GPU machine, which is a minute here."""
    arguments = f"--device=cpu --quick --baselines={out / 'baselines'} {ONLY}"
    environment = {**os.environ, "PYTHON": sys.executable, "SECONDS_A_PART": "250", "GATE": arguments}
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "session.sh"), "1", str(out)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert child.returncode == 0, child.stderr
    return Ran(child.stdout, out)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _session(tmp_path_factory.mktemp("session"))


def test_a_session_measures_records_and_reports(ran: Ran) -> None:
    lines = ran.text.splitlines()
    assert any(line.startswith("tiny/attention/sdpa ") for line in lines)
    assert f"no baseline yet: recorded in {ran.out / 'baselines' / 'cpu.csv'} (commit it): tiny/attention/sdpa" in lines
    assert "UNSUPPORTED here: tiny/attention/sdpa-cudnn, tiny/attention/flex-default" in lines
    assert "THE TIMES MEAN NOTHING" in ran.text  # nobody shall take them for a result
    stored = json.loads((ran.out / "tiny-attention.json").read_text())["benchmarks"][0]
    found = stored["extra_info"]["found"]
    assert stored["stats"]["median"] == pytest.approx(found["notes"]["seconds"], rel=1e-3)  # what was timed in turns
    ceilings = set(json.loads((ran.out / "ceilings.json").read_text()))
    assert ceilings | {"fp8"} == {"bf16", "fp8", "int8", "bandwidth"}  # not every CPU has fp8 products
    roofline = ("roofline", "--preset", "5b", "--device", "h100", "--ceilings", ran.out / "ceilings.json")
    assert "measured" in run_cli(*roofline).out
    assert "./README.md" in lines[-1]
    assert table.README.read_text() == table.current(table.README)  # nothing of the CPU came into it


def test_where_there_are_several_gpus_each_mesh_is_timed_beside_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = ["--device=cpu", "--quick", "--only=^ranks$", f"--out={tmp_path}", f"--baselines={tmp_path}"]
    assert runner.main(arguments) == 0
    rows = gate.read(tmp_path / "cpu.csv")
    assert {case for case, _ in rows} == {
        gate.VERSIONS, "tiny/ranks/block/1x2", "tiny/ranks/block/2x1", "tiny/ranks/decode/2"
    }  # fmt: skip
    assert all(float(rows[case, "error"].value) <= ranks.LIMIT for case, metric in rows if metric == "speedup")
    better = gate.Row("tiny/ranks/decode/2", "speedup", "99.0", "0.05")
    text = (tmp_path / "cpu.csv").read_text().replace(str(rows["tiny/ranks/decode/2", "speedup"]), str(better))
    (tmp_path / "cpu.csv").write_text(text)
    capsys.readouterr()
    assert runner.main([*arguments, "--resume"]) == 1  # judges what the first run has left
    assert "REGRESSION: tiny/ranks/decode/2 speedup: 99.0 -> " in capsys.readouterr().out
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert runner.main(arguments) == 1
    assert "FAILED: 2 ranks: status 1" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(ran: Ran) -> None:
    before = (ran.out / "ledger.jsonl").read_text()
    again = _session(ran.out)
    assert "begun" not in (ran.out / "ledger.jsonl").read_text().removeprefix(before)
    assert any(line.startswith("tiny/attention/sdpa ") for line in again.text.splitlines())


def test_one_command_is_red_where_the_table_says_better(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(ran.out / "cache"))
    case = Case(model="tiny", part="attention", recipe="sdpa")
    row = gate.read(ran.out / "baselines" / "cpu.csv")[str(case), "launches"]
    fewer = dataclasses.replace(row, value=str(int(row.value) - 1))
    text = (ran.out / "baselines" / "cpu.csv").read_text()
    (tmp_path / "cpu.csv").write_text(text.replace(str(row), str(fewer)))
    arguments = ["--device=cpu", "--quick", f"--baselines={tmp_path}", f"--out={tmp_path / 'out'}", f"--only={case}$"]
    assert runner.main(arguments) == 1
    assert f"REGRESSION: {case} launches: {fewer.value} -> {row.value}" in capsys.readouterr().out


def test_without_time_it_names_what_it_did_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # else the command sets it for good
    assert runner.main(["--device=cpu", "--quick", f"--out={tmp_path}", ONLY, "--budget=1"]) == 0
    names = "tiny/attention/sdpa, tiny/attention/sdpa-cudnn, tiny/attention/flex-default"
    assert f"NO TIME LEFT for 3: {names}" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main([]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_what_crashes_hangs_or_spoils_the_process_costs_only_itself(tmp_path: Path) -> None:
    file, ledger = tmp_path / "test_planted.py", tmp_path / "ledger.jsonl"
    file.write_text(
        "import os, time\n"
        "def test_good(): pass\n"
        "def test_crashing(): os._exit(3)\n"
        "def test_failing(): raise ValueError('planted')\n"
        "def test_spoiling(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_hanging(): time.sleep(600)\n"
        "def test_after(): pass\n"
    )
    words = [str(file), f"--confcutdir={tmp_path}"]
    budget.run(words, seconds=250, ledger=ledger, least=1, limit=5)
    found = {line["test"].rpartition("_")[2]: line["outcome"] for line in budget.ended(ledger)}
    assert found == {"good": "passed", "crashing": "crashed", "failing": "failed", "spoiling": "failed",
                     "hanging": "timeout", "after": "passed"}  # fmt: skip
    assert not budget.not_run(ledger)
    assert any("ValueError: planted" in line for line in budget.summary(ledger))
    before = ledger.read_text()
    budget.run(words, seconds=60, ledger=ledger, least=1, limit=5)
    assert "begun" not in ledger.read_text().removeprefix(before)


def test_what_the_end_of_the_time_cut_short_is_begun_again(tmp_path: Path) -> None:
    file, ledger = tmp_path / "test_planted.py", tmp_path / "ledger.jsonl"
    file.write_text("import time\ndef test_one(): pass\ndef test_long(): time.sleep(600)\ndef test_last(): pass\n")
    words = [str(file), f"--confcutdir={tmp_path}", "--first", f"{file.name}::test_last"]
    budget.run(words, seconds=12, ledger=ledger, least=1, limit=100)
    order = [line["begun"].rpartition("_")[2] for line in budget.read(ledger) if "begun" in line]
    assert order == ["last", "one", "long"]
    (cut,) = budget.not_run(ledger)
    assert cut.endswith("test_long")
    assert budget.summary(ledger) == [f"NO TIME LEFT for 1: {cut}", "2 ended, 0 of them badly"]


@pytest.mark.parametrize(("workflow", "command"), [("ci", ".ci/run"), ("gpu", "make bench-gpu")])
def test_workflows_run_what_runs_here(workflow: str, command: str) -> None:
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text())["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert [run.partition(" ARGS=")[0] for run in runs] == [command]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert "\nbench-gpu: " in (ROOT / "Makefile").read_text()


# ------------------------------------------------------------------------------------------------------- README's table


@pytest.mark.parametrize("file", [table.README, table.DOCS], ids=lambda file: file.name)
def test_the_committed_tables_are_what_the_command_makes(file: Path) -> None:
    assert file.read_text() == table.current(file), "run: python -m benchmarks.gpu.table"


def test_a_figure_is_predicted_until_it_is_measured(clock: Clock, tmp_path: Path) -> None:
    counted = gate.read(table.COUNTED)
    rows = table.render(counted, {}).splitlines()
    assert all(row.endswith("| predicted |") for row in rows[2 : 2 + len(MODELS) * len(RECIPES)])
    step = Case(model="5b", part="step", recipe="fp8-dynamic")
    _judged(clock, tmp_path, 0.5, step)
    text = table.render(counted, gate.read(tmp_path / "cpu.csv"))
    (row,) = (line for line in text.splitlines() if "| measured" in line)
    assert row.startswith("| 5b | `fp8-dynamic` | 0.5 | 0.5 |")
    assert f"torch {torch.__version__.partition('+')[0]}, diffusers" in text
    assert table.render_measured({"a card": counted}) == ""
    shown = table.render_measured({"a card": gate.read(tmp_path / "cpu.csv")})
    assert "| a card | `5b/step/fp8-dynamic` | 500.00 | 1000.00 | 0.5 |" in shown


# --------------------------------------------------------------------------------------------------------------- wheels


def test_wheels_of_what_is_missing_and_of_no_more() -> None:
    versions = ("Diff_Users-1.0", "torch-2.0", "old_thing-2.0", "pillow-3.0", "numpy-4.0")
    files = [f"{version}-py3-none-any.whl" for version in versions]
    present = {"old-thing": "1.0", "Pillow": "", "numpy": "4.0"}
    assert wheels.missing(files, present) == ["Diff_Users-1.0-py3-none-any.whl", "old_thing-2.0-py3-none-any.whl"]


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
def test_a_block_at_real_size_is_right_and_measured(tmp_path: Path) -> None:
    made = suite.Suite(torch.device("cuda"), quick=False, baselines=tmp_path, accept=False)
    found = made.run(Case(model="5b", part="block"))
    assert found.recorded
    assert found.metrics["launches"] > 0
