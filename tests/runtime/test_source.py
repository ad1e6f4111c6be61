"""Whatever somebody put on a model, by whatever way: it is refused by its name before weights are taken, or kept."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import cogx_fast
from cogx_fast.runtime.attached import AttachedError
from tests.runtime.attached import build, run
from tests.support import RELEASED, inputs, pipeline_rotary, relative_error, small, upstream

CONFIG = small("5b")
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


def mine(*_: Any, **__: Any) -> None:
    """A user's hook."""


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


def refused(source: nn.Module, words: str) -> None:
    before = {name: tensor.data_ptr() for name, tensor in source.named_parameters()}
    with pytest.raises(AttachedError, match=f"(?s){words}.*What to do: "):
        cogx_fast.load(source)
    assert {name: tensor.data_ptr() for name, tensor in source.named_parameters()} == before


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_attached_is_refused_by_name_wherever_it_is(way: str, place: str) -> None:
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


@pytest.mark.parametrize("change", CHANGES)
def test_other_modules_and_settings_are_refused_by_name(change: str) -> None:
    source = upstream(CONFIG)
    make, words = CHANGES[change]
    make(source)
    refused(source, words)


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "spectral_norm"])
def test_parametrized_weights_are_refused(kind: str) -> None:
    source = upstream(CONFIG)
    make = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
    }[kind]
    make(source.proj_out)
    with pytest.raises(ValueError, match=r"proj_out\."):
        cogx_fast.load(source)


# -- classes -----------------------------------------------------------------------------------------------------------


def classes() -> dict[str, tuple[Any, str]]:
    from diffusers.models import attention, attention_processor, embeddings, normalization
    from diffusers.models.transformers import cogvideox_transformer_3d as model

    return {
        "model": (model.CogVideoXTransformer3DModel, "forward"),
        "block": (model.CogVideoXBlock, "forward"),
        "processor": (attention_processor.CogVideoXAttnProcessor2_0, "__call__"),
        "attention": (attention_processor.Attention, "forward"),
        "feed-forward": (attention.FeedForward, "forward"),
        "norm": (normalization.CogVideoXLayerNormZero, "forward"),
        "patches": (embeddings.CogVideoXPatchEmbed, "_get_positional_embeddings"),
        "linear": (nn.Linear, "forward"),
        "rotation": (embeddings, "apply_rotary_emb"),
        "timestep": (embeddings, "get_timestep_embedding"),
    }


@pytest.mark.parametrize(
    "which",
    ["model", "block", "processor", "attention", "feed-forward", "norm", "patches", "linear", "rotation", "timestep"],
)
@pytest.mark.parametrize("disguised", [False, True], ids=["", "disguised"])
def test_patched_classes_are_refused(which: str, disguised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = classes()[which]
    before = getattr(owner, name)

    def patched(*a: Any, **k: Any) -> Any:
        return before(*a, **k)

    source = upstream(CONFIG)
    monkeypatch.setattr(owner, name, functools.wraps(before)(patched) if disguised else patched)
    refused(source, f"{name} that is not its own")
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


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_nothing_is_taken(change: str) -> None:
    source = upstream(CONFIG)
    HARMLESS[change](source)
    model = cogx_fast.load(source)
    assert model.proj_out.weight.data_ptr() == source.proj_out.weight.data_ptr()


def test_settings_are_taken_along() -> None:
    source = upstream(CONFIG)
    assert not cogx_fast.load(source).gradient_checkpointing
    source.enable_gradient_checkpointing()
    model = cogx_fast.load(source, attention_plan="tiles")
    assert model.gradient_checkpointing
    assert model._gradient_checkpointing_func is None, "torch's own"
    source.enable_gradient_checkpointing(mine)
    assert cogx_fast.load(source)._gradient_checkpointing_func is mine
    assert cogx_fast.load(model).attention_plan == model.attention_plan


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_model_is_taken_and_is_ours_again(name: str) -> None:
    config = small(name)
    model = cogx_fast.load(upstream(config))
    again = cogx_fast.load(model)
    arguments = inputs(config)
    with torch.no_grad():
        assert torch.equal(again(**arguments).sample, model(**arguments).sample)


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


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", OURS)
def test_on_a_model_of_ours_it_is_refused_as_well(change: str, compile: bool) -> None:
    config = cogx_fast.CompileConfig(backend="eager") if compile else False
    model = cogx_fast.load(upstream(CONFIG), compile=config)
    make, words = OURS[change]
    make(model)
    refused(model, words)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_compiled_model_of_ours_is_taken(scope: str) -> None:
    compiled = build(scope)
    expected = run(compiled)
    assert relative_error(run(cogx_fast.load(compiled)), expected) <= 1e-5
    assert torch.equal(run(compiled), expected)


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapted(**options: Any) -> Any:
    from peft import LoraConfig

    source = upstream(CONFIG)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
    source.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets, **options), "style"
    )
    return source


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_adapters_are_taken_with_the_weights(options: dict[str, Any]) -> None:
    source = adapted(**options)
    arguments = inputs(CONFIG)
    arguments["image_rotary_emb"] = pipeline_rotary(CONFIG, arguments["hidden_states"])
    with torch.no_grad():
        plain = upstream(CONFIG)(**arguments).sample
        source.fuse_lora()
        expected = source(**arguments).sample
        assert relative_error(plain, expected) > 1e-2
        model = cogx_fast.load(source)
        assert relative_error(model(**arguments).sample, expected) <= 1e-5
        assert torch.equal(source(**arguments).sample, expected), "the source keeps working"
    name = "transformer_blocks.0.attn1.to_out.0"
    theirs = source.get_submodule(name).base_layer.weight
    assert model.get_submodule(name).weight.data_ptr() == theirs.data_ptr(), "shared"


def merged_and_disabled(source: Any) -> None:
    source.fuse_lora()
    source.disable_lora()


def one_of_two(source: Any) -> None:
    from peft import LoraConfig

    source.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "other")
    source.fuse_lora(adapter_names=["style"])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda s: None, "style"), (lambda s: s.disable_lora(), "style"), (merged_and_disabled, "style"),
        (one_of_two, "other"),
    ],
    ids=["not merged", "disabled", "merged and disabled", "one of two"],
)  # fmt: skip
def test_adapters_that_are_not_merged_are_refused_by_name(make: Callable[[Any], Any], name: str) -> None:
    source = adapted()
    make(source)
    with pytest.raises(ValueError, match=rf"adapters that are not merged.*{name}.*fuse_lora.*unload_lora_weights"):
        cogx_fast.load(source)


def test_hooks_under_an_adapter_are_seen() -> None:
    source = adapted()
    source.fuse_lora()
    source.transformer_blocks[0].attn1.to_q.base_layer.register_forward_hook(mine)
    refused(source, r"forward hook .*mine on transformer_blocks\.0\.attn1\.to_q")


def test_a_parametrization_that_changes_nothing_is_refused_too() -> None:
    """A parametrization that changes no values is refused, too: training through it would be lost."""
    source = upstream(CONFIG)
    parametrize.register_parametrization(source.proj_out, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"proj_out\.parametrizations"):
        cogx_fast.load(source)
