"""``cogx-fast compare`` and the figures and pictures under it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogx_fast.assets import CHECKSUMS, tiny_pipeline_dir
from cogx_fast.video import compare, plots, quality
from cogx_fast.video.files import read_video, write_video
from tests.cases import for_each
from tests.conftest import Finished, report, run_cli

CLIP = np.random.default_rng(0).integers(40, 200, (9, 32, 48, 3), dtype=np.uint8)


def changed() -> Any:
    """The clip with its first frame as it is and the others darker and darker."""
    return CLIP - np.arange(9, dtype=np.uint8)[:, None, None, None]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("videos")
    write_video(directory / "a.mp4", CLIP, fps=8)
    write_video(directory / "b.mp4", changed(), fps=8)
    write_video(directory / "slow.mp4", CLIP, fps=4)
    write_video(directory / "short.mp4", CLIP[:5], fps=8)
    write_video(directory / "small.mp4", CLIP[:, :16], fps=8)
    write_video(directory / "short_and_small.mp4", CLIP[:5, :16], fps=8)
    write_video(directory / "flat.mp4", CLIP[:, :, :6], fps=8)
    (directory / "damaged.mp4").write_bytes((directory / "a.mp4").read_bytes()[:200])
    return directory


def compare_settings(first: str, second: str, out: Path, *more: str) -> Finished:
    quick = ("--steps", "2", "--frames", "9", "--prompt", "the digit seven moving left")
    return run_cli("compare", "--model", "tiny", *quick, "--out", out, first, second, *more)


# -------------------------------------------------------------------------------------------------------------- figures


def test_figures() -> None:
    found = compare.compare_videos(changed(), CLIP)
    assert found.psnr_db == quality.psnr(changed(), CLIP)
    assert found.ssim == pytest.approx(quality.ssim(changed(), CLIP))
    assert (found.worst, found.identical_frames) == (8, 1)
    psnr = [20 * np.log10(255 / off) for off in range(1, 9)]
    assert [frame for frame, _ in found.frames][1:] == pytest.approx(psnr)
    assert found.mean_psnr_db == pytest.approx(np.mean(psnr))
    assert found.steadiness is not None
    same = compare.compare_videos(CLIP[:1], CLIP[:1])
    assert (same.psnr_db, same.mean_psnr_db, same.ssim, same.steadiness) == (np.inf, np.inf, 1.0, None)


def test_differences_are_made_visible() -> None:
    off, gain = compare.difference(changed(), CLIP)
    assert gain == 16
    assert np.array_equal(off[:, 0, 0, 0], 16 * np.arange(9))
    assert compare.difference(CLIP, CLIP)[0].max() == 0
    assert compare.difference(np.zeros_like(CLIP), np.full_like(CLIP, 255))[1] == 1
    one = CLIP.copy()
    one[0, 0, 0, 0] += 1
    assert compare.difference(one / np.float32(255), CLIP)[0].max() == 64


@for_each(
    "figures",
    [[(30.0, 0.9)], [(np.inf, 1.0)] * 3, [(np.inf, 1.0), (40.0, 0.99), (30.0, 0.5)], [(30.0, 0.9)] * 2, [(0.0, -0.1)]],
)
def test_frames_are_drawn(figures: list[tuple[float, float]]) -> None:
    picture = plots.plot_frames(figures, fps=8, title="A $ and B")
    assert picture.width > picture.height > 500
    assert np.asarray(picture).std() > 5


@for_each("psnr", [(np.inf,), (np.inf, 30.0), (60.0, 30.0)])
def test_speed_is_drawn(psnr: tuple[float, ...]) -> None:
    points = [plots.Point(name=f"way {i}", steps_per_second=5.0 + i, psnr_db=value) for i, value in enumerate(psnr)]
    reference = plots.Point(name="diffusers", steps_per_second=5.0, psnr_db=np.inf)
    assert np.asarray(plots.plot_speed(points, reference=reference, title="speed")).std() > 5


# ---------------------------------------------------------------------------------------------------------------- files


def test_two_files(videos: Path, tmp_path: Path) -> None:
    from PIL import Image

    facts = report(run_cli("compare", videos / "a.mp4", videos / "b.mp4", "--out", tmp_path, "--json"))
    first, second = read_video(videos / "a.mp4"), read_video(videos / "b.mp4")
    assert facts["psnr_db"] == quality.psnr(first, second)
    expected = quality.per_frame(first, second)
    assert [(frame["psnr_db"] or np.inf, frame["ssim"]) for frame in facts["per_frame"]] == expected
    assert facts["worst_frame"] == int(np.argmin([psnr for psnr, _ in expected]))
    assert (facts["frames"], facts["height"], facts["width"], facts["fps"]) == (9, 32, 48, 8)
    assert (facts["identical"], facts["seconds"], facts["warnings"]) == (False, None, [])
    files = {name: Path(path) for name, path in facts["files"].items()}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()}
    beside = read_video(files["video"])
    assert len(beside) == 9
    assert beside.shape[2] > 3 * 48 * (256 // 32)
    for name in ("contact_sheet", "plot"):
        with Image.open(files[name]) as picture:
            picture.load()


def test_two_files_in_words(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(videos / "a.mp4", tmp_path / "copy")
    finished = run_cli("compare", videos / "a.mp4", copy, "--out", tmp_path)
    assert (finished.status, finished.err) == (0, "")
    assert finished.out.startswith(f"{videos.name}/a.mp4 and copy/a.mp4: 9 frames, 32 × 48 · 8 fps\n")
    rows = [re.split(r" {3,}", line) for line in finished.out.splitlines()]
    assert ["all frames together", "identical", "1.0000"] in rows
    assert ["worst frame (1)", "identical", "1.0000"] in rows


def test_files_of_other_rates_are_compared_with_a_warning(videos: Path, tmp_path: Path) -> None:
    finished = run_cli("compare", videos / "a.mp4", videos / "slow.mp4", "--out", tmp_path)
    assert "a.mp4 and slow.mp4: 9 frames, 32 × 48 · 8 fps\n" in finished.out
    assert finished.err.count("\n") == 1
    assert "slow.mp4 at 4" in finished.err


WRONG = {
    "other length": (
        ("{v}/a.mp4", "{v}/short.mp4"),
        "a.mp4 has 9 frames, 32 × 48, {v}/short.mp4 has 5 frames, 32 × 48: to compare them frame by frame make them of "
        "one length and size (cut {v}/a.mp4 with ffmpeg's -frames:v 5)",
    ),
    "other size": (("{v}/a.mp4", "{v}/small.mp4"), "(scale {v}/small.mp4 with ffmpeg's -vf scale=48:32)"),
    "both": (("{v}/short_and_small.mp4", "{v}/a.mp4"), "(cut {v}/a.mp4 with ffmpeg's -frames:v 5 and scale"),
    "too small": (("{v}/flat.mp4", "{v}/flat.mp4"), "7 pixels"),
    "missing": (("{v}/a.mp4", "{v}/missing.mp4"), "missing.mp4' is not there"),
    "damaged": (("{v}/a.mp4", "{v}/damaged.mp4"), "damaged.mp4' cannot be read as one: give a whole .mp4"),
    "file and setting": (("{v}/a.mp4", "dtype=fp32"), "'dtype=fp32' is a setting and '{v}/a.mp4' is none"),
    "options of settings": (
        ("{v}/a.mp4", "{v}/b.mp4", "--negative-prompt", "x", "--compile"),
        "--negative-prompt, --compile is for settings",
    ),
    "no model": (("dtype=fp32", "dtype=bf16"), "--model is needed as well"),
    "no prompt": (("dtype=fp32", "dtype=bf16", "--model", "tiny"), "--prompt is needed as well"),
    "unknown key": (("dtyp=fp32", "dtype=bf16"), "got 'dtyp=fp32', expected key=value with a key of transformer"),
    "unknown value": (("dtype=fp32", "dtype=fp4"), "setting 'dtype=fp4': dtype: got 'fp4', expected fp32 or bf16 or"),
    "no switch": (("compile=yes", "compile=on"), "compile: got 'yes', expected on or off"),
    "no steps": (("steps=0", "steps=2"), "steps: got '0', expected a whole number, 1 or more"),
    "no number": (("guidance=much", "steps=2"), "guidance: could not convert"),
    "twice": (("seed=1,seed=2", "steps=2"), "seed is given twice"),
    "no backend": (("attention=slow", "steps=2"), "choose one of sdpa, flex"),
    "not for diffusers": (("transformer=diffusers,attention=flex", "steps=2"), "leave it out there"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio-ffmpeg: pipes left to the garbage collector
@for_each("arguments, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_compared(arguments: tuple[str, ...], message: str, videos: Path, tmp_path: Path) -> None:
    words = [argument.format(v=videos) for argument in arguments]
    if "=" in words[0] and "is needed" not in message:
        words += ["--model", "tiny", "--prompt", "a"]
    finished = run_cli("compare", "--out", tmp_path / "out", *words)
    assert (finished.status, finished.out) == (2, "")
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1
    assert message.format(v=videos) in finished.err


# ------------------------------------------------------------------------------------------------------------- settings


def test_two_settings(tmp_path: Path) -> None:
    facts = report(
        compare_settings("transformer=diffusers", "transformer=cogx_fast", tmp_path, "--dtype", "fp32", "--json")
    )
    assert facts["identical"] or facts["psnr_db"] >= 60
    assert (facts["model"], facts["frames"], len(facts["per_frame"])) == ("tiny", 9, 9)
    assert [each["transformer"] for each in facts["settings"]] == ["diffusers", "cogx_fast"]
    assert len({(each["dtype"], each["steps"], each["seed"]) for each in facts["settings"]}) == 1
    assert all(0 < each["median_step"] < each["total"] for each in facts["seconds"])
    assert (facts["shows"] is not None) == (tiny_pipeline_dir() / CHECKSUMS).is_file()


def test_two_settings_in_words_with_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Path(shutil.copytree(tiny_pipeline_dir(), tmp_path / "tiny"))
    (trained / CHECKSUMS).touch()
    monkeypatch.setattr("cogx_fast.assets.tiny_pipeline_dir", lambda: trained)
    finished = compare_settings("dtype=fp32", "dtype=fp32, steps=1", tmp_path / "out")
    assert (finished.status, finished.err) == (0, "")
    assert finished.out.startswith(
        "“the digit seven moving left”: tiny · 9 frames, 64 × 64 · 8 fps · guidance 6 · seed 0\n"
    )
    rows = {row[0]: row[1:] for row in (re.split(r" {3,}", line) for line in finished.out.splitlines())}
    assert rows["seconds per step (median)"][1] == "–"  # its only step is the first
    assert len(rows["shows"]) == 2


def test_every_setting_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    asked: list[Any] = []

    class Stop(Exception):
        pass

    def open_pipeline(_: Any, setting: Any, **__: Any) -> Any:
        opened.append(setting)
        raise Stop

    monkeypatch.setattr("cogx_fast.pipelines.generation.open_pipeline", open_pipeline)
    changes = "transformer=cogx_fast,dtype=bf16,compile=on,attention=flex"
    assert compare_settings(changes, "steps=3", tmp_path).status == 1
    assert compare_settings("transformer=diffusers", "steps=3", tmp_path, "--compile").status == 1
    first, second = opened
    assert (str(first.dtype), first.compile, first.attention) == ("torch.bfloat16", True, "flex")
    assert (second.transformer, second.compile, second.attention) == ("diffusers", True, "auto")

    def run_pipeline(_: Any, request: Any, **__: Any) -> Any:
        asked.append(request)
        raise Stop

    monkeypatch.undo()
    monkeypatch.setattr("cogx_fast.pipelines.generation.run_pipeline", run_pipeline)
    assert compare_settings("steps=7,guidance=1.5,seed=3", "steps=3", tmp_path).status == 1
    assert [(request.steps, request.guidance, request.seed) for request in asked] == [(7, 1.5, 3)]
