"""The first call of a deep model, from nothing: what compiling one block for all layers saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAYERS = 42

CHILD = """
import json, resource, sys, time
import torch, cogx_fast
from tests.support import inputs, small, upstream
torch.set_num_threads(1)
config = small("5b", num_layers=int(sys.argv[2]))
theirs = upstream(config).requires_grad_(False)
if sys.argv[1] == "theirs":
    model = torch.compile(theirs, fullgraph=True)
else:
    model = cogx_fast.load(theirs, compile=cogx_fast.CompileConfig(scope=sys.argv[1]))
arguments = inputs(config)
if sys.argv[1] == "theirs":
    from tests.support import pipeline_rotary
    arguments["image_rotary_emb"] = pipeline_rotary(config, arguments["hidden_states"])

def processor_seconds():  # the C++ compiler's, too
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)

begin, used = time.perf_counter(), processor_seconds()
with torch.no_grad():
    output = model(**arguments, return_dict=False)[0]
seconds, processor = time.perf_counter() - begin, processor_seconds() - used
from torch._dynamo.utils import counters
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps({"seconds": seconds, "processor": processor, "sum": output.double().abs().sum().item(), "hits": hits}))
"""


def first_call(cache_dir: Path, which: str, layers: int = LAYERS) -> dict[str, Any]:
    """The first call of a model in a process of its own, with an empty cache directory and one thread."""
    directories = {"TORCHINDUCTOR_CACHE_DIR": str(cache_dir), "TRITON_CACHE_DIR": str(cache_dir / "triton")}
    env = os.environ | directories | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, which, str(layers)],
        cwd=Path(__file__).parents[2],
        env=env,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert child.returncode == 0, child.stderr
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    print(which, result)
    return result


@pytest.mark.slow
@pytest.mark.timeout(9000)
def test_the_first_call_takes_a_sixth_of_compiling_the_whole_upstream_model(tmp_path: Path) -> None:
    """In processor time, the C++ compiler's included: with one thread it is what a clock shows on a calm machine."""
    before = first_call(tmp_path / "before", "block")
    theirs = first_call(tmp_path / "theirs", "theirs")
    after = first_call(tmp_path / "after", "block")
    assert before["hits"] == theirs["hits"] == after["hits"] == 0, "the caches were not empty"
    assert before["sum"] == pytest.approx(theirs["sum"], rel=1e-5)
    assert max(before["processor"], after["processor"]) <= theirs["processor"] / 6
