"""Step caching: schedules, where they come from, and what a generation computes with one."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cogx_fast
from cogx_fast.attention.plan import hash_config
from cogx_fast.config import PRESETS
from cogx_fast.runtime.compile import CompileConfig, compile_model, uncompile_model, watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.runner import Runner
from cogx_fast.runtime.step_cache import place_of
from cogx_fast.runtime.step_schedule import EVEN, StepCacheError, StepSchedule
from cogx_fast.runtime.step_schedule_file import choose_strategy, read_schedule, render_schedule, write_schedule
from tests.support import inputs, relative_error, small

LAYERS = 4


def make(name: str = "5b", **options: Any) -> CogVideoXModel:
    torch.manual_seed(0)
    return CogVideoXModel(small(name, num_layers=LAYERS, **options)).eval().requires_grad_(False)


def timesteps(steps: int) -> Tensor:
    return torch.linspace(999, 1, steps).round().long()


class Counted(Runner):
    """Counts the blocks that each step computes."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.slots)
        self.blocks: list[int] = []

        def told(layer: int, block: Any) -> Any:
            self.blocks[-1] += 1
            return runner.slots.call_block(layer, block)

        self.slots = replace(self.slots, call_block=told)

    def __call__(self, model: Any, inputs: Any) -> Tensor:
        self.blocks.append(0)
        return super().__call__(model, inputs)


def generate(model: CogVideoXModel, schedule: Tensor, **size: Any) -> list[Tensor]:
    """As a pipeline does: every step on the last one's output, its timestep a view of the schedule's."""
    arguments = inputs(model.config, **size)
    latents, outputs = arguments.pop("hidden_states"), []
    with torch.no_grad():
        for timestep in schedule:
            arguments["timestep"] = timestep.expand(latents.shape[0])
            with model.cache_context("cond_uncond"):
                outputs.append(model(latents, **arguments).sample)
            latents = latents - 0.1 * outputs[-1][:, :, : latents.shape[2]]
    return outputs


def counted(model: CogVideoXModel, schedule: Tensor) -> list[int]:
    model.runner = runner = Counted(model.runner)
    generate(model, schedule)
    return runner.blocks


def schedule(*blocks: int, **options: Any) -> StepSchedule:
    return StepSchedule(blocks=blocks, num_layers=LAYERS, **options)


# -- what is computed --------------------------------------------------------------------------------------------------


def test_each_step_computes_as_many_blocks_as_the_schedule_says() -> None:
    model = make()
    model.set_step_cache(schedule(4, 4, 1, 0, 4, 1, 4))
    assert counted(model, timesteps(7)) == [4, 4, 1, 0, 4, 1, 4]


def test_a_schedule_of_whole_steps_changes_nothing() -> None:
    model = make()
    expected = generate(model, timesteps(3))
    model.set_step_cache(schedule(4, 4, 4))
    for output, want in zip(generate(model, timesteps(3)), expected, strict=True):
        assert torch.equal(output, want)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("forecast", ["reuse", "linear"])
def test_what_stands_in_is_what_the_blocks_added_before(first: int, forecast: Any) -> None:
    """Written out with hooks on the blocks, step by step."""
    model = make()
    model.set_step_cache(schedule(4, 4, first, 4, first, forecast=forecast))
    streams: list[dict[int, Tensor]] = []

    def note(layer: int) -> Callable[..., None]:
        return lambda module, given, output: streams[-1].update({layer: given[0], layer + 1: output})

    handles = [block.register_forward_hook(note(layer)) for layer, block in enumerate(model.transformer_blocks)]
    norms: list[Tensor] = []
    model.norm_final.register_forward_pre_hook(lambda module, given: norms.append(given[0]))
    model.register_forward_pre_hook(lambda *_: streams.append({}))
    begin = model.patch_embed.register_forward_hook(lambda module, given, output: streams[-1].update({0: output}))
    generate(model, timesteps(5))
    for handle in (*handles, begin):
        handle.remove()
    text = inputs(model.config)["encoder_hidden_states"].shape[1]

    def added(step: int) -> Tensor:
        return streams[step][LAYERS] - streams[step][first]

    def line(step: int, last: int, before: int) -> Tensor:
        return added(last) + (added(last) - added(before)) * (step - last) / (last - before)

    wanted = [added(1), added(3)] if forecast == "reuse" else [line(2, 1, 0), line(4, 3, 1)]
    for step, want in zip((2, 4), wanted, strict=True):
        assert relative_error(norms[step], (streams[step][first] + want)[:, text:]) <= 1e-5


def test_every_generation_starts_anew_and_keeps_nothing_at_its_end() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1, 4, forecast="linear"))
    first = generate(model, timesteps(4))
    again = generate(model, timesteps(4))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    reuse: Any = model.runner.slots.reuse
    assert vars(reuse._state) == {}


def test_an_interrupted_generation_leaves_nothing_to_the_next() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1, 4, forecast="linear"))
    expected = generate(model, timesteps(4))
    generate(model, timesteps(4)[:2])
    other = timesteps(4)
    for output, want in zip(generate(model, other), expected, strict=True):
        assert torch.equal(output, want)
    generate(model, other[:2])  # and with the same timesteps
    for output, want in zip(generate(model, other), expected, strict=True):
        assert torch.equal(output, want)


def test_another_size_within_a_generation_is_computed_whole() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1, 1))
    model.runner = runner = Counted(model.runner)
    steps = timesteps(4)
    arguments = inputs(model.config)
    larger = inputs(model.config, frames=6)
    with torch.no_grad():
        for timestep, given in zip(steps, (arguments, arguments, larger, larger), strict=True):
            model(**given | {"timestep": timestep.expand(2)})
    assert runner.blocks == [4, 1, 4, 1]


def test_two_threads_do_not_meet() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 4, 0, 1, 4))
    sizes: list[dict[str, Any]] = [{}, {"seed": 5, "frames": 6}]
    expected = [generate(model, timesteps(6), **size) for size in sizes]
    found: dict[int, list[Tensor]] = {}
    gate = threading.Barrier(2)

    def work(index: int) -> None:
        gate.wait()
        found[index] = generate(model, timesteps(6), **sizes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(expected):
        for one, other in zip(found[index], want, strict=True):
            assert torch.equal(one, other)


def test_two_contexts_do_not_meet_and_without_them_a_second_call_of_a_step_is_whole() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1))
    halves = [inputs(model.config, batch=1, seed=seed) for seed in (1, 2)]

    def both(contexts: Sequence[str]) -> list[int]:
        model.runner = runner = Counted(model.runner)
        for timestep in timesteps(3):
            for context, given in zip(contexts, halves, strict=True):
                with model.cache_context(context), torch.no_grad():
                    model(**given | {"timestep": timestep.expand(1)})
        return runner.blocks

    assert both(["cond", "uncond"]) == [4, 4, 1, 1, 1, 1]
    with pytest.warns(UserWarning, match="called twice in a step.*cache_context"):
        assert both(["", ""]) == [4] * 6


def test_a_timestep_of_no_schedule_is_computed_whole_and_said_once() -> None:
    model = make()
    model.set_step_cache("fast")
    model.runner = runner = Counted(model.runner)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for timestep in (torch.tensor([999, 999]), 900, torch.tensor([800])):
            model(**inputs(model.config) | {"timestep": timestep})
    assert runner.blocks == [4, 4, 4]
    assert ["no view of a scheduler's timesteps" in str(each.message) for each in told] == [True]


def test_gradients_are_of_whole_steps() -> None:
    model = make().requires_grad_(True)
    model.set_step_cache(schedule(4, 0))
    model.runner = runner = Counted(model.runner)
    for timestep in timesteps(2):
        model(**inputs(model.config) | {"timestep": timestep.expand(2)}).sample.sum().backward()
    assert runner.blocks == [4, 4]


def test_kept_tensors_are_freed_at_the_end() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1))
    steps = timesteps(3)
    kept: list[weakref.ref[Tensor]] = []
    reuse: Any = model.runner.slots.reuse
    with torch.no_grad():
        for timestep in steps:
            model(**inputs(model.config) | {"timestep": timestep.expand(2)})
            for generation in vars(reuse._state).values():
                kept += [weakref.ref(each.last) for each in generation.kept.values()]
    del generation
    gc.collect()
    assert len(kept) == 2
    assert all(ref() is None for ref in kept)


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_compiled_it_is_one_graph_for_two_generations_of_two_sizes() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 4, 0, 4, forecast="linear"))
    expected = [generate(model, timesteps(5)), generate(model, timesteps(5), frames=6, batch=1)]
    compile_model(model, CompileConfig(backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        found = [generate(model, timesteps(5)), generate(model, timesteps(5), frames=6, batch=1)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1, 0, 0)
    for outputs, wanted in zip(found, expected, strict=True):
        for output, want in zip(outputs, wanted, strict=True):
            assert relative_error(output, want) <= 1e-5
    uncompile_model(model)
    assert counted(model, timesteps(5)) == [4, 1, 4, 0, 4]  # it stays through compiling and back


def test_a_graph_of_the_whole_step_cannot_have_one() -> None:
    model = make()
    model.set_step_cache("fast")
    with pytest.raises(ValueError, match=r"reuse .*scope='block'"):
        compile_model(model, CompileConfig(scope="model", backend="eager"))
    model.set_step_cache(None)
    compile_model(model, CompileConfig(scope="model", backend="eager"))
    with pytest.raises(ValueError, match=r"reuse .*scope='block'"):
        model.set_step_cache("fast")


@pytest.mark.parametrize("option", [{"quant": "int8-weight-only"}, {"attention_plan": "tiles"}], ids=str)
def test_it_goes_with_quantization_and_plans(option: dict[str, Any]) -> None:
    model = cogx_fast.load(make(), **option)
    model.set_step_cache(schedule(4, 1, 4, 0, 4, forecast="linear"))
    assert counted(model, timesteps(5)) == [4, 1, 4, 0, 4]


def test_copies_have_it_too() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1))
    assert counted(copy.deepcopy(model), timesteps(3)) == [4, 1, 1]


# -- where the step is read from ---------------------------------------------------------------------------------------


def test_the_place_is_the_views_in_the_timesteps() -> None:
    steps = timesteps(5)
    for index, timestep in enumerate(steps):
        place = place_of(timestep.expand(3))
        assert place is not None
        assert place.step == index
        assert torch.equal(place.timesteps, steps)
    later = place_of(steps[2:][1].expand(2))  # video to video begins later
    assert later is not None
    assert later.step == 3
    assert place_of(steps[:2]) is None  # a timestep for each video
    assert place_of(torch.tensor([7]).expand(2)) is None


@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_pipelines_timesteps_are_found(scheduler: str) -> None:
    from tests.pipes import FRAMES, HEIGHT, WIDTH, make_pipe

    pipe = cogx_fast.accelerate(make_pipe("CogVideoXPipeline", "5b", scheduler=scheduler), step_cache="mask:1,1,0,0,1")
    runner = pipe.transformer.runner = Counted(pipe.transformer.runner)
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for guidance in (6.0, 1.0):
            pipe(
                "a",
                guidance_scale=guidance,
                max_sequence_length=8,
                num_inference_steps=5,
                output_type="latent",
                **size,
            )
    assert runner.blocks == [2, 2, 0, 0, 2] * 2


# -- schedules and strategies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize("steps", [20, 50])
def test_named_schedules_compute_so_many_times_fewer_blocks(name: str, steps: int) -> None:
    config = PRESETS["5b"]
    model: Any = type("Model", (), {"transformer_blocks": [None] * config.num_layers})
    made = EVEN[name].schedule(model, list(range(steps, 0, -1)))
    assert made.steps == steps
    assert made.blocks[0] == made.blocks[-1] == config.num_layers
    assert made.speedup == pytest.approx(EVEN[name].speedup, rel=0.1)


def test_teacache_skips_what_its_rule_skips() -> None:
    """The rule as its authors' loop has it, on the model's own embedding."""
    model = make(num_attention_heads=2)
    steps = timesteps(30)
    chosen: Any = choose_strategy("teacache:0.2", model.config)
    made = chosen.schedule(model, steps.tolist())
    coefficients = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)
    whole, added, before = [], 0.0, None
    for index, timestep in enumerate(steps):
        with torch.no_grad():
            emb = model.time_embedding(timestep[None], torch.float32)
        if before is None or index == len(steps) - 1:
            whole.append(True)
            added = 0.0
        else:
            change = ((emb - before).abs().mean() / before.abs().mean()).item()
            added += sum(c * change ** (4 - power) for power, c in enumerate(coefficients))
            whole.append(added >= 0.2)
            added = 0.0 if whole[-1] else added
        before = emb
    assert [count == LAYERS for count in made.blocks] == whole
    assert set(made.blocks) == {0, LAYERS}


def test_first_block_skips_where_its_threshold_allows() -> None:
    model = make()
    model.set_step_cache("first-block:1e9")
    assert counted(model, timesteps(4)) == [4, 1, 1, 1]
    model = make()
    model.set_step_cache("first-block:0")
    assert counted(model, timesteps(4)) == [4, 4, 4, 4]


def test_a_schedule_survives_its_file(tmp_path: Path) -> None:
    for made in (schedule(4, 1), schedule(4, 0, forecast="linear", config_hash="0f", error=0.25, origin='say "é"\n')):
        write_schedule(made, tmp_path / "s.toml")
        assert read_schedule(tmp_path / "s.toml") == made
        assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "format is 2"), ("[4, 1]", "[1, 1]", "first step"), ("[4, 1]", "[4, 9]", "0 to 4"),
        ("[4, 1]", "[4, true]", "whole numbers"), ("[4, 1]", "[]", "needs a step"), ("[4, 1]", "4", "whole numbers"),
        ('"reuse"', '"magic"', "forecast is 'magic'"), ("num_layers = 4", "layers = 4", "unknown keys layers"),
        ("num_layers = 4", "", "num_layers is missing"), ("num_layers = 4", 'num_layers = "4"', "expected a int"),
        ("format = 1", "format = ", "Invalid value"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = render_schedule(schedule(4, 1))
    assert old in text
    (tmp_path / "s.toml").write_text(text.replace(old, new))
    with pytest.raises(StepCacheError, match=message):
        cogx_fast.load(tmp_path / "nothing there", step_cache=tmp_path / "s.toml")  # before anything is loaded


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("slow", "'slow', expected quality, balanced"), ("teacache:much", "a number"), ("teacache:-1", "a number"),
        ("mask:1,2", "a 0 or 1"), ("mask:", "a 0 or 1"), ("mask:0,1", "begin with 1"), (7, "is a int"),
    ],
)  # fmt: skip
def test_what_is_no_step_cache_is_refused_before_anything_is_loaded(value: Any, message: str) -> None:
    with pytest.raises(StepCacheError, match=message):
        cogx_fast.load("nothing there", step_cache=value)


def test_another_models_schedule_is_refused() -> None:
    model = make()
    with pytest.raises(StepCacheError, match="3 layers"):
        model.set_step_cache(StepSchedule(blocks=(3, 1), num_layers=3))
    model.set_step_cache(schedule(4, 1, config_hash=hash_config(model.config)))
    with pytest.raises(StepCacheError, match="another configuration"):
        model.set_step_cache(schedule(4, 1, config_hash="0f"))


def test_another_number_of_steps_adapts_a_schedule_and_refuses_a_mask() -> None:
    model = make()
    model.set_step_cache(schedule(4, 4, 1, 1, 4))
    with pytest.warns(UserWarning, match="for 5 steps .* in 9"):
        assert counted(model, timesteps(9)) == [4, 4, 4, 1, 1, 1, 1, 4, 4]
    model = make()
    model.set_step_cache("mask:1,0,1")
    with pytest.raises(StepCacheError, match=r"3 steps .* in 4"):
        generate(model, timesteps(4))
