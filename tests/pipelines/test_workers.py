"""Pipelines in the processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from tests.conftest import report, run_cli

EXITS = """
import os, sys
if os.environ["RANK"] == "1":
    sys.exit()
from cogx_fast.runtime.distributed import ranks
ranks.start()
"""
STOPS = """
import os, signal
if os.environ.get("RANK") == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
"""
SCRIPT = """
import sys, time
import numpy, torch, torch.distributed as dist
from diffusers import CogVideoXPipeline
import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir

def on_step(pipe, step, timestep, tensors):
    if dist.get_rank() == 1 and step == 1:
        raise OSError("the disk is full")
    return tensors

pipe = CogVideoXPipeline.from_pretrained(tiny_pipeline_dir(), torch_dtype=torch.float32)
pipe = cogx_fast.accelerate(pipe, parallel=cogx_fast.ParallelConfig(guidance=2))
generator = torch.Generator().manual_seed(0)
pipe("a seven", num_frames=1, height=64, width=64, num_inference_steps=4, generator=generator,
     callback_on_step_end=on_step)
"""


def test_the_command_line_shares_a_video(tmp_path: Path) -> None:
    videos = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.mp4"
        size = ("--frames", 9, "--height", 64, "--width", 64, "--steps", 2)
        options = ("--model", "tiny", "--prompt", "a seven", "--no-compile", "--vae-tiling", "--nproc", processes)
        facts = report(run_cli("generate", *options, *size, "--out", out, "--json"))
        assert facts["processes"] == processes
        videos.append(imageio.imread(out).astype(float))
    assert np.abs(videos[0] - videos[1]).mean() < 0.25  # of 255, by the codec, where latents differ by rounding
    assert np.abs(videos[0] - videos[0][::-1]).mean() > 1  # as a wrong frame or half would


def test_what_cannot_be_shared_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    began = time.monotonic()
    finished = run_cli("generate", "--model", "tiny", "--prompt", "a", "--out", tmp_path / "a.mp4", "--nproc", 22)
    assert finished.status == 2
    assert "sequence=11 does not divide the model's" in finished.err
    assert time.monotonic() - began < 20


def test_a_process_that_is_stopped_before_it_has_joined_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOPS)
    size = ("--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--no-compile")
    command = [sys.executable, "-m", "cogx_fast", "generate", "--model", "tiny", "--prompt", "a seven", *size]
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])}
    finished = subprocess.run([*command, "--out", tmp_path / "a.mp4", "--nproc", "2"], capture_output=True, text=True,
                              timeout=100, check=False, env=os.environ | path)  # fmt: skip
    assert finished.returncode == 2
    assert "has given no sign of life for 12 s and is stopped" in finished.stderr
    assert "2 processes failed" in finished.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (SCRIPT, "rank 1 failed: OSError: the disk is full"),
        (EXITS, "rank 1 has ended, and this one still waits for it"),
    ],
    ids=["raises", "ends before it has joined"],
)
def test_a_script_that_fails_in_one_process_ends_all_and_says_where(script: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(script)
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run([*torchrun, file], capture_output=True, text=True, timeout=250, check=False)
    assert finished.returncode == 1
    assert expected in finished.stderr
