"""LoRAs exchanged in place: the bits that loading would give, an exact way back, nothing half-done."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import cogx_fast
from cogx_fast.runtime.compiling.compile import watch_compilation
from cogx_fast.weights.lora import LoraError
from cogx_fast.weights.quantized import inner_tensors, is_quantized
from tests.cases import for_each
from tests.support import inputs, upstream
from tests.weights.lora_files import CONFIG, EVERYWHERE, TARGETS, as_kohya, halves, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16, and LoRA files: of attention alone, of every linear, and of DoRA."""
    folder = tmp_path_factory.mktemp("loras")
    upstream(CONFIG).bfloat16().save_pretrained(folder / "model")
    tensors = {
        f"transformer.{name}.lora_{half}.weight": tensor
        for name, pair in halves(TARGETS, seed=5).items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "attention.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in as_kohya().items()}, folder / "all.safetensors")
    assert len(EVERYWHERE) > len(TARGETS)
    drawn = torch.Generator().manual_seed(0)
    tensors |= {
        f"transformer.{name}.lora_magnitude_vector": 0.5 + torch.rand(len(up), generator=drawn)
        for name, (_, up) in halves(TARGETS).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "dora.safetensors")
    return folder


def weights(model: Any) -> dict[str, list[Tensor]]:
    return {
        name: [part.detach().clone() for part in (inner_tensors(each) if is_quantized(each) else [each])]
        for name, each in model.named_parameters()
    }


def flat(model: Any) -> list[Tensor]:
    return [part for parts in weights(model).values() for part in parts]


def addresses(model: Any) -> list[int]:
    return [
        part.data_ptr()
        for each in model.parameters()
        for part in (inner_tensors(each) if is_quantized(each) else [each])
    ]


def assert_same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not all(map(torch.equal, one[name], other[name]))]
    assert different == []


@pytest.mark.filterwarnings("ignore:.*says no alpha", "ignore:recipe")
@for_each(
    "recipe",
    [None, "int8-weight-only", "int8-dynamic", "fp8-weight-only"],
    "source",
    ["files", "live", "live of files"],
)
def test_switching_gives_the_bits_that_loading_gives(source: str, recipe: str | None, folder: Path) -> None:
    def load(loras: Any = ()) -> Any:
        if source == "files":
            return cogx_fast.load(folder / "model", quant=recipe, loras=loras)
        live = upstream(CONFIG).bfloat16()
        if source == "live of files":
            live = type(live).from_pretrained(folder / "model", torch_dtype=torch.bfloat16)
        return cogx_fast.load(live, quant=recipe, loras=loras, keep_source=False)

    one, two, dora = (folder / f"{name}.safetensors" for name in ("attention", "all", "dora"))
    model = load()
    before, places = weights(model), addresses(model)
    if source == "live" and recipe is not None:
        with pytest.raises(LoraError, match="are quantized, and the weights that they were made of are gone"):
            model.set_loras([one])
        assert_same(weights(model), before)
        return
    for loras in ([one], [(one, 0.5), (two, -1.0)], [two], [two, (dora, 0.5)], [dora], [one], []):
        model.set_loras(loras)
        assert_same(weights(model), weights(load(loras)) if loras else before)
        if loras:
            assert any(not torch.equal(*pair) for pair in zip(flat(model), flat(load()), strict=True))
    assert addresses(model) == places
    loaded = load([(one, 0.5)])  # and from a model that was loaded with some
    loaded.set_loras([two])
    model.set_loras([two])
    assert_same(weights(loaded), weights(model))
    loaded.set_loras([])
    assert_same(weights(loaded), before)


@pytest.mark.filterwarnings("ignore:.*says no alpha", "ignore:recipe")
@pytest.mark.parametrize(
    ("scope", "recipe", "backend"),
    [
        ("block", "int8-dynamic", "inductor"),
        ("block", None, "aot_eager"),
        ("model", "int8-dynamic", "aot_eager"),
        ("model", None, "aot_eager"),
    ],
)
def test_compiled_code_goes_on(scope: Any, recipe: str | None, backend: str, folder: Path) -> None:
    config = cogx_fast.CompileConfig(scope=scope, backend=backend)
    model = cogx_fast.load(folder / "model", dtype="fp32", quant=recipe, compile=config)
    plain = run(model)
    with watch_compilation() as seen:
        model.set_loras([folder / "all.safetensors"])
        changed = run(model)
        model.set_loras([])
        assert torch.equal(run(model), plain)
    assert seen.graphs == 0
    other = cogx_fast.load(folder / "model", dtype="fp32", quant=recipe, loras=[folder / "all.safetensors"])
    torch.testing.assert_close(changed, run(other), rtol=1e-3, atol=1e-4 if recipe is None else 2e-2)
    assert (changed - plain).abs().max() > 10 * (changed - run(other)).abs().max()


@pytest.mark.filterwarnings("ignore:.*says no alpha")
def test_what_cannot_be_changes_nothing(folder: Path, tmp_path: Path) -> None:
    model = cogx_fast.load(folder / "model", loras=[folder / "attention.safetensors"])
    before = weights(model)
    wrong = dataclasses.replace(CONFIG, num_attention_heads=3)
    tensors = {
        f"{name}.lora_{half}.weight": tensor
        for name, pair in halves(config=wrong).items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, tmp_path / "wrong.safetensors")
    for loras, error in [
        ([folder / "all.safetensors", tmp_path / "wrong.safetensors"], LoraError),
        ([tmp_path / "none.safetensors"], FileNotFoundError),
        ([3], LoraError),
    ]:
        with pytest.raises(error):
            model.set_loras(loras)
        assert_same(weights(model), before)
    model.set_loras([])  # and it knows still what it holds
    assert_same(weights(model), weights(cogx_fast.load(folder / "model")))
    with torch.no_grad():
        model.transformer_blocks[1].attn1.to_qkv.weight.mul_(2)
    with pytest.raises(LoraError, match=r"transformer_blocks\.1\.attn1\.to_qkv\.weight were changed since.*training"):
        model.set_loras([folder / "attention.safetensors"])


@pytest.mark.filterwarnings("ignore:.*says no alpha")
@pytest.mark.parametrize("how", ["saved over", "removed"])
def test_files_that_are_others_by_now_are_not_taken_for_the_weights(how: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    model = cogx_fast.load(tmp_path / "model", loras=[folder / "attention.safetensors"])
    before = weights(model)
    if how == "removed":
        shutil.rmtree(tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")  # with the LoRA in it
    with pytest.raises(LoraError, match="was changed or removed since the model was loaded from it"):
        model.set_loras([])
    assert_same(weights(model), before)


@pytest.mark.filterwarnings("ignore:.*says no alpha")
def test_copies_and_moved_models_switch_too(folder: Path) -> None:
    model = cogx_fast.load(upstream(CONFIG), loras=[folder / "attention.safetensors"])
    expected = weights(cogx_fast.load(upstream(CONFIG)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own bytes
        other.set_loras([])
        assert_same(weights(other), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.set_loras([])
    assert_same(weights(half), {name: [each.bfloat16() for each in parts] for name, parts in expected.items()})
    with torch.no_grad():
        assert model(**inputs(CONFIG)).sample.isfinite().all()
