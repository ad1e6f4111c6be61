from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogx_fast.assets import CHECKSUMS, digits, tiny_pipeline_dir
from cogx_fast.pipelines import demo as module
from cogx_fast.pipelines.demo import Column, DemoResult
from cogx_fast.pipelines.generation import Request, Setting
from cogx_fast.sizes import VideoSize
from cogx_fast.video.files import read_video
from tests.conftest import Finished, report, run_cli


def test_it_compares_with_diffusers(demo: tuple[Finished, Path]) -> None:
    facts = report(demo[0])
    upstream, ours = facts["columns"][:2]
    assert (upstream["name"], upstream["compiled"], upstream["ratio"]) == ("diffusers", False, 1)
    assert (ours["name"], ours["compiled"]) == ("cogx_fast", True)
    assert ours["identical"] or ours["psnr_db"] >= 60
    assert ours["ssim"] > 0.999
    assert [column["graphs"] for column in (upstream, ours)] == [0, 3]
    assert {column[name] for column in (upstream, ours) for name in ("breaks", "recompiles")} == {0}
    assert 0 < ours["compile_seconds"] <= ours["first_step_seconds"]
    assert ours["ratio"] == pytest.approx(ours["seconds_per_step"] / upstream["seconds_per_step"])
    assert all(0 < column["seconds_per_step"] < ours["first_step_seconds"] for column in (upstream, ours))


def test_it_says_what_a_trained_pipeline_shows(demo: tuple[Finished, Path]) -> None:
    trained = (tiny_pipeline_dir() / CHECKSUMS).is_file()
    assert {column["shows"] is not None for column in report(demo[0])["columns"]} == {trained}


def test_its_prompt_is_one_that_the_pipeline_is_trained_on(demo: tuple[Finished, Path]) -> None:
    assert report(demo[0])["prompt"] in [prompt for _, _, prompt in digits.all_prompts()]


def test_it_is_quiet_where_stderr_is_no_terminal(demo: tuple[Finished, Path]) -> None:
    assert demo[0].err == ""


def test_it_writes_real_files(demo: tuple[Finished, Path]) -> None:
    from PIL import Image

    facts = report(demo[0])
    files = {name: Path(path) for name, path in facts["files"].items()}
    videos = [Path(column["video"]) for column in facts["columns"]]
    assert sorted(path.name for path in demo[1].iterdir()) == sorted(path.name for path in [*files.values(), *videos])
    upstream, ours = (read_video(path) for path in videos[:2])
    assert upstream.shape == ours.shape == (17, 64, 64, 3)
    difference = np.abs(upstream.astype(int) - ours)
    assert difference.mean() <= 0.2  # one picture, coded twice: 0 with AVX512; of 255, 0.12 and at most 10 with AVX2
    assert difference.max() <= 12
    assert ours.std() > 20
    with Image.open(files["contact_sheet"]) as sheet:
        sheet.load()
        assert sheet.width > 9 * 128
        assert sheet.height > len(videos) * 128
    with Image.open(files["plot"]) as plot:
        plot.load()
        assert plot.width > 600


def column(name: str, **more: Any) -> Column:
    facts: dict[str, Any] = {
        "setting": Setting(dtype=torch.float32), "seconds_per_step": 0.02, "first_step": 0.1, "compile_seconds": 0.0,
        "graphs": 0, "breaks": 0, "recompiles": 0, "psnr_db": float("inf"), "ssim": 1.0, "shows": None,
        "video": Path("video.mp4"),
    }  # fmt: skip
    return Column(name=name, **{**facts, **more})


def test_it_closes_with_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_demo(_: Request, columns: dict[str, Setting], *, out: str, **__: Any) -> DemoResult:
        compiled = {"compile_seconds": 4.5, "graphs": 1, "setting": columns["cogx_fast"]}
        return DemoResult(
            columns=(
                column("diffusers", shows="six, moving up"),
                column("cogx_fast", seconds_per_step=0.015, shows="six, moving up", **compiled),
                column("int8", seconds_per_step=0.01, psnr_db=31.26, ssim=0.97, shows="nothing", **compiled),
            ),
            rounds=2,
            files={"contact_sheet": Path(out) / "sheet", "plot": Path(out) / "plot"},
            warnings=("too long",),
        )

    monkeypatch.setattr("cogx_fast.pipelines.demo.run_demo", run_demo)
    options = ("--steps", "6", "--prompt", "a six", "--out", tmp_path)
    finished = run_cli("demo", *options)
    assert (finished.status, finished.err) == (0, "warning: too long\n")
    assert "“a six”: 17 frames, 64 × 64, 6 steps, seed 0, float32 on cpu" in finished.out
    rows = [re.split(r" {3,}", line) for line in finished.out.splitlines()]
    assert ["seconds per step (median)", "0.0200", "0.0150", "0.0100"] in rows
    assert ["ratio to diffusers", "1.00", "0.75", "0.50"] in rows
    assert ["  of it compiling", "–", "4.5", "4.5"] in rows
    assert ["graph breaks", "–", "0", "0"] in rows
    assert ["PSNR to diffusers' video", "–", "identical (inf dB)", "31.3 dB"] in rows
    assert ["SSIM to diffusers' video", "–", "1.0000", "0.9700"] in rows
    assert ["shows", "six, moving up", "six, moving up", "nothing"] in rows
    assert "Medians of 10 steps each: 2 runs of each in turns" in finished.out
    assert str(tmp_path / "sheet") in finished.out
    rows = [re.split(r" {3,}", line) for line in run_cli("demo", *options, "--no-compile").out.splitlines()]
    assert ["graphs", "–", "–", "–"] in rows
    facts = report(run_cli("demo", *options, "--json"))
    assert [(each["identical"], each["psnr_db"]) for each in facts["columns"][1:]] == [(True, None), (False, 31.26)]


def test_int8_is_a_column_of_a_compiled_demo() -> None:
    def names(*, compile: bool = True) -> list[str]:
        return list(module.settings(dtype=torch.float32, compile=compile))

    assert names() == ["diffusers", "cogx_fast", "cogx_fast, int8"]
    assert names(compile=False) == ["diffusers", "cogx_fast"]
    assert module.settings(dtype=torch.float32)["cogx_fast, int8"].quant == "int8-dynamic"


@pytest.mark.parametrize("has_products", [False, True])
def test_it_says_why_int8_is_not_for_this_cpu(has_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(int8: float, device: str = "cpu") -> str:
        quantized = column("int8", setting=Setting(quant="int8-dynamic"), seconds_per_step=int8)
        result = DemoResult(columns=(column("diffusers"), quantized), rounds=1, files={}, warnings=())
        request = Request(prompt="a six", size=VideoSize(frames=17, height=64, width=64))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
        return module.render(result, request, device=torch.device(device))

    monkeypatch.setattr(module, "has_int8_products", lambda: has_products)
    assert ("no AVX512-VNNI" in text(0.03)) is not has_products
    assert "int8 is for GPUs" in text(0.03)
    assert "int8 is for GPUs" not in text(0.01)
    assert "int8 is for GPUs" not in text(0.03, "cuda")
