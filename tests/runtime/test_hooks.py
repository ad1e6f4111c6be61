"""Hooks on a model of ours, while it is used: they work, eager and compiled, or are refused with their names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cogx_fast
from cogx_fast.model.layers import FeedForward
from cogx_fast.model.transformer import Block
from cogx_fast.runtime.attached import AttachedError
from cogx_fast.runtime.compiling.compile import RecompileError, RecompileWarning, watch_compilation
from tests.cases import for_each
from tests.runtime.attached import CONFIG, SCOPES, build, run
from tests.support import AROUND, relative_error, upstream

CPU = torch.device("cpu")

# -- the user's own ---------------------------------------------------------------------------------------------------


def halve(module: nn.Module, arguments: Any, output: Any) -> Any:
    return (output[0] * 0.5,) if isinstance(output, tuple) else output * 0.5


def patch(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *a, **k: before(*a, **k) * 0.5


ATTACH: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(halve),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:])),
    "forward": patch,
}
WHERE = [
    ("forward hook", "transformer_blocks.0"),
    ("forward hook", "transformer_blocks.1.ff"),
    ("pre-hook", "transformer_blocks.0.attn1.to_out.0"),
    ("forward", "transformer_blocks.1.ff"),
    ("forward", "transformer_blocks.0"),
    ("forward hook", "norm_out"),
]


TAKEN = {  # which of WHERE, before the first call and after it: compiling is what takes the time
    "eager": ((0, 1, 2, 3, 4, 5), ()),
    "block": ((1, 4), (0, 1, 2, 3, 4, 5)),
    "model": ((4,), (0, 2, 3)),
    "unrolled": ((5,), (1,)),
}


@pytest.mark.timeout(900)
@for_each(
    "scope, called, way, place",
    [
        (scope, called, *WHERE[index])
        for scope, taken in TAKEN.items()
        for called, indices in zip((False, True), taken, strict=True)
        for index in indices
    ],
)
def test_hooks_run_wherever_they_are_put(scope: str, called: bool, way: str, place: str) -> None:
    """On one block of several that share a graph, before it is compiled or after."""
    plain, model = build(), build(scope)
    without = run(plain)
    ATTACH[way](plain.get_submodule(place))
    expected = run(plain)
    assert relative_error(expected, without) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        if called:
            assert relative_error(run(model), without) <= 1e-5
        ATTACH[way](model.get_submodule(place))
        assert relative_error(run(model), expected) <= 1e-5


@for_each(
    "kind, scope",
    [(Block, "block"), (Block, "model"), (FeedForward, "block"), (nn.LayerNorm, "block"), (nn.LayerNorm, "model")],
)
def test_a_forward_given_to_a_class_runs_until_it_is_taken_away(
    kind: type[Any], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model, before = build(), build(scope), kind.forward
    expected = run(model)
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: before(self, *a, **k) * 0.5)
    with pytest.warns(RecompileWarning) if kind is not Block or scope == "model" else nullcontext():
        changed = run(model)
    assert relative_error(changed, run(plain)) <= 1e-5
    assert relative_error(changed, expected) > 1e-2
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        assert relative_error(run(model), expected) <= 1e-5


def test_a_hook_taken_away_is_gone() -> None:
    model = build("block")
    handle = model.transformer_blocks[1].ff.register_forward_hook(halve)
    changed = run(model)
    handle.remove()
    with pytest.warns(RecompileWarning, match="nothing is there any more"):
        plain = run(model)
    assert relative_error(plain, run(build())) <= 1e-5
    assert relative_error(plain, changed) > 1e-3


def test_compiling_anew_for_a_hook_is_told_and_can_be_an_error() -> None:
    model = build("block")
    run(model)
    model.transformer_blocks[1].ff.register_forward_hook(halve)
    with pytest.warns(RecompileWarning, match=r"attached inside it.*forward hook .*halve on transformer_blocks\.1\.ff"):
        run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)

    strict = cogx_fast.load(upstream(CONFIG), compile=cogx_fast.CompileConfig(backend="eager", strict=True))
    run(strict)
    strict.transformer_blocks[1].ff.register_forward_hook(halve)
    for _ in range(2):
        with pytest.raises(RecompileError, match="attached inside it"):
            run(strict)


def test_blocks_without_a_hook_keep_their_graph() -> None:
    model = build("block")
    run(model)
    model.transformer_blocks[1].ff.register_forward_hook(halve)
    with watch_compilation() as stats, pytest.warns(RecompileWarning):
        run(model)
    assert stats.graphs == 1


def test_a_hook_that_cannot_be_traced_is_named() -> None:
    def untraceable(module: nn.Module, arguments: Any, output: Tensor) -> None:
        torch._dynamo.graph_break()

    model = build("block")
    model.transformer_blocks[0].ff.register_forward_hook(untraceable)
    with pytest.raises(AttachedError, match=r"forward hook .*untraceable on transformer_blocks\.0\.ff.*compile=False"):
        run(model)


def test_a_copy_looks_for_itself() -> None:
    model = build()
    run(model)
    other = copy.deepcopy(model)
    other.transformer_blocks[0].attn1.processor = nn.Identity()
    with pytest.raises(AttachedError):
        run(other)
    run(model)


# -- what moves and casts weights --------------------------------------------------------------------------------------


def model_offload(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(model, CPU)


def sequential(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload(model, CPU)


def group(kind: str) -> Callable[[Any], None]:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda m: m.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)


def layerwise(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


MOVING: dict[str, Callable[[Any], None]] = {
    "model offload": model_offload,
    "sequential": sequential,
    "blocks": group("block_level"),
    "leaves": group("leaf_level"),
    "layerwise": layerwise,
}
OWNERS = {"sequential": "accelerate's AlignDevicesHook", "blocks": "group_offloading", "leaves": "group_offloading"}


@for_each("way", MOVING, "scope, called", [("eager", True), ("block", False), ("block", True), ("model", True)])
def test_offloading_and_casting_work_or_say_what_to_do_instead(scope: str, way: str, called: bool) -> None:
    plain, model = build(), build(scope)
    expected = run(plain)
    if called:
        run(model)
    MOVING[way](model)
    inside = way in ("sequential", "leaves", "layerwise") or (way == "blocks" and scope != "block")
    if scope == "eager" or not inside:
        assert relative_error(run(model), expected) <= (1e-2 if way == "layerwise" else 1e-5)
        return
    owner = OWNERS.get(way, "layerwise_casting")
    for _ in range(2):
        with pytest.raises(
            AttachedError, match=rf"{owner}.* on .*(?:compile=False).*enable_model_cpu_offload.*block_level"
        ):
            run(model)


def test_compiling_a_model_with_them_says_so_at_once() -> None:
    from cogx_fast.runtime.compiling.compile import compile_model

    model = build()
    layerwise(model)
    with pytest.raises(AttachedError, match=r"layerwise_casting.*compile=False"):
        compile_model(model, SCOPES["block"])


def test_compiling_again_and_not_at_all_keeps_hooks_and_patches() -> None:
    from cogx_fast.runtime.compiling.compile import compile_model, uncompile_model

    model = build("block")
    expected = run(model)
    group("block_level")(model)
    block = model.transformer_blocks[0]
    before = block.forward
    block.forward = lambda *a, **k: before(*a, **k) * 0.5
    halved = run(model)
    assert relative_error(halved, expected) > 1e-2
    compile_model(model, SCOPES["block"])
    assert relative_error(run(model), halved) <= 1e-5
    uncompile_model(model)
    assert relative_error(run(model), halved) <= 1e-5


def test_a_patch_of_a_compiled_block_that_cannot_pass_on_how_it_is_computed_is_named() -> None:
    model = build("block")
    block = model.transformer_blocks[1]
    before = block.forward
    block.forward = lambda x, mod, is_text, rotary, mask: before(x, mod, is_text, rotary, mask)
    with pytest.raises(AttachedError, match=r"forward of its own .* on transformer_blocks\.1.*take \*\*options"):
        run(model)


def test_blocks_that_had_a_hook_are_compiled() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    from cogx_fast.runtime.compiling.compile import compile_model

    class Mine(ModelHook):
        pass

    model = build()
    for block in model.transformer_blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Mine(), "mine")
        block._diffusers_hook.remove_hook("mine")
    compile_model(model, SCOPES["block"])
    with watch_compilation() as stats:
        run(model)
    assert stats.graphs == 1 + AROUND


def test_layerwise_casting_leaves_the_modulation_as_diffusers_leaves_its_norms() -> None:
    from cogx_fast.weights.layout import slots

    theirs, ours = upstream(CONFIG), build()
    for model in (theirs, ours):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, p in theirs.named_parameters() if p.dtype == torch.float8_e4m3fn}
    mine = {name for name, p in ours.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert mine == {slot.our_name for slot in slots(CONFIG).values() if slot.name in cast}
    assert relative_error(run(ours), run(theirs)) <= 1e-5
