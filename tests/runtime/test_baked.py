"""Baked schedules: what the conditioning's weights compute, to the dtype's rounding, without them on the device."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cogx_fast
from cogx_fast.runtime.attached import AttachedError
from cogx_fast.runtime.baked import ScheduleError, Table, bake
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.streaming import stream_blocks
from tests.cases import for_each
from tests.pipes import generate, make_pipe
from tests.support import AROUND, RELEASED, inputs, relative_error, small

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def make(name: str = "5b", dtype: torch.dtype = torch.float32, **options: Any) -> CogVideoXModel:
    torch.manual_seed(0)
    model = CogVideoXModel(small(name, **options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.to(dtype)


def steps(model: CogVideoXModel, schedule: Tensor, **options: Any) -> Iterator[Tensor]:
    """A generation, whose timesteps are views of its scheduler's, as pipelines hand them over."""
    given = inputs(model.config, dtype=model.dtype, **options)
    for step in schedule:
        with torch.no_grad():
            sample = model(**given | {"timestep": step.expand(len(given["hidden_states"]))}).sample
        yield sample


def schedule_of(count: int) -> Tensor:
    return torch.linspace(999, 1, count).round().long()


@for_each("dtype", ROUNDING, "name", RELEASED)
def test_every_release_computes_the_same_to_its_rounding(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, baked = make(name, dtype), make(name, dtype)
    baked.set_schedule(True)
    tables: list[weakref.ref[Tensor]] = []

    def noted(*arguments: Any) -> Table:
        table = bake(*arguments)
        tables.append(weakref.ref(table.mod_TL12D))
        return table

    monkeypatch.setattr("cogx_fast.runtime.baked.bake", noted)
    for schedule in (schedule_of(4), schedule_of(3), schedule_of(6).float() + 0.25):
        for found, want in zip(steps(baked, schedule), steps(model, schedule), strict=True):
            assert relative_error(found, want) <= ROUNDING[dtype]
    gc.collect()
    held = [table() is not None for table in tables]
    assert held == [False, True, True], "two pipelines may take turns, and no more is held"


@pytest.mark.parametrize("scope", ["block", "model"])
def test_compiled_there_is_one_graph_for_every_schedule(scope: Any) -> None:
    model, baked = make(), make()
    baked.set_schedule(True)
    compile_model(baked, CompileConfig(scope=scope, backend="eager", strict=True))
    with watch_compilation() as stats:
        for count, batch in ((4, 2), (7, 2), (2, 2), (5, 1), (1, 1)):
            schedule = schedule_of(count)
            for found, want in zip(
                steps(baked, schedule, batch=batch), steps(model, schedule, batch=batch), strict=True
            ):
                assert relative_error(found, want) <= ROUNDING[torch.float32]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND * (scope == "block"), 0, 0)


def test_a_generation_reads_its_timesteps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    baked, read = make("1.5-5b-i2v"), []
    baked.set_schedule(True)
    given, schedule = inputs(baked.config), schedule_of(5)
    tolist, item = Tensor.tolist, Tensor.item
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (read.append(tensor.numel()), tolist(tensor))[1])
    monkeypatch.setattr(Tensor, "item", lambda tensor: (read.append(1), item(tensor))[1])
    for step in schedule:
        with torch.no_grad():
            baked(**given | {"timestep": step.expand(2)})
    assert sorted(read) == [1, 5], "ofs and the timesteps"


def test_the_modulation_lies_on_the_host_and_everything_else_moves() -> None:
    baked = make()
    baked.set_schedule(True)
    before = list(baked.modulation.parameters())
    baked.to("meta")
    assert all(one is other for one, other in zip(baked.modulation.parameters(), before, strict=True))
    assert {each.device.type for name, each in baked.named_parameters() if "modulation" not in name} == {"meta"}


def test_weights_that_change_and_timesteps_that_change_in_place_are_baked_anew() -> None:
    model, baked = make(), make()
    baked.set_schedule(True)
    schedule = schedule_of(3)
    list(steps(baked, schedule))
    schedule.add_(-1)
    for factor, assign in ((1.0, False), (1.1, False), (0.9, True)):
        changed = {name: tensor * factor for name, tensor in model.state_dict().items()}
        for each in (model, baked):
            each.load_state_dict({name: tensor.clone() for name, tensor in changed.items()}, assign=assign)
        for found, want in zip(steps(baked, schedule), steps(model, schedule), strict=True):
            assert relative_error(found, want) <= ROUNDING[torch.float32]
    for other in (copy.deepcopy(baked), cogx_fast.load(baked)):
        assert relative_error(next(steps(other, schedule)), next(steps(model, schedule))) <= ROUNDING[torch.float32]
    baked.set_schedule(None)
    assert torch.equal(next(steps(baked, schedule)), next(steps(model, schedule)))


@pytest.mark.parametrize("name", ["5b", "1.5-5b-i2v"])
def test_timesteps_of_no_known_schedule_are_computed_and_told_of_once(name: str) -> None:
    model, baked = make(name), make(name)
    baked.set_schedule([999, 500, 20])
    known = (500, torch.tensor([500, 20]), torch.tensor(999))
    unknown = (501, torch.tensor([999, 7]), schedule_of(1000)[300])
    for timesteps, times_told in ((known, 0), (unknown, 1)):
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for timestep in timesteps:
                given = inputs(model.config) | {"timestep": timestep}
                assert relative_error(baked(**given).sample, model(**given).sample) <= ROUNDING[torch.float32]
        assert len(told) == times_told
    if model.ofs_embedding is not None:
        given = inputs(model.config) | {"ofs": torch.tensor([2.0, 3.0])}
        with torch.no_grad():
            assert relative_error(baked(**given).sample, model(**given).sample) <= ROUNDING[torch.float32]


@for_each(
    "kind, preset, scheduler",
    [
        ("CogVideoXPipeline", "5b", "CogVideoXDPMScheduler"),
        ("CogVideoXImageToVideoPipeline", "1.5-5b-i2v", "CogVideoXDDIMScheduler"),
        ("CogVideoXVideoToVideoPipeline", "5b", "CogVideoXDDIMScheduler"),
    ],
)
def test_pipelines_make_the_same_video_and_follow_their_scheduler(kind: str, preset: str, scheduler: str) -> None:
    plain, baked = (make_pipe(kind, preset, scheduler=scheduler) for _ in range(2))
    cogx_fast.accelerate(plain)
    cogx_fast.accelerate(baked, schedule=baked.scheduler, offload="blocks")
    strength = {"strength": 0.6} if "VideoToVideo" in kind else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (3, 4):
            found, want = (generate(pipe, num_inference_steps=count, **strength) for pipe in (baked, plain))
            assert np.abs(found - want).max() <= 1e-3


def test_it_goes_with_what_else_there_is(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = make(num_layers=3, num_attention_heads=4).bfloat16()
    model.save_pretrained(tmp_path / "model")
    width, emb = model.config.inner_dim, model.config.time_embed_dim
    name = "transformer.transformer_blocks.1.norm1.linear.lora_{}.weight"
    save_file(
        {name.format("A"): torch.randn(4, emb), name.format("B"): torch.randn(6 * width, 4)}, tmp_path / "l.safetensors"
    )
    combinations: list[dict[str, Any]] = [
        {"quant": "int8-weight-only"},
        {"loras": [cogx_fast.Lora(str(tmp_path / "l.safetensors"), alpha=4)], "quant": "int8-weight-only"},
        {"step_cache": "balanced"},
        {"attention_plan": "radial", "offload": "blocks"},
    ]
    outputs = []
    for options in combinations:
        plain = cogx_fast.load(tmp_path / "model", **options)
        baked = cogx_fast.load(tmp_path / "model", schedule=True, **options)
        schedule = schedule_of(6)
        for found, want in zip(steps(baked, schedule), steps(plain, schedule), strict=True):
            assert relative_error(found, want) <= 2 * ROUNDING[torch.bfloat16], options
        outputs.append(want)
    assert relative_error(outputs[1], outputs[0]) > 0.01, "the LoRA on the modulation is in the table"
    baked.save_pretrained(tmp_path / "again")
    assert torch.equal(cogx_fast.load(tmp_path / "again").modulation.linear.weight, model.modulation.linear.weight)


def test_what_cannot_be_is_refused() -> None:
    for schedule, words in (("fast", "numbers"), ([], "0 timesteps"), ([0.5, float("nan")], "expected"), (3, "int")):
        with pytest.raises(ScheduleError, match=words):
            cogx_fast.load("/nothing/is/there", schedule=schedule)
    baked = make()
    baked.set_schedule(True)
    with pytest.raises(ScheduleError, match="no_grad"):
        baked(**inputs(baked.config))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"ScheduleError.*load\(\.\.\., compile=True\)"):
        torch.compile(baked, backend="eager", fullgraph=True)(**inputs(baked.config))
    baked.modulation.register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.raises(AttachedError, match="ahead of time"):
        baked(**inputs(baked.config))
    latents_alone = make().requires_grad_(False)
    latents_alone.set_schedule(True)
    given = inputs(baked.config)
    given["hidden_states"].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents_alone(**given).sample.sum().backward()
    assert given["hidden_states"].grad is not None
    stream_blocks(latents_alone, torch.device("cpu"))
