"""The code for a described GPU: counted right, refused where it would mislead, and gated so that a regression shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gate
from benchmarks.codegen import DEVICES, CodegenError, Report, __main__, inductor, run, shim, table, worker
from benchmarks.codegen.cases import CASES, INT8_OPTIONS, MODELS, RECIPES, Case
from benchmarks.codegen.report import Candidate, Launch
from cogx_fast import sizes
from cogx_fast.config import PRESETS
from cogx_fast.measure import costs
from cogx_fast.measure.devices import get_device

pytestmark = pytest.mark.timeout(900)  # one test of many waits for the process that compiles for all of them
Planted = dict[str, "Report | str"]
BF16 = 2


def _report(planted: Planted, name: str) -> Report:
    answer = planted[name]
    assert isinstance(answer, Report), answer
    return answer


# -------------------------------------------------------------------------------------------------------- counted right


def test_bytes_and_operations_of_a_module_known_by_hand(planted: Planted) -> None:
    rows, width = 100, 256
    generated, product = _report(planted, "known").launches
    assert (generated.kind, product.kind, product.name) == ("pointwise", "extern", "mm")
    assert generated.read_bytes == BF16 * (rows * width + width)  # its third of the rows, read twice, and the scale
    assert generated.written_bytes == BF16 * rows * width
    assert product.read_bytes == BF16 * (rows * width + width * width)
    assert product.written_bytes == BF16 * rows * width
    assert product.flops == 2 * rows * width * width
    assert _report(planted, "known").inductor_bytes > _report(planted, "known").bytes  # it charges views as a whole


def test_operations_are_those_of_the_cost_model(full_size: dict[str, Report]) -> None:
    config = PRESETS["5b"]
    tokens = sizes.count_tokens(config, sizes.default_video(config))
    flops = costs.count_flops(config, tokens, batch=2)
    parts = ("attention", "feed-forward", "attention scores")
    assert full_size["5b/ours/cudnn"].flops * config.num_layers == sum(flops[part] for part in parts)


def test_bytes_of_the_full_size_block(full_size: dict[str, Report]) -> None:
    stream = BF16 * 2 * 17776 * 3072
    ours = full_size["5b/ours/cudnn"]
    prepare = next(launch for launch in ours.triton if launch.kind == "persistent")
    assert 2.0 <= prepare.read_bytes / stream < 2.05  # queries and keys of the fused product, not its values
    assert prepare.written_bytes == 2 * stream
    attend = next(launch for launch in ours.launches if launch.attention)
    assert (attend.read_bytes, attend.written_bytes) == (3 * stream, stream)
    assert attend.exponentials == 2 * 48 * 17776**2


def test_our_block_beside_diffusers(full_size: dict[str, Report]) -> None:
    ours, theirs = full_size["5b/ours/cudnn"], full_size["5b/diffusers/cudnn"]
    assert ours.triton_launches <= 4
    assert theirs.triton_launches == 12
    assert ours.bytes <= 0.80 * theirs.bytes  # the target; the recorded table holds what it is
    assert ours.extern_calls["aten._addmm_activation"] == 1
    assert ours.attention == theirs.attention == "aten._scaled_dot_product_cudnn_attention"
    assert ours.predicted_seconds(DEVICES["h100"]) < theirs.predicted_seconds(DEVICES["h100"])


@pytest.mark.parametrize("model", MODELS)
def test_the_recorded_bytes_reach_the_target(model: str) -> None:
    recorded = gate.read(__main__.EXPECTED)
    ours, theirs = (int(recorded[f"{model}/{owner}/cudnn", "bytes"].value) for owner in ("ours", "diffusers"))
    assert ours <= 0.80 * theirs


def test_every_kernel_was_compiled_with_each_candidate(planted: Planted) -> None:
    for launch in _report(planted, "block").triton:
        assert len(launch.ptx) == 16
        assert all(
            8 <= candidate.registers <= 255 and candidate.shared_bytes <= 227 * 1024 for candidate in launch.candidates
        )


def test_flex_is_a_template_with_its_operations(planted: Planted) -> None:
    sdpa, flex = _report(planted, "block"), _report(planted, "flex")
    assert (flex.attention, flex.kinds["template"]) == ("template", 1)
    assert flex.flops == sdpa.flops


def test_a_report_survives_json(planted: Planted) -> None:
    report = _report(planted, "block")
    assert Report.from_dict(report.to_dict()) == report


# ----------------------------------------------------------------------------------------------------------- quantized

STREAM = 2 * 17776 * 3072
"""Elements of 5b's stream."""


def test_fp8_dynamic_has_no_pass_that_only_measures_or_rescales(quantized: dict[str, Report]) -> None:
    report = quantized["fp8-dynamic"]
    assert report.extern_calls["_scaled_mm"] == 4
    assert report.triton_launches <= 8
    assert report.kinds["pointwise"] == 1  # the last addition
    for launch in report.triton:
        assert launch.written_bytes >= STREAM  # a column of maxima or scales is a thousandth of that
    quantizing = [
        before
        for before, launch in zip(report.launches, report.launches[1:], strict=False)
        if launch.name == "_scaled_mm"
    ]
    assert len(quantizing) == 4
    assert all(launch.kind in ("reduction", "persistent") for launch in quantizing)  # norm or GELU, maximum and cast


def test_int8_dynamic_stores_no_int32(quantized: dict[str, Report]) -> None:
    report = quantized["int8-dynamic"]
    assert report.extern_calls == {report.attention: 1}
    products = [launch for launch in report.launches if launch.flops and not launch.attention]
    assert [launch.written_bytes for launch in products] == [BF16 * n * STREAM for n in (3, 1, 4, 1)]
    assert {launch.products for launch in products} == {"int8"}
    assert report.triton_launches - len(products) <= 5


@pytest.mark.parametrize("recipe", ["int8-weight-only", "fp8-weight-only"])
def test_weight_only_products_are_the_librarys_with_the_gelu(quantized: dict[str, Report], recipe: str) -> None:
    calls = quantized[recipe].extern_calls
    assert calls == {"addmm": 3, "aten._addmm_activation": 1, quantized[recipe].attention: 1}


def test_quantized_products_are_fast_ones(quantized: dict[str, Report], full_size: dict[str, Report]) -> None:
    h100, plain = DEVICES["h100"], full_size["5b/ours/cudnn"]
    for recipe, report in quantized.items():
        assert report.flops == plain.flops
        is_dynamic = "dynamic" in recipe
        kinds = {launch.products for launch in report.launches if launch.flops and not launch.attention}
        assert kinds == {recipe[: recipe.index("-")] if is_dynamic else "bf16"}
        assert (report.predicted_seconds(h100) < plain.predicted_seconds(h100)) == is_dynamic


def test_an_odd_length_generates(planted: Planted) -> None:
    assert _report(planted, "odd").extern_calls["_scaled_mm"] == 4


def test_linears_that_see_no_rows_make_passes_of_their_own(planted: Planted) -> None:
    rows, unflattened = _report(planted, "fp8"), _report(planted, "unflattened")
    assert rows.triton_launches == _report(planted, "odd").triton_launches
    assert unflattened.triton_launches > rows.triton_launches
    assert unflattened.bytes > rows.bytes


@pytest.mark.parametrize(("packaged", "compiled"), [("packaged", "block"), ("packaged fp8", "fp8")])
def test_a_packages_block_is_the_compiled_one(planted: Planted, packaged: str, compiled: str) -> None:
    """The same kernels, but for the modulation's strides, which are other constants in them."""

    def kernels(name: str) -> list[tuple[str, str, int, int]]:
        launches = _report(planted, name).launches
        return [(each.name, each.kind, each.read_bytes, each.written_bytes) for each in launches]

    assert kernels(packaged) == kernels(compiled)


def test_int8_cases_are_compiled_as_the_model_is() -> None:
    from cogx_fast.runtime.compiling.compile import INT8_OPTIONS as THE_MODELS

    ours = {**INT8_OPTIONS}
    assert ours.pop("max_autotune_gemm")  # part of the mode
    assert ours.pop("test_configs.max_mm_configs") == 1  # stands for the candidate that a device would choose
    assert ours == THE_MODELS


# --------------------------------------------------------------------------------------- planted regressions are caught


@pytest.mark.parametrize(
    ("name", "grown"),
    [
        ("defused", {"triton_launches", "bytes"}),
        ("copied", {"triton_launches", "bytes"}),
        ("upcast", {"bytes"}),
    ],
)
def test_a_planted_regression_fails_the_gate(planted: Planted, tmp_path: Path, name: str, grown: set[str]) -> None:
    table_file = tmp_path / "codegen.csv"
    good = _report(planted, "block")
    __main__.accept([good], table_file)
    assert __main__.check([good], table_file).passed
    verdict = __main__.check([dataclasses.replace(_report(planted, name), case="block")], table_file)
    assert grown <= {words.split(":")[0].split()[-1] for words in verdict.regressions}, str(verdict)
    assert verdict.notes  # says which launches changed


def test_a_claimed_win_is_demanded(planted: Planted, tmp_path: Path) -> None:
    table_file = tmp_path / "codegen.csv"
    __main__.accept([dataclasses.replace(_report(planted, "defused"), case="block")], table_file)
    verdict = __main__.check([_report(planted, "block")], table_file)
    assert any(words.startswith("block triton_launches: ") for words in verdict.wins)


# ---------------------------------------------------------------------------------------- what would mislead is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unstated", "calls scaled_dot_product_attention and states None"),
        ("impossible", "flash attention cannot take this call"),
        ("graph_break", "graph_break"),
    ],
)
def test_what_would_mislead_is_refused(planted: Planted, name: str, words: str) -> None:
    answer = planted[name]
    assert isinstance(answer, str)
    assert words in answer


def test_a_real_gpu_is_not_described_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
    with pytest.raises(CodegenError, match="NVIDIA Something"):
        inductor.describe(DEVICES["h100"])
    with pytest.raises(CodegenError, match="this machine has a NVIDIA Something"):
        worker._check_real(DEVICES["h100"])


def test_describing_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo.device_interface

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CodegenError, match="before the device was described"):
        inductor.describe(DEVICES["h100"])


def _small_report(**changes: Any) -> Report:
    kernel = Launch(
        name="triton_poi_fused_0", kind="pointwise", read_bytes=8, written_bytes=8, ptx="0123456789abcdef",
        candidates=(Candidate(config={}, registers=16, local_bytes=0, shared_bytes=0),),
    )  # fmt: skip
    values: dict[str, Any] = {
        "case": "5b/ours/cudnn", "device": "h100", "layers": 2, "versions": {"torch": "1"}, "real": False,
        "launches": (kernel,), "graphs": 1, "inductor_bytes": 16, "seconds": 1.0,
    }  # fmt: skip
    return Report(**(values | changes))


def test_a_report_that_lost_something_is_refused() -> None:
    (kernel,) = _small_report().launches
    worker.check(_small_report(), sdpa_calls=0)
    with pytest.raises(CodegenError, match="fell apart"):
        worker.check(_small_report(), sdpa_calls=1)
    with pytest.raises(CodegenError, match="counted 0 bytes"):
        worker.check(_small_report(inductor_bytes=0), sdpa_calls=0)
    with pytest.raises(CodegenError, match="not compiled"):
        worker.check(_small_report(launches=(dataclasses.replace(kernel, candidates=()),)), sdpa_calls=0)


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CodegenError, match="pip install triton"):
        run.report(CASES["5b/ours/cudnn"])
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shim, "compiler", lambda: None)
    assert "install g++" in (run.unavailable() or "")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of h100"):
        get_device("b9000")
    with pytest.raises(ValueError, match="states no peak for 'fp8'"):
        DEVICES["a100"].peak("fp8")


# ---------------------------------------------------------------------------------------------- devices and predictions


@pytest.mark.parametrize(
    "device",
    ["a100", *(pytest.param(name, marks=pytest.mark.slow) for name in ("h200", "l40s", "rtx4090", "rtx3060", "b200"))],
)
def test_other_devices(compiler: None, device: str) -> None:
    known = Case(name="known", build="tests.benchmarks.planted:known", arguments={"rows": 100, "width": 256})
    attend = Case(name="attend", build="tests.benchmarks.planted:attend", sdpa="flash")
    products, attention = run.reports([known, attend], device)
    assert products.kinds == {"pointwise": 1, "extern": 1}
    assert attention.attention == "aten._scaled_dot_product_flash_attention"
    assert attention.predicted_seconds(DEVICES[device]) > 0


def test_a_prediction_is_the_ceiling_that_binds() -> None:
    h100 = DEVICES["h100"]
    launch = Launch(name="x", kind="extern", read_bytes=2 * 10**9, written_bytes=10**9, flops=10**12)
    assert launch.predicted_seconds(h100) == launch.flops / h100.bf16
    assert dataclasses.replace(launch, products="fp8").predicted_seconds(h100) == launch.bytes / h100.bandwidth
    exponentials = dataclasses.replace(launch, exponentials=10**11)
    assert exponentials.predicted_seconds(h100) == pytest.approx(10**11 / (16 * 132 * 1.83e9))
    report = _small_report(launches=(launch, launch))
    assert report.predicted_step_seconds(h100) == pytest.approx(2 * 2 * launch.predicted_seconds(h100))


# ---------------------------------------------------------------------------------------------------- table and command


def test_the_recorded_table_holds(full_size: dict[str, Report]) -> None:
    verdict = __main__.check(list(full_size.values()))
    if verdict.not_binding:
        pytest.skip(verdict.not_binding)
    assert verdict.passed, f"\n{verdict}"


def test_the_recorded_table_holds_for_quantized_blocks(quantized: dict[str, Report]) -> None:
    verdict = __main__.check(list(quantized.values()))
    if verdict.not_binding:
        pytest.skip(verdict.not_binding)
    assert verdict.passed, f"\n{verdict}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_recorded_table_holds_for_all_others(compiler: None) -> None:
    tested = {"5b/ours/cudnn", "5b/diffusers/cudnn", *(f"5b/ours/cudnn/{recipe}" for recipe in RECIPES)}
    verdict = __main__.check(run.reports([case for name, case in CASES.items() if name not in tested]))
    if verdict.not_binding:
        pytest.skip(verdict.not_binding)
    assert verdict.passed, f"\n{verdict}"


def test_every_case_is_recorded() -> None:
    recorded = {row.case for row in gate.read(__main__.EXPECTED).values()}
    assert recorded == {gate.VERSIONS, *CASES}


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = [_small_report(), _small_report(case="5b/diffusers/cudnn", inductor_bytes=32)]
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    monkeypatch.setattr(__main__, "reports", lambda chosen, device, real: reports)
    monkeypatch.setattr(__main__.accept, "__defaults__", (tmp_path / "codegen.csv",))
    monkeypatch.setattr(__main__.check, "__defaults__", (tmp_path / "codegen.csv",))
    assert __main__.main(["--check"]) == 1
    assert "NO ROW: 5b/ours/cudnn triton_launches is 1" in capsys.readouterr().out
    assert __main__.main(["--accept", "--json", str(tmp_path / "reports.json")]) == 0
    assert "prediction, not a measurement" in capsys.readouterr().out
    assert __main__.main(["--check"]) == 0
    assert __main__.main(["--only", "nothing"]) == 2
    assert __main__.main(["--check", "--device", "a100"]) == 2


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = table.plot([_small_report()], DEVICES["h100"], tmp_path / "plot.png")
    assert said == f"plot: {tmp_path / 'plot.png'}"
    assert (tmp_path / "plot.png").stat().st_size > 1000
