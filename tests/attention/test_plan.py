"""Attention plans: the model with one against the model with its masks written out; their files; what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cogx_fast
from cogx_fast.attention.plan import BUILT_IN, FULL, AttentionPlan, PlanError, hash_config, hash_weights
from cogx_fast.attention.plan_file import choose_plan, read_plan, render_plan, write_plan
from cogx_fast.attention.windows import Pattern, block_boxes, kept_blocks, token_order
from cogx_fast.config import PRESETS
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, uncompile_model, watch_compilation
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.sizes import count_tokens, default_video
from tests.cases import for_each
from tests.model.pairs import copy_of, lively_upstream
from tests.support import AROUND, RELEASED, inputs, pipeline_rotary, predict, relative_error, small

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SPATIAL, TEMPORAL = Pattern(kind="spatial"), Pattern(kind="temporal", space=0.1)
FEW = AttentionPlan(
    patterns=(FULL, SPATIAL, TEMPORAL), choice=((1, 2),) * 2, block_size=16, tile=(2, 2), dense_above=700.0
)
"""For the small models: two layers of two heads."""


def models(name: str = "5b", **changes: Any) -> tuple[CogVideoXModel, CogVideoXModel]:
    """The same model twice: with flex, for plans, and with sdpa, which takes any mask."""
    config = small(name, **changes)
    theirs = lively_upstream(config)
    return copy_of(theirs, config, attention="flex").eval(), copy_of(theirs, config).eval()


def at(arguments: dict[str, Any], timestep: int) -> dict[str, Any]:
    return arguments | {"timestep": torch.tensor([timestep])}


def written_out(plan: AttentionPlan, model: CogVideoXModel, arguments: dict[str, Any], layer: int = 0) -> Tensor:
    """A layer's mask as ``attention_mask`` (B · N, S, S) for tokens in their own order."""
    batch, text_len = arguments["encoder_hidden_states"].shape[:2]
    latents = arguments["hidden_states"]
    grid = model.config.grid(latents.shape[1], *latents.shape[3:])
    boxes = block_boxes(grid, plan.tile, text_len, plan.block_size)
    restore_V = token_order(grid, plan.tile).restore_V
    block_S = torch.cat([torch.arange(text_len), text_len + restore_V]) // plan.block_size
    heads = [kept_blocks(plan.patterns[index], boxes)[block_S][:, block_S] for index in plan.choice[layer]]
    return torch.stack(heads * batch)


@for_each("name", RELEASED)
def test_order_of_tokens_changes_nothing_without_a_mask(name: str) -> None:
    planned, plain = models(name)
    planned.set_attention_plan(AttentionPlan(patterns=(FULL,), choice=((0,),) * 2, block_size=16, tile=(2, 3)))
    arguments = inputs(plain.config)
    expected = predict(plain, arguments)
    assert relative_error(predict(planned, arguments), expected) <= 1e-5
    given = arguments | {"image_rotary_emb": pipeline_rotary(plain.config, arguments["hidden_states"])}
    assert relative_error(predict(planned, given), expected) <= 1e-5


@for_each("size", [{}, {"frames": 6, "height": 10, "width": 14, "text_len": 5}], "name", ["2b", "5b", "1.5-5b"])
def test_a_planned_model_is_the_model_with_the_mask_written_out(name: str, size: dict[str, int]) -> None:
    """Also on another grid: the windows there are those of that grid."""
    planned, plain = models(name)
    planned.set_attention_plan(FEW)
    arguments = at(inputs(plain.config, **size), 500)
    mask = written_out(FEW, plain, arguments)
    assert 0.2 < mask.double().mean() < 0.9
    expected = predict(plain, arguments | {"attention_kwargs": {"attention_mask": mask}})
    assert relative_error(predict(planned, arguments), expected) <= 1e-5
    assert relative_error(predict(plain, arguments), expected) > 1e-3


def test_first_steps_are_dense() -> None:
    planned, plain = models()
    planned.set_attention_plan(FEW)
    arguments = inputs(plain.config)
    for timestep, is_dense in [(999, True), (700, True), (699, False), (0, False)]:
        error = relative_error(predict(planned, at(arguments, timestep)), predict(plain, at(arguments, timestep)))
        assert (error <= 1e-5) == is_dense, timestep
    mixed = arguments | {"timestep": torch.tensor([900, 10])}  # one that needs it is enough
    assert relative_error(predict(planned, mixed), predict(plain, mixed)) <= 1e-5


def test_one_graph_from_dense_to_sparse_over_layers_and_heads() -> None:
    planned, plain = models(num_layers=3)
    planned.set_attention_plan(dataclasses.replace(FEW, choice=((1, 2), (2, 0), (0, 1))))
    calls = [at(inputs(plain.config, seed=seed), timestep) for seed, timestep in enumerate([999, 800, 600, 20])]
    expected = [predict(planned, arguments) for arguments in calls]
    compile_model(planned, CompileConfig())
    with watch_compilation() as stats:
        outputs = [predict(planned, arguments) for arguments in calls]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    for output, right in zip(outputs, expected, strict=True):
        assert relative_error(output, right) <= 1e-5


@pytest.mark.slow
def test_the_whole_model_is_one_graph_too() -> None:
    planned, plain = models()
    planned.set_attention_plan(FEW)
    calls = [at(inputs(plain.config, batch=1), timestep) for timestep in (999, 20)]
    expected = [predict(planned, arguments) for arguments in calls]
    compile_model(planned, CompileConfig(scope="model"))
    with watch_compilation() as stats:
        outputs = [predict(planned, arguments) for arguments in calls]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1, 0, 0)
    for output, right in zip(outputs, expected, strict=True):
        assert relative_error(output, right) <= 1e-5


def test_a_compiler_that_ignores_blocks_is_refused() -> None:
    """Only Inductor's kernels skip blocks; another backend would compute dense attention and say nothing."""
    planned, _ = models()
    compile_model(planned, CompileConfig(backend="eager"))
    with pytest.raises(PlanError, match="compile backend 'eager', which ignores plans"):
        planned.set_attention_plan(FEW)
    uncompile_model(planned)
    planned.set_attention_plan(FEW)
    with pytest.raises(PlanError, match="compile backend 'eager', which ignores plans"):
        compile_model(planned, CompileConfig(backend="eager"))


def test_masks_are_made_once_for_each_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, _ = models()
    made: list[tuple[int, int, int]] = []
    on_grid = AttentionPlan.on_grid

    def counted(self: AttentionPlan, grid: Any, *arguments: Any) -> Any:
        made.append(grid)
        return on_grid(self, grid, *arguments)

    monkeypatch.setattr(AttentionPlan, "on_grid", counted)

    def call(frames: int) -> None:
        with torch.no_grad():
            planned(**inputs(planned.config, frames=frames))

    planned.set_attention_plan(FEW)
    for frames in (3, 3, 4, 3):
        call(frames)
    assert len(made) == 2
    planned.set_attention_plan(dataclasses.replace(FEW, tile=(1, 2)))
    call(3)
    assert len(made) == 3
    planned.set_attention_plan(None)
    call(3)
    assert len(made) == 3


def test_kept_parts_are_those_of_the_masks() -> None:
    kept = FEW.kept((3, 6, 5), 8)
    blocks = FEW.on_grid((3, 6, 5), 8).blocks
    parts = blocks.counts_PQ.double().mean(-1) / blocks.counts_PQ.shape[-1]
    assert torch.allclose(kept, parts[blocks.choice_LN])
    assert kept.shape == (2, 2)
    assert 0 < float(kept.min()) < float(kept.max()) < 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_docs_say_what_the_built_in_plans_keep(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    kept = []
    for preset in ("5b", "1.5-5b"):
        config = PRESETS[preset]
        tokens = count_tokens(config, default_video(config))
        kept.append(f"{BUILT_IN[name](config).kept(tokens.grid, tokens.text).mean():.2f}")
    assert [cell.strip() for cell in row.split("|")[3:5]] == kept


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    config = small("5b")
    for plan in (FEW, dataclasses.replace(FEW, config_hash=hash_config(config), weights_hash="0f", origin='say "é"\n')):
        write_plan(plan, tmp_path / "plan.toml")
        assert read_plan(tmp_path / "plan.toml") == plan
        assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


@for_each(
    "old, new, message",
    [
        ("format = 1", "format = 2", "format is 2, expected 1"),
        ("format = 1", "", "format is None"),
        ("block_size = 16", 'block_size = "16"', "got '16', expected a whole number"),
        ("block_size = 16", "block_size = 0", "must be 1 or more"),
        ("tile = [2, 2]", "tile = [2]", "expected frames and rows"),
        ("tile = [2, 2]", "", "'tile' is missing"),
        ("dense_above = 700.0", "dense_above = true", "expected a number"),
        ("dense_above = 700.0", "dense_over = 700.0", "unknown keys dense_over"),
        ("[1, 2],", "[1, 3],", "indices of its 3 patterns"),
        ("[1, 2],", "[1],", "a row for each layer, all of one length"),
        ("[1, 2],", "[1, -1],", "indices of its 3 patterns"),
        ('kind = "full"', 'kind = "radial"', "must begin with the full one"),
        ('kind = "spatial"', 'kind = "full"', "must begin with the full one, and have it once"),
        ('kind = "spatial"', 'kind = "sideways"', "'sideways', expected one of"),
        ('kind = "spatial"', "reach = 2", "unexpected keyword argument 'reach'"),
        ("format = 1", "format = ", "Invalid value"),
    ],
)
def test_damaged_files_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = render_plan(FEW)
    assert old in text
    path = tmp_path / "plan.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(PlanError, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(PlanError, match=r"plan\.toml"):
        read_plan(path)


# -- whose plan -------------------------------------------------------------------------------------------------------


def test_a_plan_of_another_model_is_refused() -> None:
    planned, _ = models()
    for plan, message in [
        (dataclasses.replace(FEW, config_hash=hash_config(small("5b", num_layers=3))), "another configuration"),
        (dataclasses.replace(FEW, choice=FEW.choice * 2), "4 layers of 2 heads, the model 2 of 2"),
        (dataclasses.replace(FEW, choice=((1, 1, 1),) * 2), "2 layers of 3 heads, the model 2 of 2"),
    ]:
        with pytest.raises(PlanError, match=message):
            planned.set_attention_plan(plan)
    assert planned.attention_plan is None


def test_other_weights_give_a_warning_and_other_dtypes_none() -> None:
    planned, _ = models()
    plan = dataclasses.replace(FEW, config_hash=hash_config(planned.config), weights_hash=hash_weights(planned))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned.set_attention_plan(plan)
        planned.to(torch.bfloat16).set_attention_plan(plan)
    with torch.no_grad():
        planned.proj_out.bias.add_(0.1)
    with pytest.warns(UserWarning, match="made with other weights of the same configuration"):
        planned.set_attention_plan(plan)


def test_a_plan_needs_a_backend_with_block_masks_and_no_other_mask() -> None:
    planned, plain = models()
    with pytest.raises(PlanError, match="attention backend 'sdpa', which takes no block masks: use 'flex'"):
        plain.set_attention_plan(FEW)
    planned.set_attention_plan(FEW)
    arguments = inputs(plain.config)
    with pytest.raises(ValueError, match="an attention plan is set, which is a mask"):
        predict(planned, arguments | {"attention_kwargs": {"attention_mask": torch.ones(2, 128)}})
    with pytest.raises(PlanError, match="attention backend 'sdpa', which takes no block masks: use 'flex'"):
        planned.set_attention_backend("sdpa")
    assert set(planned.attention_backends) == {"flex"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_load_takes_a_plan_by_name_file_or_itself(name: str, tmp_path: Path) -> None:
    model = cogx_fast.load("tiny", attention_plan=name)
    plan = model.attention_plan
    assert plan is not None
    assert plan == BUILT_IN[name](model.config)
    assert list(model.attention_backends) == ["flex"]
    write_plan(plan, tmp_path / "plan.toml")
    assert cogx_fast.load("tiny", attention_plan=tmp_path / "plan.toml").attention_plan == plan
    assert cogx_fast.load("tiny", attention_plan=plan).attention_plan == plan
    assert cogx_fast.load("tiny").attention_plan is None
    with pytest.raises(PlanError, match="'sdpa', which takes no block masks"):
        cogx_fast.load("tiny", attention="sdpa", attention_plan=name)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    config = small("5b")
    with pytest.raises(PlanError, match=r"'triles' is no file and none of the built-in ones \(radial, tiles\)"):
        choose_plan("triles", config)
    with pytest.raises(PlanError, match="attention_plan is a int"):
        choose_plan(7, config)  # type: ignore[arg-type]


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_compiled_plan_on_a_gpu_is_the_mask_written_out(name: str) -> None:
    """In blocks of 128, bf16; from dense to sparse without a recompile, and without waiting for the timestep."""
    planned, plain = models(sample_height=32, sample_width=48, sample_frames=25)
    plan = BUILT_IN[name](planned.config)
    arguments = at(inputs(plain.config, batch=1, frames=7), 500)
    mask = written_out(dataclasses.replace(plan, choice=tuple(row * 2 for row in plan.choice)), plain, arguments)
    assert mask.double().mean() < 0.9
    exact = predict(plain, arguments | {"attention_kwargs": {"attention_mask": mask}})
    planned.to("cuda", torch.bfloat16).set_attention_plan(plan)
    compile_model(planned, CompileConfig())
    half = {key: value.cuda() for key, value in arguments.items()}
    half |= {key: half[key].bfloat16() for key in ("hidden_states", "encoder_hidden_states")}
    with watch_compilation() as stats:
        predict(planned, half | {"timestep": torch.tensor([999], device="cuda")})
        output = predict(planned, half)
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    assert relative_error(output.cpu(), exact) <= 0.03
    torch.cuda.set_sync_debug_mode("error")
    try:
        predict(planned, half)
    finally:
        torch.cuda.set_sync_debug_mode("default")
