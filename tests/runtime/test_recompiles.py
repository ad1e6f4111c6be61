"""One graph holds for every size, batch and text; what does compile again is explained, or refused."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import pytest
import torch

from cogx_fast.runtime.compiling.compile import (
    CompileConfig,
    RecompileError,
    RecompileWarning,
    compile_model,
    uncompile_model,
    watch_compilation,
)
from cogx_fast.runtime.module import CogVideoXModel
from tests.support import AROUND, RELEASED, inputs, predict, relative_error, small

RESOLUTIONS = [(12, 10), (10, 12), (8, 8), (12, 16), (16, 12), (6, 10), (14, 8), (20, 4)]
FRAMES = [4, 6, 8]
TEXTS = [8, 5, 3]


def make(name: str, attention: str = "sdpa", **changes: Any) -> CogVideoXModel:
    torch.manual_seed(0)
    return CogVideoXModel(small(name, **changes), attention=attention).eval()


def calls(model: CogVideoXModel, *, batches: tuple[int, ...] = (1, 2, 4)) -> list[dict[str, Any]]:
    """8 resolutions × 3 lengths, each with another batch, text, length of it and timesteps; batch 1 first."""
    chosen = zip(itertools.product(FRAMES, RESOLUTIONS), itertools.cycle(batches), itertools.cycle(TEXTS), strict=False)
    fixed = model.config.use_learned_positional_embeddings
    return [
        inputs(
            model.config,
            frames=frames,
            height=None if fixed else height,
            width=None if fixed else width,
            batch=batch,
            text_len=text,
            seed=seed,
        )
        | {"timestep": torch.arange(batch) * 7 + seed * 40}
        for seed, ((frames, (height, width)), batch, text) in enumerate(chosen)
    ]


@pytest.mark.parametrize(("attention", "batches"), [("sdpa", (1, 2, 4)), ("flex", (1, 2, 4)), ("sdpa", (2, 1, 4))])
def test_one_compilation_holds_for_all_sizes_batches_and_texts(attention: str, batches: tuple[int, ...]) -> None:
    """Compiled for a batch of one first, which torch by itself compiles apart, and for two first."""
    model, eager = make("5b", attention), make("5b")
    eager.load_state_dict(model.state_dict())
    compile_model(model, CompileConfig(strict=True))
    with watch_compilation() as stats:
        errors = [relative_error(predict(model, each), predict(eager, each)) for each in calls(model, batches=batches)]
    assert len(errors) == 24
    assert max(errors) <= 1e-5
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)


@pytest.mark.parametrize(
    ("name", "scope"), [*((name, "block") for name in RELEASED), ("2b", "model"), ("1.5-5b-i2v", "model")]
)
def test_no_released_model_recompiles(name: str, scope: Any) -> None:
    model = make(name)
    compile_model(model, CompileConfig(scope=scope, backend="eager", strict=True))
    with watch_compilation() as stats:
        for arguments in calls(model)[::5]:
            predict(model, arguments)
    assert (stats.graphs, stats.recompiles) == (1 + AROUND * (scope == "block"), 0)


def test_quantized_activations_are_one_graph_for_all_batches_too() -> None:
    """torchao asks whether there are rows at all, and whether more than one."""
    import quant

    model, eager = (make("5b", num_layers=1).requires_grad_(False) for _ in range(2))
    for each in (model, eager):
        quant.quantize(each, "int8-dynamic")
    compile_model(model, CompileConfig(backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        for arguments in calls(model)[:3]:
            # norm and rotation are written otherwise when compiling; a value on the edge then rounds to the next int8
            assert relative_error(predict(model, arguments), predict(eager, arguments)) <= 3e-4
    assert (stats.graphs, stats.recompiles) == (1 + AROUND, 0)


def test_a_torch_that_cannot_be_told_of_a_least_batch_compiles_a_batch_of_one_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As 2.11, which fuses nothing with a symbol that it knows nothing of."""
    mark = torch._dynamo.decorators.mark_unbacked

    def mark_as_in_2_11(t: Any, index: int, hint_override: int, strict: bool = False, *, shape_id: str) -> None:
        mark(t, index, hint_override=hint_override, shape_id=shape_id)

    monkeypatch.setattr(torch._dynamo.decorators, "mark_unbacked", mark_as_in_2_11)
    model = make("5b", num_layers=1).requires_grad_(False)
    compile_model(model, CompileConfig(backend="aot_eager"))
    with watch_compilation() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        for arguments in calls(model)[:3]:
            predict(model, arguments)
    assert stats.graphs == 2 * (1 + AROUND)


def test_a_mask_is_symbolic_too() -> None:
    model, eager = make("5b"), make("5b")
    eager.load_state_dict(model.state_dict())
    compile_model(model, CompileConfig(backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        for arguments in calls(model)[:4]:
            batch, text, frames = *arguments["encoder_hidden_states"].shape[:2], arguments["hidden_states"].shape[1]
            height, width = arguments["hidden_states"].shape[3:]
            mask = torch.ones(batch, text + frames * height * width // 4, dtype=torch.bool)
            mask[:, 1] = False
            arguments["attention_kwargs"] = {"attention_mask": mask}
            assert relative_error(predict(model, arguments), predict(eager, arguments)) <= 1e-5
            assert not hasattr(mask, "_dynamo_dynamic_indices")
    assert (stats.graphs, stats.recompiles) == (1 + AROUND, 0)


@pytest.mark.parametrize("scope", ["block", pytest.param("model", marks=pytest.mark.slow)])
def test_training_is_one_graph_for_all_sizes(scope: Any) -> None:
    model, eager = make("5b"), make("5b")
    eager.load_state_dict(model.state_dict())
    compile_model(model, CompileConfig(scope=scope, backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        for arguments in calls(model)[:3]:
            for each in (model, eager):
                each.zero_grad()
                each(**arguments, return_dict=False)[0].square().mean().backward()
            ours, theirs = (m.patch_embed.proj.weight.grad for m in (model, eager))
            assert relative_error(ours, theirs) <= 1e-5
    assert (stats.graphs, stats.recompiles) == (1, 0)


def test_static_sizes_compile_each_size_apart_and_more_than_torchs_limit_of_them() -> None:
    model = make("5b", num_layers=1)
    compile_model(model, CompileConfig(dynamic=False, backend="eager"))
    with watch_compilation() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        for arguments in calls(model, batches=(1,))[:9]:
            predict(model, arguments)
    parts = 1 + AROUND
    assert (stats.graphs, stats.recompiles) == (9 * parts, 8 * parts)


# -- several kinds of block --------------------------------------------------------------------------------------------


def quantize_half(model: CogVideoXModel) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for block in list(model.transformer_blocks)[::2]:
        quantize_(block, Int8WeightOnlyConfig(set_inductor_config=False))


@pytest.mark.parametrize("scope", ["block", pytest.param("model", marks=pytest.mark.slow)])
def test_blocks_of_two_kinds_are_two_graphs_and_no_recompile(scope: Any) -> None:
    model, eager = (make("5b", num_layers=4).bfloat16() for _ in range(2))
    quantize_half(model)
    quantize_half(eager)
    compile_model(model, CompileConfig(scope=scope, backend="aot_eager", strict=True))
    with watch_compilation() as stats:
        for arguments in calls(model)[:3]:
            half = {name: v.bfloat16() if v.is_floating_point() else v for name, v in arguments.items()}
            assert relative_error(predict(model, half), predict(eager, half)) <= 1e-2
    assert (stats.graphs, stats.breaks, stats.recompiles) == (2 + AROUND if scope == "block" else 1, 0, 0)


# -- what compiles again is explained ----------------------------------------------------------------------------------


def changed(model: CogVideoXModel, what: str) -> Any:
    """A second call that must compile again; what is warned of is named as its caller knows it."""
    arguments = inputs(model.config, height=8)
    if what == "grad mode":
        return model(**arguments)
    if what == "hidden_states' dtype":
        model.double()
        arguments = {name: value.double() for name, value in arguments.items()}
    elif what == "attention_mask":
        arguments["attention_kwargs"] = {"attention_mask": torch.ones(2, 8 + 4 * 4 * 5, dtype=torch.bool)}
    elif what == "attention backend":
        model.set_attention_backend("flex")
    elif what == "training mode":
        model.train()
    elif what == "weights":
        model.transformer_blocks[0].attn1.num_heads = 1
    return predict(model, arguments)


@pytest.mark.parametrize(
    ("what", "scope", "parts"),
    [
        ("grad mode", "block", 1),
        ("grad mode", "model", 1),
        ("hidden_states' dtype", "block", 3),
        ("attention_mask", "block", 1),
        ("attention backend", "block", 1),
        ("training mode", "block", 2),  # begin drops values out
    ],
)
def test_the_input_that_makes_it_compile_again_is_named_once(what: str, scope: Any, parts: int) -> None:
    model = make("5b", num_layers=1)
    compile_model(model, CompileConfig(scope=scope, backend="eager"))
    predict(model, inputs(model.config))
    message = f"the {scope} compiles again: .*{re.escape(what)} is .*, was .*torch's reason: "
    with watch_compilation() as stats, pytest.warns(RecompileWarning, match=message) as caught:
        changed(model, what)
    assert stats.recompiles == parts
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "size" not in text.partition("torch's reason")[0], "symbolic sizes are not the cause"


def test_strict_makes_it_an_error_and_what_was_compiled_stays() -> None:
    model = make("5b", num_layers=1)
    compile_model(model, CompileConfig(backend="eager", strict=True))
    predict(model, inputs(model.config))
    with watch_compilation() as stats:
        with pytest.raises(RecompileError, match=r"the block compiles again: .*attention_mask is .*strict=True"):
            changed(model, "attention_mask")
        predict(model, inputs(model.config))
    assert stats.graphs == 0


def test_a_static_size_that_changes_is_named() -> None:
    model = make("5b", num_layers=1)
    compile_model(model, CompileConfig(dynamic=False, strict=True, backend="eager"))
    predict(model, inputs(model.config))
    message = r"hidden_states' size is 2 × 4 × 16 × 8 × 10, was 2 × 4 × 16 × 12 × 10 \(.*use dynamic=True"
    with pytest.raises(RecompileError, match=message):
        predict(model, inputs(model.config, height=8))


def test_a_change_of_the_model_itself_is_said_to_be_none_of_the_inputs() -> None:
    model = make("5b", num_layers=1)
    compile_model(model, CompileConfig(backend="eager"))
    predict(model, inputs(model.config))
    model.transformer_blocks[0].norm1.norm.eps = 1e-3
    with pytest.warns(RecompileWarning, match="the cause is not an input.*torch's reason.*eps"):
        predict(model, inputs(model.config))


def test_after_the_warning_both_ways_are_compiled() -> None:
    model, eager = make("5b"), make("5b")
    eager.load_state_dict(model.state_dict())
    compile_model(model, CompileConfig(backend="eager"))
    arguments = inputs(model.config)
    predict(model, arguments)
    with pytest.warns(RecompileWarning):
        model(**arguments)
    with watch_compilation() as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(predict(model, arguments), predict(eager, arguments)) <= 1e-6
        assert model(**arguments).sample.requires_grad
    assert stats.graphs == 0


# -- nothing is left behind --------------------------------------------------------------------------------------------


def flags() -> list[dict[str, Any]]:
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config
    import torch.fx.experimental._config

    modules = (torch._dynamo.config, torch._inductor.config, torch._functorch.config, torch.fx.experimental._config)
    return [module.get_config_copy() for module in modules]


@pytest.mark.parametrize("scope", ["block", pytest.param("model", marks=pytest.mark.slow)])
def test_no_flag_of_torch_is_changed(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.callback import callback_handler

    from cogx_fast.attention import attend
    from cogx_fast.model import transformer

    def state() -> Any:
        return flags(), len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)

    before = state()
    model = make("5b", num_layers=1)
    config = CompileConfig(scope=scope, backend="aot_eager" if scope == "block" else "eager", strict=True)
    compile_model(model, config)
    assert state() == before
    predict(model, inputs(model.config))
    assert state() == before
    with pytest.raises(RecompileError):
        model(**inputs(model.config))
    assert state() == before

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    uncompile_model(model)
    compile_model(model, config)
    monkeypatch.setattr(transformer, "attend", fails)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        predict(model, inputs(model.config))
    assert state() == before
    monkeypatch.setattr(transformer, "attend", attend.attend)
    predict(model, inputs(model.config))  # and a compilation that failed is done again


def test_inputs_of_the_caller_are_not_marked() -> None:
    model = make("5b")
    for scope in ("block", "model"):
        compile_model(model, CompileConfig(scope=scope, backend="eager"))  # type: ignore[arg-type]
        arguments = inputs(model.config)
        predict(model, arguments)
        assert [name for name, value in arguments.items() if vars(value)] == []


def test_sizes_after_a_single_frame_share_a_graph_of_the_whole_model() -> None:
    """Views were compared by the sizes of what they are views of, which the first call had fixed."""
    model = CogVideoXModel(small("5b")).eval().requires_grad_(False)
    compile_model(model, CompileConfig(scope="model", backend="eager"))
    with torch.no_grad(), watch_compilation() as stats:
        model(**inputs(model.config, frames=1, height=8, width=10))
        with pytest.warns(RecompileWarning):  # a single latent frame is a graph apart
            model(**inputs(model.config, frames=2, height=8, width=10))
        for height, width in [(8, 16), (12, 10), (20, 16)]:
            model(**inputs(model.config, frames=3, height=height, width=width))
    assert (stats.graphs, stats.recompiles) == (2, 1)
