"""The GPU gate on the CPU: its judge by injected times, planted regressions, what is in its plan and its table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import measure, models, suite, table
from benchmarks.gpu.cases import CACHES, HELD, MODELS, RECIPES, STEPS, Case, plan
from benchmarks.gpu.measure import OURS, PEER
from cogx_fast.attention.backends import BACKENDS
from cogx_fast.attention.plan import BUILT_IN
from cogx_fast.measure import contest, devices, timing
from cogx_fast.model import layers
from cogx_fast.model.cpu import computes
from cogx_fast.runtime.step_caching.step_cache import StepCache
from cogx_fast.runtime.step_caching.step_schedule_file import foresee_schedule

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


# -------------------------------------------------------------------------------------------------------------- on CUDA


@pytest.mark.gpu
def test_a_block_at_real_size_is_right_and_measured(tmp_path: Path) -> None:
    made = suite.Suite(torch.device("cuda"), quick=False, baselines=tmp_path, accept=False)
    found = made.run(Case(model="5b", part="block"))
    assert found.recorded
    assert found.metrics["launches"] > 0
