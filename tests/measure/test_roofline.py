"""The roofline's operations are torch's own count, its bytes those of the generated code less what can go, its times
the published floors.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogx_fast import sizes
from cogx_fast.config import PRESETS
from cogx_fast.measure import mesh, roofline
from cogx_fast.measure.devices import DEVICES
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from cogx_fast.runtime.step_caching.step_schedule_file import write_schedule
from cogx_fast.runtime.streaming import HostPart
from tests.cases import for_each
from tests.conftest import report, run_cli
from tests.support import RELEASED, inputs

H100 = DEVICES["h100"]
CODEGEN = Path(__file__).resolve().parents[2] / "benchmarks" / "expected" / "codegen.csv"


def _tokens(name: str) -> sizes.Tokens:
    return sizes.count_tokens(PRESETS[name], sizes.default_video(PRESETS[name]))


def _parts(name: str, **options: Any) -> list[roofline.Part]:
    return roofline.parts(PRESETS[name], _tokens(name), **{"batch": 2, **options})


def _seconds(name: str, device: Any = H100, group: str = "", **options: Any) -> float:
    return sum(part.seconds(device) for part in _parts(name, **options) if part.group.startswith(group))


# ---------------------------------------------------------------------------------------------------------- operations


@for_each("name", RELEASED, "owner", ["ours", "diffusers"])
def test_operations_are_those_that_torch_counts_at_full_size(name: str, owner: str) -> None:
    from diffusers import CogVideoXTransformer3DModel

    config, video = PRESETS[name], sizes.default_video(PRESETS[name])
    frames = _tokens(name).grid[0] * (config.patch_size_t or 1)
    with torch.device("meta"):
        model = CogVideoXModel(config) if owner == "ours" else CogVideoXTransformer3DModel(**config)
        arguments = inputs(config, frames=frames, height=video.height // 8, width=video.width // 8, device="meta")
        if config.use_rotary_positional_embeddings:
            table = torch.empty(_tokens(name).video, config.attention_head_dim)
            arguments["image_rotary_emb"] = (table, table)
        if config.ofs_embed_dim is not None:
            arguments["ofs"] = torch.empty(2)  # one a video, as the model sees it; upstream may share one
        # plain attention, whose products torch counts; nothing is computed on meta
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(**arguments)
    assert sum(part.flops for part in _parts(name)) == counter.get_total_flops()


def test_the_share_of_the_scores_that_is_kept_is_the_share_of_the_work() -> None:
    dense, sparse = ({part.name: part for part in _parts("5b", kept=kept)} for kept in (1.0, 0.25))
    assert sparse["attention"].flops == dense["attention"].flops / 4
    assert sparse["attention"].exponentials == dense["attention"].exponentials / 4
    assert sparse["attention"].bytes == dense["attention"].bytes
    assert all(sparse[name] == part for name, part in dense.items() if name != "attention")


# --------------------------------------------------------------------------------------------------------------- bytes


@for_each("name", ["2b", "5b", "1.5-5b"])
def test_generated_code_moves_what_the_floor_says_and_little_more(name: str) -> None:
    with CODEGEN.open() as file:
        recorded = {(row["case"], row["metric"]): row["value"] for row in csv.DictReader(file)}
    attention_and_glue = sum(part.bytes for part in _parts(name) if part.group in ("attention", "glue"))
    roles = ("queries, keys, values", "attention out", "feed-forward in", "feed-forward out")
    linears = sum(part.bytes for part in _parts(name) if part.name in roles)
    floor = (attention_and_glue + linears) / PRESETS[name].num_layers
    generated = int(recorded[f"{name}/ours/cudnn", "bytes"])
    gelu = 8 * 2 * _tokens(name).joint * PRESETS[name].inner_dim * 2  # written and read apart from the product
    assert floor < 1.001 * generated
    assert generated < floor + 1.01 * gelu + 4 * 2 * _tokens(name).joint * PRESETS[name].inner_dim * 2


def test_the_5b_block_is_33_passes_over_the_stream() -> None:
    stream = 2 * 2 * _tokens("5b").joint * 3072
    roles = ("queries, keys, values", "attention out", "feed-forward in", "feed-forward out")
    moved = sum(p.bytes for p in _parts("5b") if p.group in ("attention", "glue") or p.name in roles) / 42
    weights = 12 * 3072**2 * 2
    assert (moved - weights) / stream == pytest.approx(33, abs=0.01)


@for_each("scheme", [name for name in roofline.SCHEMES if name != roofline.UNQUANTIZED])
def test_quantized_linears_move_less(scheme: str) -> None:
    before, after = (sum(part.bytes for part in _parts("5b", scheme=s)) for s in (roofline.UNQUANTIZED, scheme))
    assert after < before


def test_schemes_are_called_as_the_recipes_that_are_shipped() -> None:
    import quant

    assert set(roofline.SCHEMES) - {roofline.UNQUANTIZED} <= set(quant.recipe_names())


@for_each("scheme", ["bf16", "int8-weight-only", "fp8-weight-only"])
def test_a_streamed_blocks_bytes_are_those_of_the_real_one(scheme: str) -> None:
    config = dataclasses.replace(PRESETS["5b"], num_layers=1, num_attention_heads=12, time_embed_dim=32)
    model = CogVideoXModel(config).bfloat16()
    if scheme != roofline.UNQUANTIZED:
        import quant

        quant.quantize(model, scheme)
    real = HostPart(model.transformer_blocks[0]).memory.numel()
    assert real == pytest.approx(roofline.block_bytes(config, scheme), rel=0.005)


def test_a_copy_hides_where_it_takes_less_than_a_block_computes_and_else_sets_the_pace() -> None:
    for device, hidden in (("h100", [False, True, True]), ("rtx3060", [True, True, True])):
        links = roofline.streaming(PRESETS["5b"], _parts("5b"), DEVICES[device], scheme="bf16")
        assert [each.hides for each in links] == hidden
        floor = _seconds("5b", DEVICES[device])
        for each in links:
            slower = PRESETS["5b"].num_layers * max(0.0, each.copy_seconds - each.compute_seconds)
            assert each.step_seconds == pytest.approx(floor + slower)
    text = run_cli("roofline", "--preset", "5b", "--device", "h100", "--offload", "blocks").out
    assert "a prediction" in text
    assert "PCIe 3.0 × 16       18.0      1.1 × as long" in text


# --------------------------------------------------------------------------------------------------------------- times


@for_each(
    "name, attention, linear, bf16, fp8",
    [("2b", 146, 94, 0.30, 0.25), ("5b", 326, 338, 0.83, 0.63), ("1.5-5b", 2100, 858, 3.70, 3.20)],
)
def test_floors_at_reachable_rates_are_the_published_ones(
    name: str, attention: float, linear: float, bf16: float, fp8: float
) -> None:
    """Without the glue and at 800 (bf16) and 1,500 (fp8) TFLOP/s."""
    reachable = roofline.with_ceilings(H100, {"bf16": 800, "fp8": 1500})
    parts = _parts(name)
    assert sum(p.flops for p in parts if p.group == "attention") / 1e12 == pytest.approx(attention, rel=5e-3)
    assert sum(p.flops for p in parts if p.group == "linears") / 1e12 == pytest.approx(linear, rel=5e-3)
    for scheme, published in (("bf16", bf16), ("fp8-dynamic", fp8)):
        floor = sum(_seconds(name, reachable, group, scheme=scheme) for group in ("attention", "linears"))
        assert floor == pytest.approx(published, rel=0.02)


def test_exponentials_can_bind() -> None:
    (attention,) = (part for part in _parts("5b") if part.name == "attention")
    assert attention.exponentials == pytest.approx(1.27e12, rel=5e-3)
    times = attention.times(H100)
    assert times["exponentials"] == pytest.approx(0.33, rel=0.02)
    fast = dataclasses.replace(H100, bf16=10 * H100.bf16)
    assert attention.bound(fast) == "exponentials"
    assert attention.seconds(fast) == times["exponentials"]


def test_gpus_share_everything_but_what_each_must_do() -> None:
    one, two = _seconds("5b"), _seconds("5b", guidance=2)
    eight = _seconds("5b", guidance=2, sequence=4)
    assert two == pytest.approx(one / 2, rel=0.01)  # a video each: next to nothing to exchange
    assert one / 8 < eight < one / 4
    sent = {part.name: part.sent for part in _parts("5b", guidance=2, sequence=4)}
    assert sent["heads for tokens"] == pytest.approx(42 * 4 * (2 * 17_776 * 3072 * 2 / 8) * 3 / 4)
    assert {part.name for part in _parts("5b", guidance=2) if part.sent} == {"prediction"}


def test_the_best_mesh_takes_guidance_first_and_says_how_far_it_is_off() -> None:
    for name, gpus, pair in (("5b", 2, (2, 1)), ("5b", 8, (2, 4)), ("2b", 12, (2, 6)), ("2b", 3, (1, 3))):
        for link in mesh.LINKS:
            best, *_ = mesh.meshes(PRESETS[name], _tokens(name), mesh.with_link(H100, link), gpus, batch=2)
            assert (best.guidance, best.sequence) == pair
            assert _seconds(name) / best.seconds < gpus
    assert mesh.meshes(PRESETS["2b"], _tokens("2b"), H100, 8, batch=2) == []  # 30 heads
    with pytest.raises(ValueError, match="no NVLink"):
        mesh.with_link(DEVICES["l40"], "nvlink")
    for published in mesh.PUBLISHED:  # a floor is never slower
        assert published.speed_up < mesh.check(published).speed_up < published.gpus


def test_the_command_line_says_the_best_mesh_of_each_number() -> None:
    options = ("roofline", "--preset", "5b", "--device", "h100", "--gpus")
    facts = report(run_cli(*options, "2..64", "--json"))
    found = {each["gpus"]: (each["guidance"], each["sequence"]) for each in facts["meshes"]}
    assert found[8] == (2, 4)
    assert 5 not in found
    assert report(run_cli(*options, "8", "--json"))["mesh"] == {"guidance": 2, "sequence": 4}
    assert "use one of 2, 3, 4, 6, 8, 12, 16, 24, 32, 48" in run_cli(*options, "5").err
    text = run_cli(*options, "2..8", "--link", "pcie").out
    assert "7.75 published (xDiT" in text


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_report_adds_up() -> None:
    facts = report(run_cli("roofline", "--preset", "5b", "--device", "h100", "--quant", "fp8-dynamic", "--json"))
    parts = facts["parts"]
    assert facts["floor_seconds"] == pytest.approx(sum(part["seconds"] for part in parts))
    assert facts["floor_seconds"] == pytest.approx(sum(facts["groups"].values()))
    assert facts["flops"] == sum(part["flops"] for part in parts)
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert facts["floor_seconds"] == pytest.approx(_seconds("5b", scheme="fp8-dynamic"))


def test_a_step_cache_takes_the_time_of_the_blocks_it_computes(tmp_path: Path) -> None:
    layers = PRESETS["5b"].num_layers
    whole = _seconds("5b")

    def found(schedule: StepSchedule) -> dict[str, Any]:
        write_schedule(schedule, tmp_path / "s.toml")
        command = ("roofline", "--preset", "5b", "--device", "h100", "--steps", str(schedule.steps), "--json")
        command += ("--step-cache", tmp_path / "s.toml")
        cached: dict[str, Any] = report(run_cli(*command))["step_cache"]
        return cached

    all_of_it = found(StepSchedule(blocks=(layers,) * 4, num_layers=layers))
    assert all_of_it["mean_floor_seconds"] == pytest.approx(whole)
    half = found(StepSchedule(blocks=(layers, 0), num_layers=layers))
    assert half["ratio"] == pytest.approx(0.5, abs=2e-3)
    assert half["ratio"] > 0.5
    apart = StepSchedule(blocks=(layers,) * 3, unconditional=(1, 0, 0), num_layers=layers)
    half_of_the_batch = _seconds("5b", batch=1) / whole  # less than half: weights are read once in either
    assert found(apart)["ratio"] == pytest.approx((1 + 2 * half_of_the_batch) / 3, abs=5e-3)
    text = run_cli("roofline", "--preset", "5b", "--device", "h100", "--step-cache", "balanced").out
    assert "step cache balanced, 2.00 times fewer blocks in 50 steps" in text


def test_size_batch_and_gpus_are_those_asked_for() -> None:
    out = run_cli(
        "roofline", "--preset", "5b", "--device", "a100", "--height", "256", "--width", "320", "--frames", "9",
        "--batch", "4", "--gpus", "4", "--attention-kept", "0.3",
    ).out  # fmt: skip
    assert "9 frames, 256 × 320, batch 4, 1,186 tokens, bf16, 30% of the attention scores" in out
    assert "4 × NVIDIA A100-SXM4-80GB, guidance 4 × sequence 1, each" in out
    assert "not a measurement" in out


def test_measured_ceilings_take_the_place_of_stated_ones(tmp_path: Path) -> None:
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({"bf16": 494.7}))
    stated = report(run_cli("roofline", "--preset", "5b", "--device", "h100", "--json"))
    measured = report(run_cli("roofline", "--preset", "5b", "--device", "h100", "--ceilings", path, "--json"))
    assert measured["groups"]["attention"] == pytest.approx(2 * stated["groups"]["attention"])
    assert measured["device"]["source"].startswith("measured bf16")


@for_each(
    "arguments, message",
    [
        (("--device", "a100", "--quant", "fp8-dynamic"), "states no peak for 'fp8'"),
        (("--device", "h100", "--gpus", "7"), "7 GPUs cannot share a batch of 2 and 48 heads: use one of 2, 3, 4"),
        (("--device", "h100", "--attention-kept", "0"), "expected a share above 0"),
        (("--device", "h100", "--height", "481"), "use 480 or 496"),
        (("--device", "abacus"), "invalid choice: 'abacus'"),
        (("--device", "h100", "--ceilings", "{tmp}/none.json"), "No such file"),
        (("--device", "h100", "--ceilings", "{tmp}/list.json"), "expected an object of ceilings"),
        (("--device", "h100", "--ceilings", "{tmp}/zero.json"), "expected TFLOP/s of bf16"),
        (("--device", "h100", "--step-cache", "teacache:0.2"), "depends on the model's weights"),
        (("--device", "h100", "--step-cache", "slow"), "expected quality, balanced"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "zero.json").write_text('{"bf16": 0}')
    finished = run_cli("roofline", "--preset", "5b", *(a.format(tmp=tmp_path) for a in arguments))
    assert (finished.status, finished.out) == (2, "")
    assert message in finished.err
