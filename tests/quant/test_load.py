"""``load(quant=...)``: quantized as it is read, compiled as one graph, moved as any model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import cogx_fast
import quant
from cogx_fast.runtime.compiling.compile import watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from tests.cases import for_each
from tests.pipes import make_pipe
from tests.support import AROUND, inputs, predict, relative_error, small, upstream

COMPILED = ["int8-weight-only", "int8-dynamic", "fp8-weight-only", "fp8-dynamic-emulated"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    upstream(small("1.5-5b-i2v")).bfloat16().save_pretrained(directory)
    return directory


def load(source, recipe, **options) -> CogVideoXModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "recipe .* quantizes activations")
        return cogx_fast.load(source, quant=recipe, **options)


@for_each("name", COMPILED)
def test_loading_quantized_is_quantizing_what_is_loaded(name, checkpoint):
    later = cogx_fast.load(checkpoint)
    quant.quantize(later, name)
    model = load(checkpoint, name)
    assert quant.recipe_of(model) == quant.load_recipe(name)
    for (fqn, left), (_, right) in zip(model.named_parameters(), later.named_parameters(), strict=True):
        assert type(left) is type(right), fqn
        plain = [each.dequantize() if hasattr(each, "qdata") else each for each in (left, right)]
        assert torch.equal(*plain), fqn
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    arguments = inputs(model.config, dtype=torch.bfloat16)
    assert torch.equal(predict(model, arguments), predict(later, arguments))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_is_one_graph_and_says_what_eager_says(name, checkpoint):
    arguments = inputs(small("1.5-5b-i2v"), dtype=torch.bfloat16)
    exact = predict(cogx_fast.load(checkpoint, dtype="fp32"), inputs(small("1.5-5b-i2v")))
    eager_error = relative_error(predict(load(checkpoint, name), arguments), exact)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = cogx_fast.load(checkpoint, quant=name, compile=True)
    assert [w for w in caught if "quantizes activations" in str(w.message)] == []
    with watch_compilation() as stats:
        compiled_error = relative_error(predict(model, arguments), exact)
        predict(model, arguments | {"timestep": torch.tensor([3, 700])})
        predict(model.to("cpu").to(torch.bfloat16), arguments)  # as pipelines do
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    assert compiled_error <= 1.05 * eager_error
    assert 0.001 < eager_error < 0.1


def test_eager_use_of_a_dynamic_recipe_warns_once(checkpoint):
    with pytest.warns(
        UserWarning, match="'int8-dynamic' quantizes activations, .*slower.* pass compile=True"
    ) as caught:
        cogx_fast.load(checkpoint, quant="int8-dynamic")
    (told,) = (each for each in caught if "quantizes activations" in str(each.message))
    assert told.filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "recipe .* quantizes activations")
        cogx_fast.load(checkpoint, quant="int8-weight-only")


def test_a_live_model_keeps_its_weights():
    theirs = upstream(small("5b")).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    arguments = inputs(small("5b"), dtype=torch.bfloat16)
    expected = predict(theirs, arguments)
    ours = load(theirs, "int8-weight-only")
    assert type(ours.transformer_blocks[0].ff.net[2].weight).__name__ == "Int8Tensor"
    after = theirs.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(predict(theirs, arguments), expected)
    assert ours.proj_out.weight.data_ptr() == theirs.proj_out.weight.data_ptr()  # what is not quantized is shared
    assert 0 < relative_error(predict(ours, arguments), expected) < 0.05


@pytest.mark.parametrize(("recipe", "message"), [("int9", "recipe is 'int9'"), ("fp8-dynamic", "needs CUDA ≥ 8.9")])
def test_a_recipe_that_cannot_be_is_refused_before_weights_are_read(recipe, message, checkpoint, monkeypatch):
    from cogx_fast.weights import checkpoint as module

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(module, "read", never)
    with pytest.raises(quant.QuantError, match=message):
        cogx_fast.load(checkpoint, quant=recipe)
    with pytest.raises(quant.QuantError, match=message):
        cogx_fast.load(upstream(small("5b")).bfloat16(), quant=recipe)


def test_weights_are_checked_before_they_are_quantized(tmp_path):
    model = upstream(small("5b")).bfloat16()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(cogx_fast.weights.errors.CheckpointError, match=r"NaN weights: transformer_blocks\.1\.ff"):
        cogx_fast.load(tmp_path, quant="int8-weight-only", check_finite=True)


@for_each("name", COMPILED)
def test_a_pipeline_may_move_it(name):
    pipe = make_pipe("CogVideoXPipeline", "5b")
    pipe.register_modules(vae=None, text_encoder=None)  # every test's: they are to stay as they are
    pipe.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "recipe .* quantizes activations")
        cogx_fast.accelerate(pipe, quant=name)
    model = pipe.transformer
    arguments = inputs(model.config, dtype=torch.bfloat16)
    expected = predict(model, arguments)
    pipe.to("cpu")
    pipe.to(torch.bfloat16)
    assert torch.equal(predict(pipe.transformer, arguments), expected)
    assert torch.equal(predict(copy.deepcopy(model), arguments), expected)
    assert isinstance(model.transformer_blocks[0].ff.net[2].weight, nn.Parameter)


@for_each("name", ["int8-weight-only", "int8-dynamic", "fp8-weight-only"])
def test_a_change_of_dtype_reaches_quantized_weights(name):
    torch.manual_seed(0)
    model = CogVideoXModel(small("5b")).eval()
    quant.quantize(model, name)
    arguments = inputs(model.config)
    expected = predict(model, arguments)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in arguments.items()}
    out = predict(model.to(torch.bfloat16), half)
    assert out.dtype == model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert relative_error(out, expected) < 0.02
    assert relative_error(predict(model.float(), arguments), expected) < 0.02
