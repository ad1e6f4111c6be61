"""Whatever somebody put on a model, by whatever way: it is refused by its name before weights are taken, or kept."""

from __future__ import annotations

import functools
import pkgutil
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import cogx_fast
from cogx_fast.runtime.attached import AttachedError
from tests.cases import for_each
from tests.runtime.attached import CONFIG, build, mine, refused, run
from tests.support import inputs, relative_error, upstream

PLACES = {
    "the model": "",
    "a block": "transformer_blocks.1",
    "attention": "transformer_blocks.0.attn1",
    "a projection": "transformer_blocks.1.attn1.to_k",
    "a norm": "transformer_blocks.0.norm1",
    "the feed-forward": "transformer_blocks.1.ff",
    "an activation": "transformer_blocks.0.ff.net.0",
    "the head": "proj_out",
    "the embedding": "patch_embed",
}


def patch_instance(module: nn.Module) -> None:
    before = module.forward
    module.forward = types.MethodType(lambda self, *a, **k: before(*a, **k), module)


def patch_disguised(module: nn.Module) -> None:
    """As most libraries do: the new function has the old one's name and module."""
    before = module.forward

    @functools.wraps(before)
    def forward(*a: Any, **k: Any) -> Any:
        return before(*a, **k)

    module.forward = forward


def diffusers_hook(module: nn.Module) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Mine(ModelHook):
        pass

    HookRegistry.check_if_exists_or_initialize(module).register_hook(Mine(), "mine")


def accelerate_hook(module: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(module, ModelHook())


WAYS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "forward hook": (lambda m: m.register_forward_hook(mine), "forward hook .*mine"),
    "forward hook with kwargs": (lambda m: m.register_forward_hook(mine, with_kwargs=True), "forward hook .*mine"),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(mine), "forward pre-hook .*mine"),
    "backward hook": (lambda m: m.register_full_backward_hook(mine), "backward hook .*mine"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(mine), "backward pre-hook .*mine"),
    "state_dict hook": (lambda m: m.register_state_dict_post_hook(mine), "state_dict hook .*mine"),
    "state_dict pre-hook": (lambda m: m.register_state_dict_pre_hook(mine), "state_dict pre-hook .*mine"),
    "load_state_dict hook": (lambda m: m.register_load_state_dict_post_hook(mine), "load_state_dict post-hook .*mine"),
    "forward of the instance": (patch_instance, "a forward of its own"),
    "forward with the old name": (patch_disguised, r"a forward of its own \(.*forward"),
    "diffusers' hook": (diffusers_hook, "hook mine"),
    "accelerate's hook": (accelerate_hook, "accelerate's ModelHook"),
}


@for_each("place", PLACES.values(), "way", WAYS)
def test_what_is_attached_is_refused_by_name_wherever_it_is(place: str, way: str) -> None:
    source = upstream(CONFIG)
    attach, words = WAYS[way]
    attach(source.get_submodule(place))
    refused(source, f"{words}.* on {place or 'the model'}")


def test_every_module_is_looked_at() -> None:
    """Whatever module it is on, no one's hook is lost."""
    source = upstream(CONFIG)
    for name, module in source.named_modules():
        handle = module.register_forward_hook(mine)
        refused(source, f"forward hook .*mine on {name or 'the model'}")
        handle.remove()
    cogx_fast.load(source)


# -- other modules and settings ----------------------------------------------------------------------------------------


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def subclass(source: Any) -> None:
    from diffusers import CogVideoXTransformer3DModel

    class Changed(CogVideoXTransformer3DModel):
        def forward(self, *a: Any, **k: Any) -> Any:
            return super().forward(*a, **k)

    source.__class__ = Changed


class Shorter(nn.ModuleList):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(super().__iter__())[:1])


def processor(source: Any) -> Any:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

    class Half(CogVideoXAttnProcessor2_0):
        def __call__(self, *a: Any, **k: Any) -> Any:
            video, text = super().__call__(*a, **k)
            return video * 0.5, text

    return Half()


def replace(source: Any, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(source.get_submodule(parent), last, module)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a processor for all": (lambda s: s.set_attn_processor(processor(s)), "attention processor .*Half"),
    "a processor for one": (
        lambda s: setattr(s.transformer_blocks[1].attn1, "processor", processor(s)),
        r"attention processor .*Half on transformer_blocks\.1\.attn1",
    ),
    "another class of the model": (subclass, r"Changed with its own forward"),
    "another list": (lambda s: setattr(s.transformer_blocks, "__class__", Shorter), "Shorter with its own __iter__"),
    "another linear": (lambda s: setattr(s.proj_out, "__class__", Louder), "Louder with its own forward"),
    "another activation": (lambda s: replace(s, "time_embedding.act", nn.ReLU()), "ReLU on time_embedding.act"),
    "none in its place": (lambda s: replace(s, "norm_out.silu", nn.Identity()), "Identity on norm_out.silu"),
    "another formula": (lambda s: setattr(s.transformer_blocks[0].ff.net[0], "approximate", "none"), "approximate ="),
    "another epsilon": (lambda s: setattr(s.norm_final, "eps", 0.5), r"eps = 0\.5"),
    "more dropout": (lambda s: setattr(s.embedding_dropout, "p", 0.5), r"p = 0\.5"),
    "an added module": (lambda s: s.transformer_blocks[0].add_module("gate", nn.Tanh()), "added module gate"),
    "a gradient hook": (lambda s: s.proj_out.weight.register_hook(mine), r"gradient hook .* proj_out\.weight"),
    "an optimizer in the backward pass": (
        lambda s: s.proj_out.weight.register_post_accumulate_grad_hook(mine), "gradient hook .*mine"
    ),
    "a method of the instance": (lambda s: setattr(s, "save_pretrained", mine), "a save_pretrained of its own"),
}  # fmt: skip


@for_each("make, words", CHANGES.values(), ids=CHANGES)
def test_other_modules_and_settings_are_refused_by_name(make: Callable[[Any], Any], words: str) -> None:
    source = upstream(CONFIG)
    make(source)
    refused(source, words)


NORMS = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.spectral_norm


@for_each("norm", NORMS)
def test_parametrized_weights_are_refused(norm: Callable[[nn.Module], Any]) -> None:
    source = upstream(CONFIG)
    norm(source.proj_out)
    with pytest.raises(ValueError, match=r"proj_out\."):
        cogx_fast.load(source)


def test_a_parametrization_that_changes_nothing_is_refused_too() -> None:
    """Training through it would be lost."""
    source = upstream(CONFIG)
    parametrize.register_parametrization(source.proj_out, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"proj_out\.parametrizations"):
        cogx_fast.load(source)


# -- classes -----------------------------------------------------------------------------------------------------------


DIFFUSERS = "diffusers.models"
PATCHED = {
    "model": f"{DIFFUSERS}.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel.forward",
    "block": f"{DIFFUSERS}.transformers.cogvideox_transformer_3d.CogVideoXBlock.forward",
    "processor": f"{DIFFUSERS}.attention_processor.CogVideoXAttnProcessor2_0.__call__",
    "attention": f"{DIFFUSERS}.attention_processor.Attention.forward",
    "feed-forward": f"{DIFFUSERS}.attention.FeedForward.forward",
    "norm": f"{DIFFUSERS}.normalization.CogVideoXLayerNormZero.forward",
    "patches": f"{DIFFUSERS}.embeddings.CogVideoXPatchEmbed._get_positional_embeddings",
    "linear": "torch.nn.Linear.forward",
    "rotation": f"{DIFFUSERS}.embeddings.apply_rotary_emb",
    "timestep": f"{DIFFUSERS}.embeddings.get_timestep_embedding",
}


@for_each("which", PATCHED, "disguised", [False, True])
def test_patched_classes_are_refused(which: str, disguised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pkgutil.resolve_name(PATCHED[which])

    def patched(*a: Any, **k: Any) -> Any:
        return before(*a, **k)

    source = upstream(CONFIG)
    monkeypatch.setattr(PATCHED[which], functools.wraps(before)(patched) if disguised else patched)
    refused(source, f"{before.__name__} that is not its own")
    monkeypatch.undo()
    cogx_fast.load(source)


def test_a_method_of_another_class_is_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_processor

    fused = attention_processor.FusedCogVideoXAttnProcessor2_0.__call__
    monkeypatch.setattr(attention_processor.CogVideoXAttnProcessor2_0, "__call__", fused)
    refused(upstream(CONFIG), "__call__ that is not its own")


# -- what changes nothing is taken -------------------------------------------------------------------------------------


def hooked_and_freed(source: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import ModelHook as TheirHook

    registry = HookRegistry.check_if_exists_or_initialize(source)
    registry.register_hook(TheirHook(), "mine")
    registry.remove_hook("mine")
    add_hook_to_module(source.proj_out, ModelHook())
    remove_hook_from_module(source.proj_out)
    source.register_forward_hook(mine).remove()


def derived(source: Any) -> None:
    from diffusers import CogVideoXTransformer3DModel

    source.__class__ = type("Named", (CogVideoXTransformer3DModel,), {"__doc__": "Nothing of its own.", "tag": 1})


def forward_compiled(source: Any) -> None:
    source.forward = torch.compile(source.forward, backend="eager")


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda s: None,
    "training mode": lambda s: s.train(),
    "checkpointing": lambda s: s.enable_gradient_checkpointing(),
    "frozen": lambda s: s.requires_grad_(False),
    "another dtype": lambda s: s.to(torch.bfloat16),
    "compiled in place": lambda s: s.compile(backend="eager"),
    "a compiled block": lambda s: s.transformer_blocks[0].compile(backend="eager"),
    "a compiled forward": forward_compiled,
    "fused and unfused": lambda s: (s.fuse_qkv_projections(), s.unfuse_qkv_projections()),
    "processors as they were": lambda s: s.set_attn_processor(s.attn_processors),
    "a cache context": lambda s: s.cache_context("cond").__enter__(),
    "hooks that were removed": hooked_and_freed,
    "attributes of the user's": lambda s: setattr(s, "my_note", "hello"),
    "a class with nothing of its own": derived,
    "a representation": lambda s: setattr(s.proj_out, "extra_repr", lambda: "quantized"),
}


@for_each("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_is_taken(change: Callable[[Any], Any]) -> None:
    source = upstream(CONFIG)
    change(source)
    model = cogx_fast.load(source)
    assert model.proj_out.weight.data_ptr() == source.proj_out.weight.data_ptr()


def test_settings_are_taken_along() -> None:
    source = upstream(CONFIG)
    assert not cogx_fast.load(source).gradient_checkpointing
    source.enable_gradient_checkpointing()
    model = cogx_fast.load(source, attention_plan="tiles")
    assert model.gradient_checkpointing
    calls = []
    source.enable_gradient_checkpointing(lambda block, *arguments: calls.append(block) or block(*arguments))
    cogx_fast.load(source).train()(**inputs(CONFIG))
    assert len(calls) == CONFIG.num_layers
    assert cogx_fast.load(model).attention_plan == model.attention_plan


def test_processors_named_as_diffusers_own_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class CogVideoXAttnProcessor2_0:
        def __call__(self, *_: Any) -> None: ...

    model = cogx_fast.load(upstream(CONFIG))
    with pytest.raises(AttachedError, match=r"CogVideoXAttnProcessor2_0 cannot run.*set_attention_backend"):
        model.set_attn_processor(CogVideoXAttnProcessor2_0())


# -- one of ours as the source -----------------------------------------------------------------------------------------

OURS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda m: m.transformer_blocks[0].ff.register_forward_hook(mine), "forward hook .*mine"),
    "forward": (patch_instance, "a forward of its own"),
    "layerwise casting": (
        lambda m: m.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
        "hooks for layerwise_casting",
    ),
    "another module": (lambda m: setattr(m.proj_out, "__class__", Louder), "Louder with its own forward on proj_out"),
    "another epsilon": (lambda m: setattr(m.norm_final, "eps", 0.5), r"eps = 0\.5"),
}


@for_each("scope", ["eager", "block"], "change", OURS)
def test_on_a_model_of_ours_it_is_refused_as_well(scope: str, change: str) -> None:
    model = build(scope)
    make, words = OURS[change]
    make(model)
    refused(model, words)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_compiled_model_of_ours_is_taken(scope: str) -> None:
    compiled = build(scope)
    expected = run(compiled)
    assert relative_error(run(cogx_fast.load(compiled)), expected) <= 1e-5
    assert torch.equal(run(compiled), expected)
