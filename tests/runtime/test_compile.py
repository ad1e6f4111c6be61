"""What is compiled is one graph, compiled once, and computes what eager computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cogx_fast.config import TransformerConfig
from cogx_fast.runtime.compiling.compile import (
    CompileConfig,
    RecompileWarning,
    compile_model,
    uncompile_model,
    watch_compilation,
)
from cogx_fast.runtime.module import CogVideoXModel
from tests.cases import for_each
from tests.support import AROUND, inputs, predict, relative_error, small


def make(config: TransformerConfig) -> CogVideoXModel:
    torch.manual_seed(0)
    return CogVideoXModel(config).eval()


def test_given_tables_reuse_the_graph_of_those_built_here() -> None:
    from tests.support import pipeline_rotary

    model = make(small("5b"))
    arguments = inputs(model.config, seed=5)
    rotary = pipeline_rotary(model.config, arguments["hidden_states"])
    expected = predict(model, arguments)
    compile_model(model, CompileConfig(backend="eager", strict=True))
    with watch_compilation() as stats:
        assert relative_error(predict(model, arguments), expected) <= 1e-5
        assert relative_error(predict(model, arguments | {"image_rotary_emb": rotary}), expected) <= 1e-5
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    assert stats.seconds > 0


@pytest.mark.parametrize("scope", [pytest.param("block", marks=pytest.mark.slow), "model"])
def test_both_scopes_equal_eager_in_bf16_within_rounding(scope: Any) -> None:
    config = small("1.5-5b-i2v")
    model = make(config)
    arguments = inputs(config)
    exact = predict(model, arguments)
    model.to(torch.bfloat16)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arguments.items()}
    eager_error = relative_error(predict(model, half), exact)
    compile_model(model, CompileConfig(scope=scope))
    with watch_compilation() as stats:
        compiled_error = relative_error(predict(model, half), exact)
    assert (stats.graphs, stats.breaks) == (1 + AROUND * (scope == "block"), 0)
    assert compiled_error <= 1.05 * eager_error


@pytest.mark.slow
def test_gradients_of_a_compiled_model_equal_eager_ones() -> None:
    config = small("2b")
    model, eager = make(config), make(config)
    compile_model(model, CompileConfig())
    for each in (model, eager):
        each(**inputs(config), return_dict=False)[0].square().mean().backward()
    gradients = {name: (ours.grad, eager.get_parameter(name).grad) for name, ours in model.named_parameters()}
    largest = max(theirs.norm() for _, theirs in gradients.values())
    for name, (ours, theirs) in gradients.items():  # a bias of the keys has none in exact arithmetic
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 * largest, name


def test_each_model_has_a_cache_of_its_own() -> None:
    """A model is never a recompile of another one's code, of which Dynamo allows a few."""
    for width in range(1, 4):
        model = make(small("5b", num_attention_heads=width, num_layers=1))
        compile_model(model, CompileConfig(backend="eager"))
        with watch_compilation() as stats:
            predict(model, inputs(model.config, batch=1))
        assert (stats.graphs, stats.recompiles) == (1 + AROUND, 0)


class Twice(torch.nn.Linear):
    """A module of a caller's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_stands_around_the_blocks_is_compiled_while_it_is_as_it_was_built() -> None:
    """With gradients, a hook or a caller's module in it, it runs as it is; the block's graph stays."""
    model, eager = (make(small("1.5-5b-i2v")).requires_grad_(False) for _ in range(2))
    compile_model(model, CompileConfig(backend="eager", strict=True))
    arguments = inputs(model.config)
    plain = predict(eager, arguments)

    def graphs(call: Callable[..., torch.Tensor] = predict) -> int:
        with watch_compilation() as stats:
            assert relative_error(call(model, arguments), call(eager, arguments)) <= 1e-5
        assert (stats.breaks, stats.recompiles) == (0, 0)
        return stats.graphs

    assert graphs() == 1 + AROUND
    handles = [each.proj_out.register_forward_hook(lambda _, __, output: output / 2) for each in (model, eager)]
    assert graphs() == 0
    assert relative_error(predict(model, arguments), plain) > 0.4
    for handle in handles:
        handle.remove()
    assert graphs() == 0
    for each in (model, eager):
        own = Twice(each.proj_out.in_features, each.proj_out.out_features).requires_grad_(False)
        own.load_state_dict(each.proj_out.state_dict())
        each.proj_out = own
    assert graphs() == 0
    assert relative_error(predict(model, arguments), plain) > 0.4

    uncompile_model(model)
    compile_model(model, CompileConfig(backend="eager", strict=True))
    assert graphs(lambda model, arguments: model(**arguments).sample) == 1  # with gradients


def test_uncompile_runs_eagerly_again() -> None:
    model = make(small("5b"))
    for scope in ("block", "model"):
        compile_model(model, CompileConfig(scope=scope, backend="eager"))
        uncompile_model(model)
        with watch_compilation() as stats:
            predict(model, inputs(model.config))
        assert stats.graphs == 0


def test_compiling_changes_no_name_or_weight() -> None:
    model = make(small("5b"))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    compile_model(model, CompileConfig(backend="eager"))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


# -- the watch sees what it must see -----------------------------------------------------------------------------------


def test_watch_sees_a_recompile_for_another_size() -> None:
    model = make(small("5b", num_layers=1))
    compile_model(model, CompileConfig(backend="eager", dynamic=False))
    with watch_compilation() as stats:
        predict(model, inputs(model.config))
        with pytest.warns(RecompileWarning):
            predict(model, inputs(model.config, height=8))
    parts = 1 + AROUND
    assert (stats.graphs, stats.recompiles) == (2 * parts, parts)


def test_a_graph_break_is_an_error_not_a_slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogx_fast.model import transformer

    def breaks(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return attend(*args, **kwargs)

    attend = transformer.attend
    monkeypatch.setattr(transformer, "attend", breaks)
    model = make(small("5b"))
    compile_model(model, CompileConfig(backend="eager"))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        predict(model, inputs(model.config))


@for_each(
    "options, message",
    [
        ({"scope": "layer"}, "scope is 'layer'"),
        ({"mode": "fastest"}, "mode is 'fastest'"),
        ({"mode": "max-autotune"}, "max-autotune records CUDA graphs.*use scope='model'"),
        ({"options": {"triton.cudagraphs": True}}, "records CUDA graphs.*use scope='model'"),
        ({"unrolled": True}, "use scope='model'"),
        ({"backend": "eager", "mode": "default"}, "takes no mode"),
        ({"backend": "eager", "options": {"max_autotune": True}}, "takes no mode"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompileConfig(**options)
