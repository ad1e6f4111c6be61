"""What cannot run in a model of ours is refused as it is put on it, with its name: caches, processors, adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cogx_fast
from cogx_fast.attention.backends import BACKENDS, UPSTREAM_NAMES
from cogx_fast.runtime.attached import AttachedError
from tests.cases import for_each
from tests.runtime.attached import CONFIG, build, run
from tests.support import relative_error, upstream

# -- diffusers' caches, skipping and guidance --------------------------------------------------------------------------


def apply_pab(model: Any) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(model, config)


def apply_faster(model: Any) -> None:
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    config = FasterCacheConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    apply_faster_cache(model, config)


def apply_first_block(model: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig())


def apply_mag(model: Any) -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    apply_mag_cache(model, MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4))


def apply_taylor_lite(model: Any) -> None:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    apply_taylorseer_cache(model, TaylorSeerCacheConfig(use_lite_mode=True))


def skip(**options: bool) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        from diffusers.hooks import LayerSkipConfig, apply_layer_skip

        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", **options))

    return apply


def smoothed_energy(model: Any) -> None:
    from diffusers.hooks import smoothed_energy_guidance_utils as utils

    config = utils.SmoothedEnergyGuidanceConfig(indices=[1], fqn="transformer_blocks")
    utils._apply_smoothed_energy_guidance_hook(model, config, 1.0)


CACHES: dict[str, Callable[[Any], None]] = {
    "pyramid attention broadcast": apply_pab,
    "faster cache": apply_faster,
    "first block cache": apply_first_block,
    "mag cache": apply_mag,
    "taylorseer, lite": apply_taylor_lite,
    "layer skip": skip(),
    "layer skip of feed-forwards": skip(skip_attention=False, skip_ff=True),
    "layer skip of attention": skip(skip_attention=True, skip_ff=False),
    "layer skip of scores": skip(skip_attention=False, skip_attention_scores=True, skip_ff=False),
    "smoothed energy guidance": smoothed_energy,
}


@for_each("cache", CACHES)
def test_diffusers_hooks_into_its_blocks_are_refused_as_they_are_applied(cache: str) -> None:
    model = build()
    expected = run(model)
    with pytest.raises(AttachedError, match="use diffusers' own transformer"):
        CACHES[cache](model)
    assert torch.equal(run(model), expected), "nothing of it stays"


def test_on_a_torch_module_they_are_refused_at_the_next_call() -> None:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    model = build()
    run(model)
    config = TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.attn1\.to_out\.0"])
    apply_taylorseer_cache(model, config)
    for _ in range(2):
        with pytest.raises(AttachedError, match=r"taylorseer_cache .*to_out\.0 and 1 more.*remove_hook"):
            run(model)
    for block in model.transformer_blocks:
        block.attn1.to_out[0]._diffusers_hook.remove_hook("taylorseer_cache")
    run(model)


def test_the_users_own_hooks_in_diffusers_registry_run() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Half(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 0.5

    model = build()
    expected = run(model)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1].ff).register_hook(Half(), "half")
    assert relative_error(run(model), expected) > 1e-3


# -- processors and backends -------------------------------------------------------------------------------------------


class Other:
    def __call__(self, *_: Any, **__: Any) -> None: ...


class OtherModule(nn.Module):
    pass


SETTERS: dict[str, Callable[[Any, Any], None]] = {
    "set_attn_processor": lambda m, p: m.set_attn_processor(p),
    "a dict": lambda m, p: m.set_attn_processor(dict.fromkeys(m.attn_processors, p)),
    "set_processor": lambda m, p: m.transformer_blocks[1].attn1.set_processor(p),
    "attribute": lambda m, p: setattr(m.transformer_blocks[1].attn1, "processor", p),
}


@for_each("kind", [Other, OtherModule], "setter", SETTERS)
def test_other_processors_are_refused_however_they_are_set(setter: str, kind: type) -> None:
    model = build()
    run(model)

    def set_and_run() -> None:
        SETTERS[setter](model, kind())
        run(model)  # a module set as an attribute is torch's to put in place

    with pytest.raises(AttachedError, match=rf"attention processor .*{kind.__name__}.*set_attention_backend"):
        set_and_run()


@for_each("setter", SETTERS)
def test_diffusers_own_processor_is_taken_however_it_is_set(setter: str) -> None:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

    model = build()
    expected = run(model)
    SETTERS[setter](model, CogVideoXAttnProcessor2_0())
    assert torch.equal(run(model), expected)
    assert model.transformer_blocks[1].attn1.get_processor().name == "sdpa"


def test_a_processor_whose_class_was_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

    model = build()
    monkeypatch.setattr(CogVideoXAttnProcessor2_0, "__call__", lambda *_, **__: None)
    with pytest.raises(AttachedError, match="CogVideoXAttnProcessor2_0 cannot run"):
        model.set_attn_processor(CogVideoXAttnProcessor2_0())


def test_dicts_of_processors_must_name_every_layer() -> None:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

    model, own = build(), CogVideoXAttnProcessor2_0()
    names = list(model.attn_processors)
    with pytest.raises(ValueError, match="one attention backend for all layers"):
        model.set_attn_processor(dict(zip(names, (BACKENDS["sdpa"], BACKENDS["flex"]), strict=True)))
    for wrong in ({names[0]: own}, {}, dict.fromkeys([*names, "other.processor"], own)):
        with pytest.raises(ValueError, match=rf"dict of {len(wrong)} processors .*there are 2 attention layers"):
            model.set_attn_processor(wrong)
    with pytest.raises(ValueError, match=r"processors other\.processor are of no layer"):
        model.set_attn_processor({names[0]: own, "other.processor": own})


NAMES = {"native": "sdpa", "_native_math": "sdpa-math", "flex": "flex", "NATIVE": "sdpa", "sdpa-math": "sdpa-math"}


@for_each("theirs, ours", NAMES.items())
def test_diffusers_names_of_backends_are_taken(theirs: str, ours: str) -> None:
    model = build()
    model.set_attention_backend("flex")
    model.set_attention_backend(theirs)
    assert list(model.attention_backends) == [ours]


def test_every_name_of_diffusers_is_taken_or_explained() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert UPSTREAM_NAMES.keys() <= {name.value for name in AttentionBackendName}
    assert set(UPSTREAM_NAMES.values()) <= BACKENDS.keys()
    model = build()
    for name in AttentionBackendName:
        if UPSTREAM_NAMES.get(name.value) in ("sdpa", "flex", "sdpa-math"):
            model.set_attention_backend(name)
            continue
        model.set_attention_backend("sdpa")
        with pytest.raises(ValueError, match=r"cannot run here: .*Here run sdpa|is not known: choose one of sdpa"):
            model.set_attention_backend(name.value)
        assert list(model.attention_backends) == ["sdpa"]


def test_resetting_the_backend_goes_back_to_the_default() -> None:
    model = build()
    model.set_attention_backend("flex")
    model.reset_attention_backend()
    assert list(model.attention_backends) == ["sdpa"]
    chosen = cogx_fast.load(upstream(CONFIG), attention="auto")
    chosen.set_attention_backend("sdpa-math")
    chosen.reset_attention_backend()
    assert list(chosen.attention_backends) == [chosen.attention_choice.name]


# -- adapters ----------------------------------------------------------------------------------------------------------


@for_each(
    "targets",
    [["to_q", "to_k", "to_v", "to_out.0"], ["ff.net.2"], "all-linear"],
    "function",
    ["get_peft_model", "inject_adapter_in_model"],
)
def test_pefts_functions_are_refused_and_leave_nothing(function: str, targets: Any) -> None:
    import peft

    model = build()
    expected, names = run(model), [name for name, _ in model.named_modules()]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    with pytest.raises(AttachedError, match=r"adapters cannot stand in this model.*add_adapter.*load_lora_weights"):
        peft.get_peft_model(model, config) if function == "get_peft_model" else peft.inject_adapter_in_model(
            config, model
        )
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(run(model), expected)


def test_an_adapter_put_by_hand_is_refused_at_the_next_call() -> None:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    model = build()
    run(model)
    layer = model.transformer_blocks[1].attn1.to_out
    layer[0] = LoraLinear(layer[0], "mine", config=LoraConfig(r=2), r=2)
    with pytest.raises(AttachedError, match=r"an adapter .*to_out\.0"):
        run(model)
