"""How the tiny pipeline is trained: each step runs, and a killed run goes on as if it had not been."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny import assemble, evaluate, loop, train
from benchmarks.tiny import transformer as stage
from benchmarks.tiny import vae as vae_stage
from cogx_fast import assets
from cogx_fast.assets import digits

PLAN = stage.TransformerPlan(steps=6, batch=4, warmup=2, compile=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Sums are then always taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> stage.Task:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(20, 5, 8, 8, 8, generator=generator)
    text = torch.randn(stage.EMPTY + 1, stage.MAX_TEXT, 64, generator=generator)
    return stage.Task(latents, torch.arange(20), text, PLAN)


def test_a_killed_run_ends_as_an_uninterrupted_one(task: stage.Task, tmp_path: Path) -> None:
    whole = stage.train_transformer(task, PLAN, tmp_path / "whole")
    stage.train_transformer(task, PLAN, tmp_path / "killed", stop_at=3)
    resumed = stage.train_transformer(task, PLAN, tmp_path / "killed")
    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert whole.history[-1][0] == resumed.history[-1][0] == PLAN.steps


def test_a_finished_run_is_taken_from_its_checkpoint(task: stage.Task, tmp_path: Path) -> None:
    first = stage.train_transformer(task, PLAN, tmp_path)
    task_that_fails = copy.copy(task)
    task_that_fails.latents = torch.empty(0)
    again = stage.train_transformer(task_that_fails, PLAN, tmp_path)
    assert torch.equal(again.model.proj_out.weight, first.model.proj_out.weight)
    assert not again.model.training


def test_the_number_of_steps_may_change_until_the_rate_falls(task: stage.Task, tmp_path: Path) -> None:
    longer = dataclasses.replace(PLAN, steps=8)
    stage.train_transformer(task, PLAN, tmp_path / "early", stop_at=3)
    changed = stage.train_transformer(task, longer, tmp_path / "early")
    expected = stage.train_transformer(task, longer, tmp_path / "whole")
    assert torch.equal(changed.model.proj_out.weight, expected.model.proj_out.weight)

    stage.train_transformer(task, PLAN, tmp_path / "late", stop_at=6)
    with pytest.raises(SystemExit, match="of a run of 6 steps"):
        stage.train_transformer(task, longer, tmp_path / "late")


def test_the_loss_falls(task: stage.Task, tmp_path: Path) -> None:
    plan = stage.TransformerPlan(steps=24, batch=4, warmup=2, compile=False)
    one = stage.Task(task.latents[:1], task.prompts[:1], task.text, plan)
    model, generator = stage.make_transformer(), torch.Generator().manual_seed(0)
    before = one.loss(model, generator).item()
    run = stage.train_transformer(one, plan, tmp_path)
    after = one.loss(run.model, torch.Generator().manual_seed(0)).item()
    assert before == pytest.approx(1.0, abs=0.1)  # a prediction of zero of a target of unit variance
    assert after < 0.97 * before


def test_every_prompt_has_its_own_text() -> None:
    pipe = assemble.text_side()
    text = stage.text_embeddings(pipe)
    assert text.shape == (51, stage.MAX_TEXT, 64)
    assert torch.pdist(text.flatten(1)).min() > 1.0
    for _, _, words in digits.all_prompts():
        assert len(pipe.tokenizer(words).input_ids) <= stage.MAX_TEXT


@pytest.mark.parametrize("whole", [False, True])
def test_a_step_of_the_vae_reaches_every_weight(whole: bool) -> None:
    vae, generator = vae_stage.make_vae(), torch.Generator().manual_seed(0)
    video = vae_stage.draw_batch(digits.load("train")[0], 1, generator, whole=whole)
    assert video.shape == ((1, 3, 17, 64, 64) if whole else (1, 3, 9, 32, 32))
    assert (video.min(), video.max()) == (-1, 1)
    vae_stage.vae_loss(vae, video, generator).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in vae.parameters())


@torch.no_grad()
def test_folded_statistics_change_latents_and_not_videos() -> None:
    vae = vae_stage.make_vae().eval()
    video = vae_stage.draw_batch(digits.load("train")[0], 1, torch.Generator().manual_seed(0), whole=True)
    before = vae.encode(video).latent_dist
    decoded = vae.decode(before.mean).sample
    deviation, mean = torch.linspace(0.5, 2.0, 8), torch.linspace(-1.0, 1.0, 8)
    shape = (1, 8, 1, 1, 1)

    vae_stage.fold_statistics(vae, torch.zeros(8), deviation)
    scaled = vae.encode(video).latent_dist
    assert torch.allclose(scaled.mean, before.mean / deviation.view(shape), atol=1e-5)
    assert torch.allclose(scaled.std, before.std / deviation.view(shape), rtol=1e-4)
    assert torch.allclose(vae.decode(scaled.mean).sample, decoded, atol=1e-4)

    vae_stage.fold_statistics(vae, mean, torch.ones(8))
    assert torch.allclose(vae.encode(video).latent_dist.mean, scaled.mean - mean.view(shape), atol=1e-5)


def test_workers_share_a_batch_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop.share(6) == 6
    monkeypatch.setattr(loop, "world", lambda: 4)
    assert loop.share(8) == 2
    with pytest.raises(ValueError, match="cannot be shared by 4 workers"):
        loop.share(6)


def test_the_assembled_pipeline_is_whole_and_unmodified_diffusers_runs_it(tmp_path: Path) -> None:
    model = stage.make_transformer()
    assemble.assemble(vae_stage.make_vae(), model, tmp_path / "pipeline")
    assert "_name_or_path" not in (tmp_path / "pipeline/model_index.json").read_text()
    listed = (tmp_path / "pipeline" / assets.CHECKSUMS).read_text()
    assert {line.split("  ")[1] for line in listed.splitlines()} == {
        path.relative_to(tmp_path / "pipeline").as_posix()
        for path in (tmp_path / "pipeline").rglob("*")
        if path.is_file() and path.name != assets.CHECKSUMS
    }
    pipe = evaluate.load_pipeline(tmp_path / "pipeline", torch.float32)
    assert pipe.text_encoder.dtype == pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    clips = evaluate.generate(pipe, ["the digit seven moving left"] * 2, seed=0, steps=2, guidance=6.0)
    assert (clips.shape, clips.dtype) == ((2, 17, 64, 64, 3), np.uint8)
    alone = evaluate.generate(pipe, ["the digit seven moving left"], seed=0, steps=2, guidance=6.0)
    assert np.abs(alone[0].astype(int) - clips[0]).max() <= 1  # a clip does not depend on its batch


def test_one_prompt_gives_one_row_of_the_contact_sheet(tmp_path: Path) -> None:
    from PIL import Image

    evaluate.contact_sheet(np.zeros((50, 17, 64, 64, 3), np.uint8), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (5 * (3 * 66 + 6), 10 * 66)


ON_A_DESCRIBED_GPU = """
import ctypes, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from benchmarks.codegen import inductor, shim
from benchmarks.tiny import transformer as stage, vae as vae_stage
from cogx_fast.assets import digits
from cogx_fast.measure import devices

if torch.version.cuda is None:
    ctypes.CDLL(str(shim.guard()))
inductor.describe(devices.get_device("h100"))
generator, pictures = torch.Generator().manual_seed(0), torch.rand(10, 28, 28)
with FakeTensorMode(allow_non_fake_inputs=True):
    with torch.device("cuda"):
        model, vae = stage.make_transformer(), vae_stage.make_vae()
    plan = stage.TransformerPlan(batch=4)
    task = stage.Task(torch.randn(20, 5, 8, 8, 8), torch.arange(20), torch.randn(51, 8, 64), plan)
    print(task.loss(model, generator).device)
    video = vae_stage.draw_batch(pictures, 1, generator, whole=True)
    print(vae_stage.vae_loss(vae, video, generator).device)
    clips = digits.draw_clips(torch.arange(4), torch.arange(4), generator)
    print(vae_stage.encode(vae, clips, pictures).device)
    vae_stage.fold_statistics(vae, torch.zeros(8), torch.ones(8))
"""


def test_every_step_runs_where_the_model_is() -> None:
    """With fake tensors of a GPU that is only described, which refuse to mix with those of the CPU."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_A_DESCRIBED_GPU],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cuda:0", "cuda:0", "cpu"]


def test_a_gpu_is_not_shared_by_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--work", str(tmp_path / "work"), "--device", "cuda", "--workers", "2"])
    assert "--workers 2 with --device cuda" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.gpu
def test_the_loss_falls_on_a_gpu_as_on_the_cpu(task: stage.Task, tmp_path: Path) -> None:
    on_cpu = stage.train_transformer(task, PLAN, tmp_path / "cpu")
    on_gpu = stage.train_transformer(task, PLAN, tmp_path / "gpu", "cuda")
    assert on_gpu.model.device.type == "cuda"
    assert on_gpu.history[-1][1] == pytest.approx(on_cpu.history[-1][1], rel=0.02)  # the same draws, other rounding
