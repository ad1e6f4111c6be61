"""In bf16 and fp16 our error against fp32 is no larger than upstream's own; tables keep fp32."""

from __future__ import annotations

import copy
import statistics

import torch

from tests.cases import for_each
from tests.model.pairs import TOLERANCE, call, copy_of, pair, to_dtype
from tests.support import RELEASED, relative_error

HALF = (torch.bfloat16, torch.float16)
MARGIN = 1.05
"""How much larger than upstream's our error may be."""


@for_each("dtype", HALF, "name", RELEASED)
def test_error_against_fp32_is_no_larger_than_upstreams(name: str, dtype: torch.dtype) -> None:
    """On four models and inputs; each ratio of errors is over some 15,000 values and lies within ±2 % of their mean."""
    ratios = []
    for seed in range(4):
        both = pair(name, seed=seed)
        arguments = call(both.config, seed=seed)
        theirs, ours = copy.deepcopy(both.theirs).to(dtype), copy.deepcopy(both.ours).to(dtype)
        with torch.no_grad():
            exact = both.theirs(**arguments).sample
            assert relative_error(both.ours(**arguments).sample, exact) <= TOLERANCE
            low = to_dtype(arguments, dtype)
            their_sample, our_sample = theirs(**low).sample, ours(**low).sample
        assert our_sample.dtype == their_sample.dtype == dtype
        ratios.append(relative_error(our_sample, exact) / relative_error(their_sample, exact))
    assert max(ratios) <= MARGIN, ratios
    assert statistics.mean(ratios) <= 1.0, ratios


@for_each("dtype", HALF, "name", ["5b", "1.5-5b"])
def test_tables_stay_fp32_under_to(name: str, dtype: torch.dtype) -> None:
    """Built tables give the very output of the pipeline's fp32 ones, and not that of rounded ones."""
    model = copy_of(pair(name).theirs, pair(name).config).to(dtype)
    arguments = to_dtype(call(model.config), dtype)
    tables = arguments.pop("image_rotary_emb")
    assert {table.dtype for table in tables} == {torch.float32}
    with torch.no_grad():
        built = model(**arguments).sample
        given = model(**arguments, image_rotary_emb=tables).sample
        rounded = model(**arguments, image_rotary_emb=tuple(table.to(dtype) for table in tables)).sample
    torch.testing.assert_close(built, given, rtol=0, atol=0)
    assert not torch.equal(built, rounded)
    held = [table for value in model.inputs.tables.values() if isinstance(value, tuple) for table in value]
    assert {table.dtype for table in held} == {torch.float32}
    model.to(torch.float16).to(dtype)
    assert {table.dtype for table in held} == {torch.float32}


def test_sincos_positions_are_rounded_as_upstream_rounds_them() -> None:
    model = copy_of(pair("2b").theirs, pair("2b").config).bfloat16()
    theirs = copy.deepcopy(pair("2b").theirs).bfloat16()
    arguments = to_dtype(call(model.config), torch.bfloat16)
    with torch.no_grad():
        model(**arguments)
    [held] = [value for key, value in model.inputs.tables.items() if key[0] == "sincos"]
    torch.testing.assert_close(held, theirs.patch_embed.pos_embedding, rtol=0, atol=0)


@for_each("dtype", HALF, "name", RELEASED)
def test_under_autocast_the_error_is_no_larger_than_upstreams(name: str, dtype: torch.dtype) -> None:
    both = pair(name)
    arguments = call(both.config)
    with torch.no_grad():
        exact = both.theirs(**arguments).sample
        with torch.autocast("cpu", dtype):
            theirs, ours = both.theirs(**arguments).sample, both.ours(**arguments).sample
    assert ours.dtype == theirs.dtype == dtype
    assert relative_error(ours, exact) <= MARGIN * relative_error(theirs, exact)


def test_large_activations_overflow_no_sooner_than_upstreams_in_fp16() -> None:
    """A stream of values near fp16's end, which 5b has, goes through norms and gates without an overflow of our own."""
    both = pair("5b")
    theirs, ours = copy.deepcopy(both.theirs), copy.deepcopy(both.ours)
    for model in (theirs, ours):
        model.patch_embed.proj.weight.data.mul_(2000)
    arguments = call(both.config)
    low = to_dtype(arguments, torch.float16)
    with torch.no_grad():
        exact = theirs(**arguments).sample
        their_sample, our_sample = theirs.half()(**low).sample, ours.half()(**low).sample
    assert their_sample.isfinite().all()
    assert our_sample.isfinite().all()
    assert relative_error(our_sample, exact) <= MARGIN * relative_error(their_sample, exact)


def test_double_precision_is_taken() -> None:
    """What is not computed in fp32 by design (tables, timestep, query and key norms) is computed in float64."""
    both = pair("5b")
    arguments = to_dtype(call(both.config), torch.float64)
    with torch.no_grad():
        theirs, ours = (copy.deepcopy(model).double()(**arguments).sample for model in (both.theirs, both.ours))
    assert ours.dtype == torch.float64
    assert relative_error(ours, theirs) <= 1e-6
