"""A recipe on a model: decided beforehand, every linear accounted for, the values torchao's own."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from torch import Tensor, nn

import quant
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.runtime.module import CogVideoXModel
from quant.apply import linears, remember
from quant.recipe import parse_recipe
from quant.schemes import SCHEMES, torchao_config
from tests.cases import for_each
from tests.quant.support import assert_same_weight
from tests.support import RELEASED, inputs, relative_error, small, upstream, without_saturated

RUNS_ANYWHERE = [name for name, scheme in SCHEMES.items() if scheme.requires.device is None]
DYNAMIC = [name for name in RUNS_ANYWHERE if SCHEMES[name].dynamic]


def recipe(text: str) -> quant.Recipe:
    return parse_recipe(f'name = "test"\ndescription = "d"\n{text}', origin="test.toml")


def every(scheme: str) -> quant.Recipe:
    """A recipe for a lone linear, or a sequence of them."""
    return recipe(f'[[rule]]\nmatch = "*"\nscheme = "{scheme}"')


def model(name: str = "5b", dtype: torch.dtype = torch.bfloat16, **changes) -> CogVideoXModel:
    torch.manual_seed(0)
    return CogVideoXModel(small(name, **changes)).to(dtype).eval()


@for_each("config", RELEASED, "name", ["int8-weight-only", "int8-dynamic", "fp8-weight-only", "fp8-dynamic-emulated"])
def test_the_report_accounts_for_every_linear_of_every_model(name, config):
    ours = model(config)
    expected = [fqn for fqn, module in ours.named_modules() if isinstance(module, nn.Linear)]
    report = quant.quantize(ours, name)
    assert [linear.fqn for linear in report.linears] == expected
    for linear in report.linears:
        weight = ours.get_submodule(linear.fqn).weight
        assert (linear.scheme is None) == (type(weight) is nn.Parameter) == bool(linear.reason)
        assert linear.shape == tuple(weight.shape)
        assert linear.bytes_before == 2 * weight.numel()
        if linear.scheme is None:
            assert linear.bytes_after == linear.bytes_before
        else:
            assert weight.numel() < linear.bytes_after <= weight.numel() + 8 * weight.shape[0]
            assert linear.sqnr_db > 25
    blocks = [linear for linear in report.linears if linear.fqn.startswith("transformer_blocks.")]
    assert len(blocks) == 4 * ours.config.num_layers
    assert all(linear.scheme == name for linear in blocks)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["bytes_after"] == report.bytes_after
    assert quant.recipe_of(ours).name == name
    assert ours.dtype == torch.bfloat16


def test_the_report_of_diffusers_own_model():
    theirs = upstream(small("5b")).to(torch.bfloat16)
    rules = recipe("""
        [[rule]]
        match = ["transformer_blocks.*.attn1.to_q", "transformer_blocks.*.attn1.to_out.0"]
        scheme = "int8-weight-only"
        [[rule]]
        match = "transformer_blocks.*.ff.net.0.proj"
        scheme = "int8-dynamic"
    """)
    arguments = inputs(small("5b"), dtype=torch.bfloat16)
    with torch.no_grad():
        before = theirs(**arguments).sample
        report = quant.quantize(theirs, rules)
        after = theirs(**arguments).sample
    schemes = {linear.fqn.partition("attn1.")[2]: linear.scheme for linear in report.linears if "attn1" in linear.fqn}
    assert schemes == {"to_q": "int8-weight-only", "to_out.0": "int8-weight-only", "to_k": None, "to_v": None}
    assert {linear.reason for linear in report.linears if linear.scheme is None} == {"no rule of the recipe names it"}
    assert 0 < relative_error(after, before) < 0.03


@for_each("name", RUNS_ANYWHERE)
def test_weights_are_those_of_torchaos_own_fqn_to_config(name):
    from torchao.quantization import quantize_

    ours, theirs = model(num_layers=1), model(num_layers=1)
    rules = recipe(f'[[rule]]\nmatch = "transformer_blocks.*.ff.net.2"\nscheme = "{name}"')
    quantize_(theirs, quant.plan(theirs, rules).to_torchao(), filter_fn=None)
    quant.quantize(ours, rules)
    for (fqn, left), (_, right) in zip(linears(ours), linears(theirs), strict=True):
        assert type(left.weight) is type(right.weight), fqn
        if hasattr(left.weight, "dequantize"):
            assert torch.equal(left.weight.dequantize(), right.weight.dequantize())


def test_sqnr_by_hand():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 32))
    weight = linear[0].weight.detach().clone()
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    rounded = (weight / scale).round().clamp(-128, 127) * scale
    (found,) = quant.quantize(linear, every("int8-weight-only")).linears
    expected = 20 * torch.log10(weight.norm() / (weight - rounded).norm())
    assert found.sqnr_db == pytest.approx(expected.item(), abs=1e-3)


# -- before any weight is touched --------------------------------------------------------------------------------------


@for_each("text, message", [
    ('match = "transformer_blocks.*.ff.net.1"\nscheme = "int8-dynamic"', r"line 4: 'trans.*' matches none"),
    ('match = ["proj_out", "proj_in"]\nskip = "x"', r"line 4: 'proj_in' matches none"),
    (
        'match = "proj_*"\nskip = "x"\n[[rule]]\nmatch = "proj_out"\nscheme = "int8-dynamic"',
        r"line 7: it matches proj_out, and so does the rule of line 4",
    ),
    ('match = "proj_out"\nscheme = "fp8-dynamic"', r"line 4: fp8-dynamic .* for proj_out: it needs CUDA ≥ 8.9"),
    ('match = "proj_out"\nscheme = "int4-weight-only"', r"line 4: int4.* CUDA ≥ 8.0, and the model is on cpu"),
])  # fmt: skip
def test_a_recipe_that_does_not_fit_touches_nothing(text, message):
    ours = model()
    before = {name: (id(tensor), tensor._version) for name, tensor in ours.named_parameters()}
    rules = recipe(f'\n[[rule]]\n{text}\n[[rule]]\nmatch = "norm_out.linear"\nscheme = "int8-dynamic"')
    with pytest.raises(quant.QuantError, match=message):
        quant.quantize(ours, rules)
    assert {name: (id(tensor), tensor._version) for name, tensor in ours.named_parameters()} == before
    assert quant.recipe_of(ours) is None


def test_optional_rules_may_match_nothing():
    rules = '[[rule]]\nmatch = "nothing"\nskip = "x"\noptional = true\n[[rule]]\nmatch = "*"\nscheme = "int8-dynamic"'
    assert quant.plan([("linear", (32, 32))], recipe(rules)).choices["linear"].scheme == "int8-dynamic"


@for_each(
    "scheme, shape, dtype, message",
    [
        ("int8-dynamic", (32, 36), torch.bfloat16, "multiples of 8, and this one is 32 × 36"),
        ("fp8-dynamic-emulated", (40, 32), torch.bfloat16, "multiples of 16, and this one is 40 × 32"),
        ("fp8-dynamic-emulated", (32, 32), torch.float32, "bfloat16 weights, and these are torch.float32: load"),
    ],
)
def test_weights_that_a_scheme_cannot_take(scheme, shape, dtype, message):
    linear = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype)
    with pytest.raises(quant.QuantError, match=message):
        quant.quantize(linear, every(scheme))
    if scheme == "int8-dynamic":
        with pytest.warns(UserWarning, match="int8-weight-only in place of int8-dynamic, since it needs sizes"):
            (report,) = quant.quantize(linear, every(scheme), on_unsupported="nearest").linears
        assert report.scheme == "int8-weight-only"


@for_each("name, nearest", [
    ("fp8-dynamic", "int8-dynamic"), ("fp8-dynamic-tensor", "int8-dynamic"),
    ("int4-weight-only", "int8-weight-only"), ("int8-dynamic", "int8-dynamic"),
])  # fmt: skip
def test_nearest_warns_once_for_all(name, nearest):
    ours = model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quant.quantize(ours, name, on_unsupported="nearest")
    ours_warned = [w for w in caught if w.filename == __file__]
    assert len(ours_warned) == (name != nearest)
    if name != nearest:
        assert f"to_qkv and 7 more: {nearest} in place of {name}" in str(ours_warned[0].message)
    assert {linear.scheme for linear in report.linears} == {nearest, None}


def test_hardware_is_asked_of_the_device(monkeypatch):
    names = [("a", (32, 32))]
    assert quant.plan(names, every("fp8-dynamic")).choices["a"].scheme == "fp8-dynamic"  # unknown: unchecked
    for capability, fits in (((8, 9), True), ((9, 0), True), ((10, 0), True), ((8, 6), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if fits:
            quant.plan(names, every("fp8-dynamic"), device="cuda")
        else:
            with pytest.raises(quant.QuantError, match=r"needs CUDA ≥ 8.9, and cuda has 8.6"):
                quant.plan(names, every("fp8-dynamic"), device="cuda")


def test_packages_are_asked_for():
    rules = recipe('[requires]\npackages = ["torchao", "no_such_kernels"]\n[[rule]]\nmatch = "*"\nskip = "x"')
    with pytest.raises(quant.QuantError, match="needs no_such_kernels, not installed: pip install no_such_kernels"):
        quant.plan([("a", (32, 32))], rules, device="cpu")


def test_quantized_meta_and_adapted_models_are_refused():
    ours = model(num_layers=1)
    quant.quantize(ours, "int8-weight-only")
    with pytest.raises(quant.QuantError, match="is a Int8Tensor, quantized already"):
        quant.quantize(ours, "int8-weight-only")
    with torch.device("meta"):
        empty = CogVideoXTransformer(small("5b"))
    with pytest.raises(quant.QuantError, match="hold no values"):
        quant.quantize(empty, "int8-weight-only")
    adapted = nn.Sequential()
    adapted.add_module("a", nn.ModuleDict({"base_layer": nn.Linear(16, 16)}))
    with pytest.raises(quant.QuantError, match="adapters"):
        quant.quantize(adapted, every("int8-weight-only"))
    with pytest.raises(quant.QuantError, match="no linear"):
        quant.quantize(nn.Sequential(), every("int8-weight-only"))
    with pytest.raises(quant.QuantError, match="on_unsupported is 'maybe'"):
        quant.quantize(ours, "int8-weight-only", on_unsupported="maybe")


def test_a_plan_is_carried_out_part_by_part():
    whole, parts = model(), model()
    quant.quantize(whole, "int8-dynamic")
    with torch.device("meta"):
        empty = CogVideoXTransformer(whole.config)
    planned = quant.plan(empty, "int8-dynamic", device="cpu")
    reports = [each for name, child in parts.named_children() for each in planned.apply(child, name)]
    remember(parts, planned.recipe)
    assert [report.fqn for report in reports] == list(planned.choices)
    arguments = inputs(whole.config, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(whole(**arguments).sample, parts(**arguments).sample)
    with pytest.raises(quant.QuantError, match=r"blocks.0.linear is not in the plan"):
        planned.apply(nn.ModuleDict({"linear": nn.Linear(16, 16)}), "blocks.0")


# -- values ------------------------------------------------------------------------------------------------------------


@for_each("tokens", [80, 17, 1], "name", without_saturated(RUNS_ANYWHERE))
def test_odd_token_counts_and_rows_of_zeros_give_no_nan(name, tokens):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    with torch.no_grad():
        linear[0].weight[5] = 0
    x = torch.randn(2, tokens, 64).bfloat16()
    x[0, tokens // 2] = 0
    with torch.no_grad():
        exact = linear.float()(x.float())
        linear.bfloat16()
        (report,) = quant.quantize(linear, every(name)).linears
        for values in (x, torch.zeros_like(x)):
            assert linear(values).isfinite().all()
        out = linear(x)
    bias = linear[0].bias
    assert torch.equal(out[0, tokens // 2], bias)
    assert (out[..., 5] - bias[5]).abs().max() == 0
    assert relative_error(out, exact) < 0.05
    assert report.sqnr_db > 25


@for_each("scheme", RUNS_ANYWHERE)
def test_weights_that_are_all_zero(scheme):
    linear = nn.Sequential(nn.Linear(32, 16)).bfloat16()
    nn.init.zeros_(linear[0].weight)
    (report,) = quant.quantize(linear, every(scheme)).linears
    assert report.sqnr_db == float("inf")
    assert not linear[0].weight.dequantize().any()
    assert quant.apply.Report(recipe=every(scheme), linears=(report,)).to_dict()["linears"][0]["sqnr_db"] is None


def test_no_global_compiler_flag_is_set():
    import torch._inductor.config as flags

    before = flags.get_config_copy()
    quant.quantize(model(num_layers=1), "int8-dynamic")
    assert flags.get_config_copy() == before
    for name in SCHEMES:
        config = torchao_config(name)
        assert getattr(config, "config", config).set_inductor_config is False


@for_each("name", RUNS_ANYWHERE)
def test_the_first_weights_are_freed(name):
    """No autograd graph, and nothing else, holds the weights in full precision."""
    import weakref

    ours = model(num_layers=1)
    weight = weakref.ref(ours.transformer_blocks[0].ff.net[2].weight)
    rules = recipe(f'[[rule]]\nmatch = "transformer_blocks.*.ff.net.2"\nscheme = "{name}"')
    with torch.enable_grad():
        quant.quantize(ours, rules)
    assert weight() is None
    inner: Tensor = ours.transformer_blocks[0].ff.net[2].weight.scale
    assert inner.grad_fn is None


def test_recipes_are_values():
    real = quant.load_recipe("int8-dynamic")
    with pytest.raises(dataclasses.FrozenInstanceError):
        real.name = "other"


@for_each("outputs, inputs", [(1024, 3072), (1600, 1920), (16, 1 << 17)])
def test_a_weight_is_parted_into_sizes_that_torchao_takes(monkeypatch, outputs, inputs):
    """fp8-dynamic leaves a weight of other sizes as it was. As on a machine with its hardware, which is not used."""
    from torchao.quantization import quant_api, quantize_

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda *_: None)
    monkeypatch.setattr(type(SCHEMES["fp8-dynamic"].requires), "unmet", lambda *_: None)
    ours, whole = (nn.Sequential(nn.Linear(inputs, outputs, dtype=torch.bfloat16)) for _ in range(2))
    whole.load_state_dict(ours.state_dict())
    quant.quantize(ours, every("fp8-dynamic"))
    quantize_(whole, torchao_config("fp8-dynamic"), filter_fn=None)
    assert_same_weight(ours[0].weight, whole[0].weight)
