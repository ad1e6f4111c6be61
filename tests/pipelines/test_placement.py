"""``accelerate`` on pipelines that accelerate placed: it works and everything stays placed, or nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cogx_fast
from cogx_fast.runtime.attached import AttachedError
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.video.quality import psnr
from tests.cases import for_each
from tests.pipes import generate, make_pipe

CPU = torch.device("cpu")
COMPILED = cogx_fast.CompileConfig(backend="eager")


@pytest.fixture(scope="module")
def original() -> Any:
    return make_pipe("CogVideoXPipeline", "5b")


@pytest.fixture(scope="module")
def expected(original: Any) -> Any:
    return generate(original)


@pytest.fixture
def pipe(original: Any) -> Any:
    return copy_of(original)


def copy_of(original: Any) -> Any:
    copied = {name: copy.deepcopy(part) for name, part in original.components.items()}
    other = type(original)(**copied)
    other.set_progress_bar_config(disable=True)
    return other


def parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def balanced(pipe: Any) -> None:
    """As ``from_pretrained(device_map="balanced")`` leaves it, with both devices the CPU."""
    from accelerate import dispatch_model

    for part in parts(pipe).values():
        dispatch_model(part, {"": "cpu"}, main_device="cpu", force_hooks=True)
    pipe.hf_device_map = dict.fromkeys(parts(pipe), "cpu")


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does (T5 fails with it on a machine without a GPU)."""
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, CPU)
    cpu_offload(pipe.vae, CPU)


def by_hand(pipe: Any) -> None:
    from accelerate import cpu_offload_with_hook

    _, first = cpu_offload_with_hook(pipe.text_encoder, CPU)
    _, second = cpu_offload_with_hook(pipe.transformer, CPU, prev_module_hook=first)
    cpu_offload_with_hook(pipe.vae, CPU, prev_module_hook=second)


PLACED: dict[str, Callable[[Any], None]] = {
    "balanced": balanced,
    "model offload": model_offload,
    "sequential": sequential,
    "by hand": by_hand,
}


def state(pipe: Any) -> dict[str, Any]:
    """All that could be changed, by identity: modules, what is in them, weights, hooks; what hooks hold, by value."""
    found: dict[str, Any] = {}
    for part_name, part in parts(pipe).items():
        for name, module in part.named_modules():
            own = {key: id(value) for key, value in vars(module).items()}
            tensors = {key: id(value) for key, value in (module._parameters | module._buffers).items()}
            found[f"{part_name}.{name}"] = (id(module), own, tensors)
            for hook in getattr(vars(module).get("_hf_hook"), "hooks", [vars(module).get("_hf_hook")]):
                held = getattr(hook, "weights_map", None)
                if held is not None:
                    found[f"{part_name}.{name} held"] = [
                        held[each].double().sum().item() for each, _ in module.named_parameters(recurse=False)
                    ]
    found["hooks"] = [id(hook) for hook in getattr(pipe, "_all_hooks", [])]
    return found


@for_each("way", PLACED)
def test_the_pipeline_works_and_stays_placed(way: str, original: Any, expected: Any) -> None:
    pipe = copy_of(original)
    PLACED[way](pipe)
    before = {name: type(vars(part).get("_hf_hook")).__name__ for name, part in parts(pipe).items()}
    others = {name: value for name, value in state(pipe).items() if not name.startswith(("transformer", "hooks"))}
    device = pipe._execution_device
    theirs = pipe.transformer

    cogx_fast.accelerate(pipe)
    assert isinstance(pipe.transformer, CogVideoXModel)
    assert {name: type(vars(part).get("_hf_hook")).__name__ for name, part in parts(pipe).items()} == before
    assert {name: value for name, value in state(pipe).items() if name in others} == others
    assert pipe._execution_device == device
    for _ in range(2):  # model offload hooks anew after each call
        assert psnr(generate(pipe), expected) >= 60
    held = [hook.model for hook in getattr(pipe, "_all_hooks", [])]
    chained = getattr(vars(pipe.vae).get("_hf_hook"), "prev_module_hook", None)
    assert theirs not in held
    if way in ("model offload", "by hand"):
        assert chained.model is pipe.transformer, "the next model's hook moves this one away"


def test_sequential_offload_holds_the_new_weights_and_no_others(pipe: Any) -> None:
    sequential(pipe)
    theirs = pipe.transformer
    cogx_fast.accelerate(pipe)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    ours = pipe.transformer.transformer_blocks[0].attn1.to_qkv._hf_hook.weights_map["weight"]
    held = theirs.transformer_blocks[0].attn1.to_q._hf_hook.weights_map["weight"]
    assert held.data_ptr() == ours.data_ptr(), "shared, not doubled"


FAILING: dict[str, dict[str, Any]] = {
    "an unknown backend": {"attention": "fast"},
    "a device that is not there": {"device": "cuda:63"},
    "an unknown recipe": {"quant": "no-such-recipe"},
    "an unknown compiler": {"compile": True, "compile_cache": "nowhere/at/all.bundle", "dtype": "no-dtype"},
    "a plan of no name": {"attention_plan": "no-such-plan"},
}


@for_each("way", [*PLACED, "not at all"], "options", FAILING.values())
def test_after_an_error_the_pipeline_is_exactly_as_before(way: str, options: dict[str, Any], original: Any) -> None:
    pipe = copy_of(original)
    PLACED.get(way, lambda _: None)(pipe)
    before = state(pipe)
    with pytest.raises((ValueError, OSError)):
        cogx_fast.accelerate(pipe, **options)
    assert state(pipe) == before


def test_an_error_late_leaves_the_pipeline_working(pipe: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After weights were taken, which are shared: the hooks hold the same values, in another place of memory."""
    sequential(pipe)
    theirs = pipe.transformer

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("late")

    monkeypatch.setattr("accelerate.cpu_offload", fails)
    with pytest.raises(MemoryError):
        cogx_fast.accelerate(pipe)
    assert pipe.transformer is theirs
    np.testing.assert_array_equal(generate(pipe), expected)


def test_a_compiled_model_takes_hooks_around_it(pipe: Any, expected: Any) -> None:
    balanced(pipe)
    cogx_fast.accelerate(pipe, compile=COMPILED)
    assert psnr(generate(pipe), expected) >= 60


def test_compiling_with_hooks_on_every_module_is_refused_at_once(pipe: Any, expected: Any) -> None:
    sequential(pipe)
    theirs = pipe.transformer
    with pytest.raises(AttachedError, match=r"accelerate's AlignDevicesHook .*compile=False.*enable_model_cpu_offload"):
        cogx_fast.accelerate(pipe, compile=COMPILED)
    assert pipe.transformer is theirs
    np.testing.assert_array_equal(generate(pipe), expected)


# -- what cannot be kept -----------------------------------------------------------------------------------------------


def spread(pipe: Any, _: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.transformer.patch_embed, AlignDevicesHook("cpu"))
    add_hook_to_module(pipe.transformer.proj_out, AlignDevicesHook("meta"))


def disk(pipe: Any, folder: Any) -> None:
    from accelerate import disk_offload

    disk_offload(pipe.transformer, folder, CPU)


def own_hook(pipe: Any, _: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Mine(ModelHook):
        pass

    add_hook_to_module(pipe.transformer.proj_out, Mine())


KEPT_BY_NONE: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "a hook of the user's": (own_hook, r"Mine on proj_out.*remove_hook_from_module"),
    "several devices": (spread, r"spreads it over cpu, meta"),
    "the disk": (disk, r"offloads it to the disk"),
}


@for_each("place, words", KEPT_BY_NONE.values(), ids=KEPT_BY_NONE)
def test_placements_that_cannot_be_kept_are_named(
    place: Callable[[Any, Any], None], words: str, original: Any, tmp_path: Any
) -> None:
    pipe = copy_of(original)
    place(pipe, tmp_path)
    before = state(pipe)
    with pytest.raises(AttachedError, match=words):
        cogx_fast.accelerate(pipe)
    assert state(pipe) == before


@for_each("when", ["before", "after"], "way", ["balanced", "model offload", "sequential"])
def test_a_patch_under_or_over_the_placement_is_found(way: str, when: str, original: Any) -> None:
    """accelerate keeps the forward it finds under its own, where nothing shows it."""
    pipe = copy_of(original)

    def patch() -> None:
        before = pipe.transformer.forward
        pipe.transformer.forward = lambda *a, **k: before(*a, **k)

    if when == "before":
        patch()
    PLACED[way](pipe)
    if when == "after":
        patch()
    before = state(pipe)
    with pytest.raises(AttachedError, match=r"a forward of its own .*patch"):
        cogx_fast.accelerate(pipe)
    assert state(pipe) == before


def test_a_hook_of_the_users_own_on_the_whole_model_moves_along(pipe: Any) -> None:
    """It sees the same arguments and results as before."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Half(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return (output[0] * 0.5,)

    add_hook_to_module(pipe.transformer, Half())
    expected = generate(pipe)
    cogx_fast.accelerate(pipe)
    assert psnr(generate(pipe), expected) >= 60


def test_loading_the_transformer_alone_names_the_hooks(pipe: Any) -> None:
    model_offload(pipe)
    with pytest.raises(AttachedError, match=r"accelerate's CpuOffload on the model.*cogx_fast\.accelerate\(pipe\)"):
        cogx_fast.load(pipe.transformer)
