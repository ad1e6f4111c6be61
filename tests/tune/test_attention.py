"""Finding attention plans: what is scored against the masked softmax, what is chosen, and the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.attention.attend import attend
from cogx_fast.attention.plan import FULL, PlanError
from cogx_fast.attention.plan_file import read_plan
from cogx_fast.attention.windows import Pattern
from cogx_fast.model.transformer import Attention
from cogx_fast.pipelines.generation import Request, quiet
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.sizes import VideoSize
from cogx_fast.tune.attention import Finding, find_plan, masked_outputs
from tests.attention.test_masks import BLOCK, masks
from tests.attention.test_plan import written_out
from tests.attention.test_windows import PATTERNS
from tests.conftest import report, run_cli
from tests.support import relative_error

REQUESTS = [
    Request(prompt=prompt, size=VideoSize(frames=17, height=64, width=64), steps=4)
    for prompt in ("the digit seven moving left", "the digit two moving up")
]
SMALL: dict[str, Any] = {"block_size": 8, "tile": (2, 2)}


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny pipeline in fp32 with our transformer, uncompiled."""
    from diffusers import CogVideoXPipeline

    model = cogx_fast.load("tiny", dtype="fp32")
    return quiet(CogVideoXPipeline.from_pretrained(tiny_pipeline_dir(), transformer=model, torch_dtype=torch.float32))


@pytest.fixture(scope="module")
def findings(tiny: Any) -> dict[float, Finding]:
    return {error: find_plan(tiny, REQUESTS, max_error=error, **SMALL) for error in (0.0, 0.1, 0.4)}


@pytest.mark.parametrize(("grid", "text_len"), [((5, 7, 9), 11), ((3, 5, 4), 8)])
def test_scored_outputs_are_the_masked_softmax(grid: Any, text_len: int) -> None:
    _, elements_PSS = masks(grid, text_len)
    tokens = elements_PSS.shape[-1]
    q, k, v = torch.randn(3, 2, tokens, 32, generator=torch.Generator().manual_seed(0)).mul(2).unbind(0)
    rows = torch.tensor([0, 17, 40, tokens - 1])
    keep_PRQ = elements_PSS[:, rows][..., ::BLOCK].float()
    out = masked_outputs(q[:, rows], k, v, keep_PRQ, BLOCK)
    for pattern, mask in enumerate(elements_PSS):
        scores = (q[:, rows].double() @ k.double().mT / math.sqrt(32)).masked_fill(~mask[rows], -torch.inf)
        assert relative_error(out[pattern], scores.softmax(-1) @ v.double()) <= 1e-5, str(PATTERNS[pattern])


def test_errors_are_within_what_is_allowed_and_more_error_keeps_less(findings: dict[float, Finding]) -> None:
    kept = {}
    for error, finding in findings.items():
        assert float(finding.head_errors_LN.max()) <= error
        assert float(finding.block_errors_L.max()) <= error
        kept[error] = float(finding.kept_LN.mean())
    assert kept[0.0] == 1
    assert kept[0.4] < kept[0.1] < 1
    assert kept[0.4] < 0.7
    assert len({index for row in findings[0.4].plan.choice for index in row}) > 1, "heads differ"


def test_the_blocks_error_is_that_of_the_model_with_the_mask(tiny: Any, findings: dict[float, Finding]) -> None:
    """Measured again for every token of one call, with the plan's masks written out and PyTorch's attention."""
    model: CogVideoXModel = tiny.transformer
    plan = findings[0.4].plan
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int) -> Any:
        def hook(attention: Attention, args: tuple[Any, ...], output: Tensor) -> None:
            q, k, v = attention.project(args[0], args[1])
            mask = written_out(plan, model, arguments, layer).unflatten(0, (1, -1))
            sparse = attention.to_out[0](attend(q, k, v, backend="sdpa", mask=mask).flatten(2))
            seen[layer] = (sparse[:, 8:], output[:, 8:])

        return hook

    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, 5, 8, 8, 8, generator=generator),
        "encoder_hidden_states": tiny.encode_prompt(REQUESTS[0].prompt, None, False, max_sequence_length=8)[0],
        "timestep": torch.tensor([750]),
    }
    hooks = [block.attn1.register_forward_hook(watch(layer)) for layer, block in enumerate(model.transformer_blocks)]
    with torch.no_grad():
        model(**arguments)
    for hook in hooks:
        hook.remove()
    errors = [relative_error(*pair) for pair in seen.values()]
    assert len(errors) == 6
    assert all(0 < error <= 1.5 * 0.4 for error in errors), errors  # another input than those it was found with


def test_the_dense_part_is_not_looked_at(tiny: Any) -> None:
    with pytest.raises(PlanError, match="no step after the dense ones was run"):
        find_plan(tiny, [Request(prompt="", size=REQUESTS[0].size, steps=1)], max_error=0.1, **SMALL)


def test_only_given_patterns_are_chosen_and_hooks_are_gone(tiny: Any) -> None:
    spatial = Pattern(kind="spatial")
    done: list[int] = []
    finding = find_plan(tiny, REQUESTS[:1], max_error=10, candidates=[spatial], on_step=done.append, **SMALL)
    assert finding.plan.patterns == (FULL, spatial)
    assert set(finding.plan.choice) == {(1, 1, 1)}
    assert done == list(range(1, 9))
    assert not tiny.transformer._forward_pre_hooks
    assert not any(block.attn1._forward_hooks for block in tiny.transformer.transformer_blocks)


def test_a_model_that_is_not_dense_is_refused(tiny: Any) -> None:
    tiny.transformer.inputs.plan = object()
    try:
        with pytest.raises(PlanError, match="uncompiled and without a plan"):
            find_plan(tiny, REQUESTS, max_error=0.1)
    finally:
        tiny.transformer.inputs.plan = None


def test_the_command_writes_a_plan_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "plans" / "tiny.toml"
    command = ["plan", "tiny", "--prompts", "a seven", "--max-error", "0.3", "--out", out, "--steps", "4"]
    facts = report(run_cli(*command, "--block-size", "8", "--tile", "2", "2", "--dtype", "fp32", "--json"))
    plan = read_plan(out)
    model = cogx_fast.load("tiny", attention_plan=out)
    assert model.attention_plan == plan
    assert (plan.block_size, plan.tile, plan.dense_above) == (8, (2, 2), 800)
    assert facts["kept"] == pytest.approx(float(plan.kept((5, 4, 4), 8).mean()))
    assert facts["kept"] < 1
    assert max(facts["block_errors"]) <= 0.3
    assert sum(each["heads"] for each in facts["patterns"]) == 18
    with pytest.raises(PlanError, match="another configuration"):
        plan.check(cogx_fast.TransformerConfig.preset("5b"))


def test_the_commands_table_and_errors(tmp_path: Path) -> None:
    out = tmp_path / "tiny.toml"
    command = ["plan", "tiny", "--prompts", "a seven", "--max-error", "0.3", "--steps", "3", "--block-size", "8"]
    text = run_cli(*command, "--out", out).out
    assert "block error" in text
    assert "of all blocks kept at 5 × 4 × 4 patches, dense at timesteps from 800" in text
    assert f"attention_plan={str(out)!r}" in text
    refused = run_cli(*command, "--out", tmp_path / "plan.json")
    assert refused.status == 2
    assert "expected a name that ends in .toml" in refused.err
