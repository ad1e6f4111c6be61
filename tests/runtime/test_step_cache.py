"""Step caching: what a generation computes with a schedule."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cogx_fast
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, uncompile_model, watch_compilation
from cogx_fast.runtime.step_caching.step_cache import place_of
from cogx_fast.runtime.step_caching.step_schedule import StepCacheError
from tests.cases import for_each
from tests.runtime.generations import LAYERS, Counted, counted, generate, generate_guided, make, schedule, timesteps
from tests.support import AROUND, inputs, relative_error

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


@for_each("first", [0, 1, 3], "forecast", ["reuse", "linear"])
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


def test_fitted_weights_mix_what_the_last_whole_steps_added() -> None:
    model = make()
    weights = ((), (), (), (0.5, 0.3, 0.2), (2.0, -1.0))
    model.set_step_cache(schedule(4, 4, 4, 0, 0, forecast="fitted", weights=weights))
    kept: list[Tensor] = []
    mixed: list[Tensor] = []
    reuse: Any = model.runner.slots.reuse

    def watched(compute: Any, x_BSD: Tensor, *rest: Any) -> Tensor:
        after: Tensor = reuse(compute, x_BSD, *rest)
        (kept if len(kept) < 3 else mixed).append(after - x_BSD)
        return after

    model.runner.use(replace(model.runner.slots, reuse=watched))
    generate(model, timesteps(5))
    wanted = 0.5 * kept[2] + 0.3 * kept[1] + 0.2 * kept[0], 2 * kept[2] - kept[1]
    for found, want in zip(mixed, wanted, strict=True):
        assert relative_error(found, want) <= 1e-5


@for_each("first", [4, 1], "forecast", ["reuse", "linear"])
def test_the_unconditional_half_keeps_its_difference(first: int, forecast: Any) -> None:
    """A step with one half computes the blocks of that alone, and the other is as far from it as it was."""
    model = make()
    made = schedule(4, 4, first, forecast=forecast, unconditional=(1, 1, 0))
    model.set_step_cache(made)
    streams: list[Tensor] = []
    rows: list[list[int]] = []
    reuse: Any = model.runner.slots.reuse

    def watched(compute: Any, x_BSD: Tensor, *rest: Any) -> Tensor:
        rows.append([])
        streams.append(reuse(compute, x_BSD, *rest))
        return streams[-1]

    model.runner.use(replace(model.runner.slots, reuse=watched))
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda module, given: rows[-1].append(len(given[0])))
    generate_guided(model, timesteps(3), batch=4)
    assert rows == [[4] * 4, [4] * 4, [2] * first]
    before, last, now = (each.chunk(2)[0] - each.chunk(2)[1] for each in streams)
    want = last if forecast == "reuse" else 2 * last - before
    assert relative_error(now, want) <= 1e-5
    alone = streams[2].chunk(2)[1]
    model.runner.slots = replace(model.runner.slots, reuse=reuse)
    model.set_step_cache(schedule(4, 4, first, forecast=forecast))
    streams.clear()
    again: Any = model.runner.slots.reuse
    model.runner.use(replace(model.runner.slots, reuse=lambda *given: streams.append(again(*given)) or streams[-1]))
    generate_guided(model, timesteps(3), batch=4)
    assert relative_error(alone, streams[2].chunk(2)[1]) <= 1e-5  # the conditional half is as without halves


def test_calls_without_guidance_are_whole_where_halves_would_part() -> None:
    model = make()
    model.set_step_cache(schedule(4, 4, 4, 1, unconditional=(1, 0, 1, 0)))
    rows: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    generate(model, timesteps(4), batch=2)  # two videos of their own noise
    generate(model, timesteps(4), batch=1)
    arguments = inputs(model.config)
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    tokens = arguments["encoder_hidden_states"].shape[1] + frames * height * width // 4
    mask = torch.ones(2, tokens, dtype=torch.bool)
    arguments["hidden_states"][1] = arguments["hidden_states"][0]
    with torch.no_grad():
        for timestep in timesteps(4):
            model(**arguments | {"timestep": timestep.expand(2)}, attention_kwargs={"attention_mask": mask})
    assert rows == [2] * 4 + [1] * 4 + [2] * 4


def test_every_generation_starts_anew() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 1, 4, forecast="linear"))
    first = generate(model, timesteps(4))
    again = generate(model, timesteps(4))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


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
    arguments, streams = inputs(model.config), []
    model.transformer_blocks[0].register_forward_pre_hook(lambda module, given: streams.append(given[0].shape))

    def alive() -> int:
        """Tensors of the stream's size."""
        gc.collect()
        return sum(type(each) is Tensor and each.shape == streams[0] for each in gc.get_objects())

    kept = []
    with torch.no_grad():
        for timestep in steps:
            model(**arguments | {"timestep": timestep.expand(2)})
            kept.append(alive())
    assert kept[0] == kept[1] == kept[2] + 1


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_compiled_it_is_one_graph_for_two_generations_of_two_sizes() -> None:
    model = make()
    model.set_step_cache(schedule(4, 1, 4, 0, 4, forecast="linear"))
    expected = [generate(model, timesteps(5)), generate(model, timesteps(5), frames=6, batch=1)]
    compile_model(model, CompileConfig(backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        found = [generate(model, timesteps(5)), generate(model, timesteps(5), frames=6, batch=1)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    for outputs, wanted in zip(found, expected, strict=True):
        for output, want in zip(outputs, wanted, strict=True):
            assert relative_error(output, want) <= 1e-5
    uncompile_model(model)
    assert counted(model, timesteps(5)) == [4, 1, 4, 0, 4]  # it stays through compiling and back


@pytest.mark.parametrize("scope", ["block", "model"])
def test_compiled_halves_apart_are_as_many_graphs_as_patterns(scope: Any) -> None:
    """Two guided generations of two sizes and one without guidance: whole, one half whole, none of one half, none."""
    model = make()
    model.set_step_cache(schedule(4, 4, 4, 0, 4, 0, unconditional=(1, 0, 1, 0, 0, 0), forecast="linear"))

    def every() -> list[Tensor]:
        sizes: list[dict[str, Any]] = [{}, {"frames": 6, "batch": 4}]
        guided = [each for size in sizes for each in generate_guided(model, timesteps(6), **size)]
        return guided + generate(model, timesteps(6), frames=6, batch=1)

    expected = every()
    compile_model(model, CompileConfig(scope=scope, backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        found = every()
    assert (stats.graphs, stats.breaks, stats.recompiles) == (4 if scope == "model" else 1 + AROUND, 0, 0)
    for output, want in zip(found, expected, strict=True):
        assert relative_error(output, want) <= 1e-5


def test_a_graph_of_the_whole_step_goes_with_what_is_settled_before_it() -> None:
    model = make()
    model.set_step_cache("first-block:0.1")
    with pytest.raises(ValueError, match=r"first-block.*scope='block'"):
        compile_model(model, CompileConfig(scope="model", backend="eager"))
    model.set_step_cache(schedule(4, 0, 1, 2))
    compile_model(model, CompileConfig(scope="model", backend="eager"))
    with pytest.raises(StepCacheError, match=r"5 kinds of steps .*4 at most.*scope='block'"):
        model.set_step_cache(schedule(4, 0, 1, 2, 3))
    with pytest.raises(StepCacheError, match=r"6 kinds of steps .*1 block of one half"):
        model.set_step_cache(schedule(4, 0, 1, unconditional=(1, 0, 0)))


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
