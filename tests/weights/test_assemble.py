"""A live model's weights while another is made of them: never all twice, and none lost before all is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cogx_fast
from tests.cases import for_each
from tests.pipes import generate, make_pipe
from tests.support import small, upstream

PEAK = """
import json, re, sys
import torch, cogx_fast, quant
from tests.support import small, upstream
from types import SimpleNamespace

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

class Pipe:
    components = {}

cogx_fast.load("tiny", quant="int8-weight-only")  # imports all there is
config = small("5b", num_attention_heads=16, num_layers=8, time_embed_dim=64)
pipe = Pipe()
with torch.device("meta"):
    pipe.transformer = upstream(config)
pipe.transformer = pipe.transformer.bfloat16().to_empty(device="cpu")
for parameter in pipe.transformer.parameters():
    torch.nn.init.uniform_(parameter, -0.1, 0.1)
held = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
cogx_fast.accelerate(pipe, quant="int8-weight-only", keep_source=sys.argv[1] == "keep")
block = sum(tensor.numel() * 2 for tensor in pipe.transformer.transformer_blocks[0].state_dict().values())
print(json.dumps({"block": block, "more": memory("VmHWM") - held, "after": memory("VmRSS") - held}))
"""


def emptied(model: Any) -> int:
    return sum(parameter.numel() == 0 for parameter in model.parameters())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are counted by Linux's /proc")
def test_quantizing_a_pipeline_needs_little_more_than_it_has() -> None:
    found = {}
    for how in ("give", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, how], check=True, capture_output=True, text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "500000"},
        )  # fmt: skip
        found[how] = json.loads(done.stdout.splitlines()[-1])
    print({how: {key: round(value / 1e6) for key, value in each.items()} for how, each in found.items()})
    block = found["give"]["block"]
    assert found["give"]["more"] <= 1.5 * block
    assert found["give"]["after"] <= -3 * block  # 8 of them became half as large
    assert found["keep"]["more"] >= 3 * block


def test_what_is_replaced_is_given_up_and_the_source_says_so() -> None:
    kept, source = upstream(small("5b")).bfloat16(), upstream(small("5b")).bfloat16()
    expected = cogx_fast.load(kept, quant="int8-weight-only")
    ours = cogx_fast.load(source, quant="int8-weight-only", keep_source=False)
    assert emptied(kept) == 0 < emptied(source) < len(list(source.parameters()))
    for (name, tensor), other in zip(ours.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(getattr(tensor, "qdata", tensor), getattr(other, "qdata", other)), name
    with pytest.raises(ValueError, match="gave its weights up to the model that was made of it: use that one"):
        cogx_fast.load(source)


def test_a_transformer_that_others_hold_keeps_its_weights() -> None:
    pipe, other = make_pipe("CogVideoXPipeline", "5b"), make_pipe("CogVideoXPipeline", "5b")
    expected = generate(pipe)
    other.transformer = pipe.transformer
    cogx_fast.accelerate(other, quant="int8-weight-only")
    assert (generate(pipe) == expected).all()
    alone = make_pipe("CogVideoXPipeline", "5b")
    parameters = list(alone.transformer.parameters())
    cogx_fast.accelerate(alone, quant="int8-weight-only")
    assert sum(parameter.numel() == 0 for parameter in parameters) > 0


@pytest.mark.filterwarnings("ignore")
@for_each(
    "options",
    [
        {"attention": "flash3"},
        {"attention": "sdpa", "attention_plan": "radial"},
        {"attention_plan": "no-such-plan"},
        {"step_cache": "first-block:0.1", "compile": cogx_fast.CompileConfig(scope="model")},
        {"loras": ["no-such-file.safetensors"]},
        {"attention_plan": "radial", "compile": cogx_fast.CompileConfig(backend="eager")},
        {"quant": "fp8-dynamic"},
        {"check_finite": True},
    ],
)
def test_after_an_error_the_pipeline_is_as_it_was(options: dict[str, Any]) -> None:
    pipe = make_pipe("CogVideoXPipeline", "5b")
    pipe.transformer.bfloat16()
    if "check_finite" in options:
        pipe.transformer.proj_out.weight.data[0, 0] = torch.inf  # the last one that is read
    with pytest.raises((ValueError, FileNotFoundError)):
        cogx_fast.accelerate(pipe, **{"quant": "int8-weight-only"} | options)
    assert emptied(pipe.transformer) == 0
