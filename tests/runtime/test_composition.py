"""What does not go together is refused before anything is read; every other pair runs, and gives what it should."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import Tensor

import cogx_fast
from benchmarks import ROOT
from benchmarks import composition as docs
from cogx_fast import CompileConfig, ParallelConfig
from cogx_fast.attention.plan import PlanError
from cogx_fast.runtime.compiling.compile import compile_model
from cogx_fast.runtime.composition import REFUSALS, Feature
from cogx_fast.runtime.runner import Slots, Whole
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from tests.runtime.generations import generate, make, timesteps
from tests.support import relative_error

WHOLE = CompileConfig(backend="eager", scope="model")
ASKED: dict[Feature, dict[str, Any]] = {
    Feature.STREAMED: {"offload": "blocks"},
    Feature.PARALLEL: {"parallel": ParallelConfig(guidance=2)},
    Feature.SHARDED: {"parallel": ParallelConfig(guidance=2, shard_weights=True)},
    Feature.QUANTIZED: {"quant": "int8-weight-only"},
    Feature.WHOLE_GRAPH: {"compile": CompileConfig(scope="model")},
    Feature.CUDA_GRAPHS: {"compile": CompileConfig(scope="model", mode="reduce-overhead")},
    Feature.OTHER_COMPILER: {"compile": CompileConfig(backend="eager")},
    Feature.FIRST_BLOCK: {"step_cache": "first-block:0.1"},
    Feature.HALVES: {"step_cache": StepSchedule(blocks=(4, 4), num_layers=4, unconditional=(1, 0))},
    Feature.PLAN: {"attention_plan": "radial"},
    Feature.NO_BLOCK_MASKS: {"attention": "sdpa"},
}
"""How ``load`` is asked for each feature."""


def test_a_pair_of_the_table_is_refused_before_anything_is_read() -> None:
    for refusal in REFUSALS:
        if refusal.one is not Feature.OWN_SLOT:  # which load cannot be asked for
            with pytest.raises(refusal.error, match=f"does not go with .*{refusal.why}: "):
                cogx_fast.load("/nothing/is/there", **ASKED[refusal.one], **ASKED[refusal.other])


def test_a_model_refuses_by_the_same_table() -> None:
    class Odd(Whole):
        is_traceable = False

    planned = cogx_fast.load(make(), attention_plan="radial")
    with pytest.raises(PlanError, match="an attention plan does not go with attention backend 'sdpa'"):
        planned.set_attention_backend("native")
    assert set(planned.attention_backends) == {"flex"}
    model = make()
    model.set_step_cache("first-block:0.1")
    with pytest.raises(ValueError, match=r"first-block:…' does not go with CompileConfig\(scope='model'\)"):
        compile_model(model, WHOLE)
    model.set_step_cache(None)
    compile_model(model, WHOLE)
    with pytest.raises(ValueError, match=r"value of the slot 'split' does not go with .*scope='block'"):
        model.runner.use(Slots(split=Odd()))
    with pytest.raises(ValueError, match=r"parallel=... does not go with CompileConfig\(scope='model'\)"):
        model.set_parallel(ParallelConfig(guidance=2))  # before ranks are joined: there are none


EXACT: dict[str, dict[str, Any]] = {"streamed": {"offload": "blocks"}, "baked": {"schedule": True}}
"""What must not change a result. (Compiled, each has its own tests.)"""
APPROXIMATE: dict[str, dict[str, Any]] = {
    "plan": {"attention_plan": "radial"},
    "cached": {"step_cache": "balanced"},
    "quantized": {"quant": "int8-weight-only"},
}


@pytest.mark.filterwarnings("ignore")
def test_every_other_pair_runs_and_gives_what_it_should() -> None:
    def run(**options: Any) -> Tensor:
        return generate(cogx_fast.load(make(), **options), timesteps(3))[-1]

    expected = {name: run(**options) for name, options in {"plain": {}, **APPROXIMATE}.items()}
    assert all(relative_error(found, expected["plain"]) > 0 for name, found in expected.items() if name != "plain")
    for (one, first), (other, second) in itertools.combinations({**EXACT, **APPROXIMATE}.items(), 2):
        found = run(**first, **second)
        if one in EXACT:
            assert relative_error(found, expected.get(other, expected["plain"])) < 1e-5, (one, other)
        else:
            assert all(relative_error(found, expected[name]) > 0 for name in (one, other)), (one, other)


def test_the_docs_name_every_pair() -> None:
    assert docs.DOCS.read_text(encoding="utf-8") == docs.current(), "run: python -m benchmarks.composition"
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1].strip(): cells for line in lines if len(cells := line.split("|")) > 3}
    in_readme = {"streamed blocks": Feature.STREAMED, "several GPUs": Feature.PARALLEL, "attention plan": Feature.PLAN}
    refused = {frozenset((refusal.one, refusal.other)) for refusal in REFUSALS}
    for name, feature in in_readme.items():
        is_empty = not rows[name][3].strip()
        assert is_empty == ({feature, Feature.WHOLE_GRAPH} in refused), name
