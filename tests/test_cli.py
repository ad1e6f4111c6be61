from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.cli.output import quiet_libraries
from cogx_fast.config import PRESETS
from cogx_fast.model import cpu
from cogx_fast.pipelines import generation
from cogx_fast.pipelines.generation import Request
from cogx_fast.sizes import VideoSize
from cogx_fast.video.files import read_video
from tests.cases import for_each
from tests.conftest import Finished, report, run_cli


def generate(out: Path, *more: str | Path, model: str | Path = "tiny") -> Finished:
    return run_cli("generate", "--model", model, "--prompt", "a seven", "--steps", "2", "--out", out, *more)


@pytest.fixture(scope="module")
def image_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as an image-to-video one: twice the input channels."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel

    directory = tmp_path_factory.mktemp("i2v")
    parts = CogVideoXPipeline.from_pretrained(tiny_pipeline_dir()).components
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], in_channels=16, num_layers=2)
    parts["transformer"] = CogVideoXTransformer3DModel(**config)
    CogVideoXImageToVideoPipeline(**parts).save_pretrained(directory)
    return directory


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_writes_the_video_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "new" / "video.mp4"
    facts = report(generate(out, "--frames", "9", "--height", "96", "--fps", "12", "--dtype", "fp32", "--json"))
    assert read_video(out).shape == (9, 96, 64, 3)
    assert (facts["frames"], facts["height"], facts["width"], facts["fps"]) == (9, 96, 64, 12)
    assert (facts["dtype"], facts["device"], facts["compiled"], facts["warnings"]) == ("fp32", "cpu", False, [])
    assert 0 < facts["seconds"]["median_step"] < facts["seconds"]["total"]


@pytest.fixture
def with_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has instructions for bf16, whatever this one has."""
    for module in (cpu, generation):
        monkeypatch.setattr(module, "computes", lambda _: True)


@pytest.fixture
def without_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpu, generation):
        monkeypatch.setattr(module, "computes", lambda dtype: dtype == torch.float32)


@pytest.mark.usefixtures("with_half_precision")
def test_every_option_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    seen: list[Request] = []
    dtypes: list[torch.dtype] = []

    def run_pipeline(pipe: Any, request: Request, **_: Any) -> None:
        seen.append(request)
        dtypes.append(pipe.transformer.dtype)
        raise Stop

    monkeypatch.setattr("cogx_fast.pipelines.generation.run_pipeline", run_pipeline)
    options = ("--seed", "3", "--guidance", "1.5", "--negative-prompt", "a six", "--frames", "5", "--width", "80")
    assert generate(tmp_path / "video.mp4", *options).status == 1
    assert seen == [
        Request(
            prompt="a seven",
            negative_prompt="a six",
            size=VideoSize(frames=5, height=64, width=80),
            steps=2,
            seed=3,
            guidance=1.5,
        )
    ]
    assert dtypes == [torch.bfloat16]  # unless told otherwise


@pytest.mark.usefixtures("without_half_precision")
def test_generate_takes_fp32_where_the_cpu_lacks_the_stored_dtype(tmp_path: Path) -> None:
    finished = generate(tmp_path / "video.mp4", "--frames", "1", "--json")
    facts = report(finished)
    assert facts["dtype"] == "fp32"
    assert facts["warnings"] == [finished.err.removeprefix("warning: ").rstrip("\n")]
    assert "no bf16 instructions" in facts["warnings"][0]
    assert "it runs in fp32, unless --dtype says otherwise" in facts["warnings"][0]


@pytest.mark.usefixtures("without_half_precision")
def test_a_dtype_that_is_asked_for_is_taken_with_a_warning(tmp_path: Path) -> None:
    finished = generate(tmp_path / "video.mp4", "--frames", "1", "--dtype", "bf16", "--json")
    assert report(finished)["dtype"] == "bf16"
    assert finished.err.count("\n") == 1
    assert finished.err.startswith("warning: this CPU has no bf16 instructions")
    assert "--dtype fp32" in finished.err


@pytest.mark.usefixtures("without_half_precision")
def test_quantizing_computes_nothing_in_the_weights_dtype(tmp_path: Path) -> None:
    finished = run_cli("quantize", "tiny", "--recipe", "int8-weight-only", "--out", tmp_path / "int8")
    assert (finished.status, finished.err) == (0, "")


def test_generate_is_what_diffusers_generates(tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline

    from cogx_fast.video import files

    assert generate(tmp_path / "ours.mp4", "--seed", "3", "--frames", "9", "--dtype", "fp32").status == 0
    pipe = CogVideoXPipeline.from_pretrained(tiny_pipeline_dir())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    frames = pipe(
        "a seven", num_frames=9, num_inference_steps=2, max_sequence_length=8, generator=generator, output_type="np"
    ).frames[0]
    files.write_video(tmp_path / "theirs.mp4", frames, fps=8)
    ours, theirs = read_video(tmp_path / "ours.mp4"), read_video(tmp_path / "theirs.mp4")
    assert np.abs(ours.astype(int) - theirs).max() <= 8


@pytest.mark.usefixtures("with_half_precision")
def test_generate_in_bf16_and_in_words(tmp_path: Path) -> None:
    finished = generate(
        tmp_path / "video.mp4",
        "--dtype",
        "bf16",
        "--frames",
        "1",
        "--prompt",
        "a very big seven moving slowly to the left",
    )
    assert finished.status == 0
    assert finished.out.startswith(f"{tmp_path / 'video.mp4'}: 1 frame, 64 × 64, 8 fps\n")
    assert "bf16 on cpu" in finished.out
    assert finished.err == "warning: the prompt has 10 tokens and this model reads 8: it does not see 'the left'\n"


def test_a_length_that_the_vae_cannot_give_is_warned_of(tmp_path: Path) -> None:
    facts = report(generate(tmp_path / "video.mp4", "--frames", "5", "--dtype", "fp32", "--json"))
    assert len(read_video(tmp_path / "video.mp4")) == facts["frames"] == 8
    assert facts["warnings"] == [
        "the VAE makes 8 frames where 5 are asked for, for it decodes latent frames in pairs: ask for 1 or 9"
    ]


def test_generate_from_an_image(image_pipeline: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (100, 50), (200, 30, 30)).save(tmp_path / "image.png")
    finished = generate(
        tmp_path / "video.mp4", "--image", tmp_path / "image.png", "--frames", "9", "--dtype", "fp32", "--json",
        model=image_pipeline,
    )  # fmt: skip
    assert report(finished)["pipeline_class"] == "CogVideoXImageToVideoPipeline"
    assert read_video(tmp_path / "video.mp4").shape == (9, 64, 64, 3)


def test_an_image_model_without_an_image(image_pipeline: Path, tmp_path: Path) -> None:
    finished = generate(tmp_path / "video.mp4", model=image_pipeline)
    assert finished.status == 2
    assert "makes videos from an image: give one with --image" in finished.err


def test_a_failed_generation_leaves_the_old_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("cogx_fast.pipelines.generation.run_pipeline", fail)
    (tmp_path / "video.mp4").write_bytes(b"old")
    finished = generate(tmp_path / "video.mp4")
    assert (finished.status, finished.out) == (1, "")
    *warned, told = finished.err.splitlines()
    assert told == "error: RuntimeError: out of memory (--debug shows where)"
    assert all(line.startswith("warning: this CPU has no bf16 instructions") for line in warned)
    assert (tmp_path / "video.mp4").read_bytes() == b"old"
    assert "Traceback" in generate(tmp_path / "video.mp4", "--debug").err


# ---------------------------------------------------------------------------------------------------------------- info


@for_each("name", PRESETS)
def test_info_of_every_preset(name: str) -> None:
    facts = report(run_cli("info", name, "--json"))
    assert facts["config"] == dict(PRESETS[name])
    assert facts["parameters"]["total"] == sum(v for k, v in facts["parameters"].items() if k != "total")
    assert facts["flops_per_step"]["total"] > 0
    assert f"{facts['parameters']['total']:,}" in run_cli("info", name).out


def test_info_counts_for_the_size_that_was_asked_for() -> None:
    facts = report(
        run_cli("info", "5b", "--json", "--frames", "9", "--height", "256", "--width", "320", "--batch", "1")
    )
    assert facts["video"] == {"frames": 9, "height": 256, "width": 320, "batch": 1}
    assert facts["tokens"] == {"text": 226, "video": 3 * 16 * 20, "joint": 226 + 960, "grid": [3, 16, 20]}
    whole = report(run_cli("info", "5b", "--json"))
    assert whole["tokens"]["joint"] == 17_776
    assert whole["flops_per_step"]["total"] > 30 * facts["flops_per_step"]["total"]


def test_info_in_words() -> None:
    out = run_cli("info", "1.5-5b-i2v").out
    assert "226 text + 44,880 video (11 × 48 × 85) = 45,106" in out
    assert "81 frames, 768 × 1360, batch 2 (guidance)" in out
    assert "THUDM/CogVideoX1.5-5B-I2V" in out
    assert max(map(len, out.splitlines())) <= 100


def test_info_is_light() -> None:
    code = (
        "import sys\nfrom cogx_fast.cli import main\nassert main(['info', '5b']) == 0\n"
        "heavy = {'diffusers', 'transformers', 'imageio', 'matplotlib', 'PIL', 'skimage', 'torchao'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# -------------------------------------------------------------------------------------------------------- all commands

SAMPLE = ("--prompt", "a", "--out", "{tmp}/video.mp4")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no command": ((), "required"),
    "unknown command": (("draw",), "invalid choice"),
    "unknown preset": (("info", "6b"), "presets are 2b, 5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v, tiny"),
    "missing directory": (("info", "{tmp}/missing"), "no file or directory here"),
    "empty directory": (("info", "{tmp}"), "neither model_index.json (a pipeline) nor config.json"),
    "info of a bad size": (("info", "5b", "--height", "481"), "use 480 or 496"),
    "info of no size": (("info", "5b", "--width", "0"), "use 16"),
    "info of bad frames": (("info", "5b", "--frames", "48"), "use 45 or 49"),
    "info of no batch": (("info", "5b", "--batch", "0"), "1 or more"),
    "not a pipeline": (("generate", "--model", "{transformer}", *SAMPLE), "is a transformer, expected a pipeline"),
    "no such model": (("generate", "--model", "{tmp}/missing", *SAMPLE), "no file or directory here"),
    "no prompt": (("generate", "--model", "tiny", "--out", "{tmp}/video.mp4"), "--prompt"),
    "bad size": (("generate", "--model", "tiny", *SAMPLE, "--height", "70"), "use 64 or 80"),
    "bad frames": (("generate", "--model", "tiny", *SAMPLE, "--frames", "16"), "use 13 or 17"),
    "no steps": (("generate", "--model", "tiny", *SAMPLE, "--steps", "0"), "1 or more"),
    "bad seed": (("generate", "--model", "tiny", *SAMPLE, "--seed", "-1"), "from 0"),
    "unwritable": (("generate", "--model", "tiny", "--prompt", "a", "--out", "{tmp}/file/v.mp4"), "cannot write to"),
    "no .mp4": (("generate", "--model", "tiny", "--prompt", "a", "--out", "{tmp}/v.avi"), "ends in .mp4"),
    "a directory": (("generate", "--model", "tiny", "--prompt", "a", "--out", "{tmp}/d.mp4"), "is a directory"),
    "no device": (("generate", "--model", "tiny", *SAMPLE, "--device", "warp"), "'warp'"),
    "no backend": (("generate", "--model", "tiny", *SAMPLE, "--attention", "slow"), "choose one of sdpa, flex"),
    "no dtype": (("generate", "--model", "tiny", *SAMPLE, "--dtype", "fp4"), "invalid choice: 'fp4'"),
    "useless image": (("generate", "--model", "tiny", *SAMPLE, "--image", "{tmp}/file"), "from text alone"),
    "demo in one step": (("demo", "--steps", "1", "--out", "{tmp}/demo"), "expected 2 or more"),
    "demo to nowhere": (("demo", "--out", "{tmp}/file/demo"), "cannot write to"),
}  # fmt: skip


@for_each("arguments, message", BAD.values(), ids=BAD)
def test_bad_requests(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "d.mp4").mkdir()
    places = {"tmp": tmp_path, "transformer": tiny_pipeline_dir() / "transformer"}
    finished = run_cli(*(argument.format(**places) for argument in arguments))
    assert (finished.status, finished.out) == (2, "")
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1
    assert message in finished.err


def test_help_says_what_there_is() -> None:
    finished = run_cli("--help")
    assert finished.status == 0
    assert all(command in finished.out for command in ("demo", "generate", "compare", "info"))
    assert "--negative-prompt" in run_cli("generate", "--help").out


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogx_fast.cli.info.describe", lambda *_, **__: interrupt())
    finished = run_cli("info", "5b")
    assert (finished.status, finished.err) == (130, "error: interrupted\n")


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    finished = generate(tmp_path / "video.mp4")
    assert finished.status == 2
    assert finished.err == "error: diffusers is needed to run pipelines: pip install 'cogx-fast[pipelines,video]'\n"


def test_through_the_console_script() -> None:
    script = Path(sys.executable).with_name("cogx-fast")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "cogx_fast"]
    good = subprocess.run([*command, "info", "tiny", "--json"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["tokens"]["joint"] == 88
    bad = subprocess.run([*command, "info", "huge"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr


def test_libraries_are_loud_again_afterwards() -> None:
    import logging

    before = logging.root.manager.disable
    assert run_cli("info", "5b").status == 0
    assert logging.root.manager.disable == before


def test_our_warnings_are_lines_and_others_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    with quiet_libraries(debug=False):
        warnings.warn_explicit("ours", UserWarning, str(Path(cogx_fast.__file__).with_name("loading.py")), 1)
        warnings.warn_explicit("theirs", UserWarning, "/elsewhere/library.py", 1)
    assert capsys.readouterr().err == "warning: ours\n"
