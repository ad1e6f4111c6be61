"""A package computes what the model computes, with any weights of its configuration, and no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cogx_fast
from cogx_fast.loading import load, load_package
from cogx_fast.runtime import streaming
from cogx_fast.runtime.code_file import ArtifactError, read_artifact, write_artifact
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.packages import package as module
from tests import worlds
from tests.cases import for_each
from tests.conftest import Package
from tests.support import inputs, predict, relative_error, small, upstream
from tests.weights.lora_files import halves

SIZES: list[dict[str, int]] = [
    {},
    {"batch": 1},
    {"batch": 4, "frames": 1, "height": 2, "width": 2, "text_len": 1},
    {"batch": 3, "frames": 3, "height": 16, "width": 6, "text_len": 5},
    {"frames": 4, "height": 16, "width": 16},
]


def check(packaged: CogVideoXModel, eager: CogVideoXModel, most: float = 1e-5) -> None:
    for size in SIZES:
        arguments = inputs(eager.config, **size)
        assert relative_error(predict(packaged, arguments), predict(eager, arguments)) <= most, size


@pytest.fixture(scope="module")
def packaged(package: Package) -> CogVideoXModel:
    return load_package(package.path, package.checkpoint)


def test_the_command_reports_it(package: Package) -> None:
    facts = package.facts
    assert facts["file"] == str(package.path)
    assert facts["bytes"] == package.path.stat().st_size
    assert (facts["dtype"], facts["attention"], facts["kinds"]) == ("float32", "sdpa", 1)
    assert facts["sizes"] == {"tokens": [2, 264], "batch": 4}
    assert facts["seconds"] > 0


def test_one_package_computes_every_size_of_its_range(packaged: CogVideoXModel, package: Package) -> None:
    check(packaged, load(package.checkpoint))


def test_other_weights_of_the_configuration(package: Package) -> None:
    other = upstream(packaged_config := small("5b", num_attention_heads=1), seed=7)
    model = load_package(package.path, other)
    eager = load(other)
    check(model, eager)
    first = predict(load_package(package.path, package.checkpoint), inputs(packaged_config))
    assert relative_error(first, predict(eager, inputs(packaged_config))) > 0.1


def test_weights_that_are_changed_in_place_or_replaced(package: Package) -> None:
    """As merging a LoRA does."""
    model, eager = load_package(package.path, package.checkpoint), load(package.checkpoint)
    check(model, eager)
    for each in (model, eager):
        torch.manual_seed(3)
        with torch.no_grad():
            for block in each.transformer_blocks:
                linear = block.attn1.to_qkv
                linear.weight.data = linear.weight + torch.randn(linear.out_features, 2) @ torch.randn(
                    2, linear.in_features
                )
        each.transformer_blocks[1].ff.net[2].weight = torch.nn.Parameter(
            torch.randn_like(each.transformer_blocks[1].ff.net[2].weight) * 0.1, requires_grad=False
        )
    check(model, eager)


@pytest.mark.filterwarnings("ignore:.*says no alpha")
def test_loras_are_exchanged_under_its_code(package: Package, tmp_path: Path) -> None:
    model, plain = load_package(package.path, package.checkpoint), load(package.checkpoint)
    tensors = {
        f"{name}.lora_{half}.weight": tensor
        for name, pair in halves(config=plain.config).items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    model.set_loras([tmp_path / "lora.safetensors"])
    check(model, load(package.checkpoint, loras=[tmp_path / "lora.safetensors"]))
    assert relative_error(predict(model, inputs(plain.config)), predict(plain, inputs(plain.config))) > 1e-2
    model.set_loras([])
    check(model, plain)


def test_weights_of_another_kind_in_their_place(package: Package) -> None:
    """They may have the same shapes and dtypes as plain tensors, and not be what the code takes them for."""
    model = load_package(package.path, package.checkpoint)
    linear = model.transformer_blocks[1].attn1.to_qkv
    arguments = inputs(model.config)
    before = predict(model, arguments)
    linear.register_buffer("another", torch.ones(1))
    with pytest.raises(ValueError, match="names, shapes, dtypes or quantization changed"):
        predict(model, arguments)
    del linear.another
    assert torch.equal(predict(model, arguments), before)
    copy = torch.nn.Linear(linear.in_features, linear.out_features)
    copy.load_state_dict(linear.state_dict())
    model.transformer_blocks[1].attn1.to_qkv = copy.requires_grad_(False)  # another module of the kind
    assert torch.equal(predict(model, arguments), before)
    copy.weight.data = copy.weight * 2
    assert not torch.equal(predict(model, arguments), before)


CHILD = """
import sys, time, torch
for name in ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd"):
    assert name not in sys.modules
    sys.modules[name] = None  # importing it is an error
began = time.perf_counter()
import cogx_fast
model = cogx_fast.load_package(sys.argv[1], sys.argv[2])
config = model.config
latents = torch.ones(1, 4, config.in_channels, config.sample_height, config.sample_width, dtype=model.dtype)
text = torch.ones(1, config.max_text_seq_length, config.text_embed_dim, dtype=model.dtype)
with torch.no_grad():
    output = model(latents, text, 500).sample
print(time.perf_counter() - began, output.double().sum().item())
"""


def first_output(path: Path, weights: str | Path, empty: Path) -> tuple[float, float]:
    """Seconds from torch's import to the first output in a process without compilers, and the output's sum."""
    env = os.environ | {"PATH": str(empty), "CXX": str(empty / "none"), "TORCHINDUCTOR_CACHE_DIR": str(empty / "cache")}
    command = [sys.executable, "-c", CHILD, str(path), str(weights)]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert not (empty / "cache").exists()
    seconds, total = map(float, child.stdout.split())
    return seconds, total


def test_no_compiler_at_run_time(package: Package, packaged: CogVideoXModel, tmp_path: Path) -> None:
    _, total = first_output(package.path, package.checkpoint, tmp_path)
    config = packaged.config
    latents = torch.ones(1, 4, config.in_channels, config.sample_height, config.sample_width)
    text = torch.ones(1, config.max_text_seq_length, config.text_embed_dim)
    with torch.no_grad():
        assert total == pytest.approx(packaged(latents, text, 500).sample.double().sum().item(), rel=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code of a package may be loaded."""
    monkeypatch.setattr(module, "_open", lambda *_: pytest.fail("code of a refused package was loaded"))


@pytest.mark.usefixtures("unopened")
@for_each(
    "field, value, message",
    [
        ("versions.torch", "1.0", "versions.torch: got '1.0', expected"),
        ("versions.cogx_fast", "0.0", "versions.cogx_fast: got '0.0', expected"),
        ("device.system", "plan9 pdp11", "device.system: got 'plan9 pdp11', expected"),
        *([] if torch.cuda.is_available() else [("device.type", "cuda", "is for CUDA, which is not there")]),
        ("device.instructions", "avx2 avx4096", "needs avx4096, which this CPU does not have"),
        ("config_hash", "0", "another configuration"),
        ("blocks.1", "0", r"other weights \(shapes, dtypes or quantization of blocks 1\)"),
    ],
)
def test_a_manifest_that_does_not_match(package: Package, tmp_path: Path, field: str, value: Any, message: str) -> None:
    manifest, members = read_artifact(package.path, module.KIND)
    target = manifest
    for key in field.split(".")[:-1]:
        target = target[key]
    target[field.split(".")[-1]] = value
    write_artifact(tmp_path / "m.pt2", module.KIND, manifest, members)
    with pytest.raises(ArtifactError, match=message):
        load_package(tmp_path / "m.pt2", package.checkpoint)


def test_int8_products_are_refused_on_a_cpu_that_has_none(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, members = read_artifact(package.path, module.KIND)
    assert manifest["int8_products"] is False  # it is not quantized
    write_artifact(tmp_path / "m.pt2", module.KIND, {**manifest, "int8_products": True}, members)
    monkeypatch.setattr(module, "has_int8_products", lambda: True)
    load_package(tmp_path / "m.pt2", package.checkpoint)
    monkeypatch.setattr(module, "has_int8_products", lambda: False)
    load_package(package.path, package.checkpoint)
    with pytest.raises(ArtifactError, match=r"multiplies int8 matrices.*VNNI.*ONEDNN_MAX_CPU_ISA.*export one here"):
        load_package(tmp_path / "m.pt2", package.checkpoint)


@pytest.mark.usefixtures("unopened")
def test_a_manifest_with_something_missing(package: Package, tmp_path: Path) -> None:
    manifest, members = read_artifact(package.path, module.KIND)
    del manifest["recipe"], manifest["sizes"]
    write_artifact(tmp_path / "m.pt2", module.KIND, manifest, members)
    with pytest.raises(ArtifactError, match="manifest has no recipe, sizes"):
        load_package(tmp_path / "m.pt2", package.checkpoint)


@pytest.mark.usefixtures("unopened")
def test_weights_of_another_model(package: Package) -> None:
    other = upstream(small("5b", num_attention_heads=1, time_embed_dim=40))
    with pytest.raises(ArtifactError, match=r"another configuration.*time_embed_dim: got 48, expected 40"):
        load_package(package.path, other)


@pytest.mark.usefixtures("unopened")
def test_a_damaged_package(package: Package, tmp_path: Path) -> None:
    whole = package.path.read_bytes()
    for content in (b"", b"nothing of the kind", whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(ArtifactError, match="damaged"):
            load_package(tmp_path / "m", package.checkpoint)
    for position in (2000, len(whole) // 2, len(whole) - 3000):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "m").write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            load_package(tmp_path / "m", package.checkpoint)
    with pytest.raises(FileNotFoundError):
        load_package(tmp_path / "absent", package.checkpoint)


def test_calls_that_the_code_is_not_for(package: Package) -> None:
    model = load_package(package.path, package.checkpoint)
    arguments = inputs(model.config)
    mask = torch.ones(2, 128, dtype=torch.bool)
    many = inputs(model.config, batch=4) | {"timestep": 3}
    many = {name: torch.cat([value, value]) if torch.is_tensor(value) else value for name, value in many.items()}
    with pytest.raises(ValueError, match=r"8 videos of .* but the package is for up to 4"):
        predict(model, many)
    with pytest.raises(ValueError, match=r"tokens .* of 2 to 264: export one"):
        predict(model, inputs(model.config, height=40, width=40))
    with pytest.raises(ValueError, match="attention mask"):
        predict(model, arguments | {"attention_kwargs": {"attention_mask": mask}})
    with pytest.raises(ValueError, match="gradients"):
        model(**arguments | {"hidden_states": arguments["hidden_states"].requires_grad_()})
    with pytest.raises(ValueError, match=r"shape, dtype or device changed"):
        predict(model.to(torch.bfloat16), inputs(model.config, dtype=torch.bfloat16))


def test_what_is_attached_inside_a_block_is_refused_for_its_code_does_not_call_it(package: Package) -> None:
    model = load_package(package.path, package.checkpoint)
    arguments = inputs(model.config)
    expected = predict(model, arguments)
    handle = model.transformer_blocks[0].ff.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"package runs its blocks without .*hook .*on transformer_blocks\.0\.ff"):
        predict(model, arguments)
    handle.remove()
    model.transformer_blocks[0].register_forward_hook(lambda module, args, output: output * 0.5)
    assert relative_error(predict(model, arguments), expected) > 1e-3


def test_a_step_cache_skips_a_packages_blocks(package: Package) -> None:
    model, eager = load_package(package.path, package.checkpoint), load(package.checkpoint)
    steps, found = torch.tensor([900, 500, 100]), []
    for each in (model, eager):
        each.set_step_cache("mask:1,0,1")
        arguments = inputs(each.config)
        batch = arguments["hidden_states"].shape[0]
        found.append([predict(each, arguments | {"timestep": timestep.expand(batch)}) for timestep in steps])
    for ours, wanted in zip(*found, strict=True):
        assert relative_error(ours, wanted) <= 1e-5
    model.set_step_cache(None)
    assert relative_error(predict(model, arguments | {"timestep": steps[1].expand(batch)}), found[1][1]) > 1e-5


def test_a_packages_code_runs_with_streamed_blocks(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = load_package(package.path, package.checkpoint, offload="blocks"), load(package.checkpoint)
    check(model, eager)
    with torch.no_grad():
        for each in (model, eager):
            each.transformer_blocks[1].ff.net[2].weight.mul_(2)
    check(model, eager)
    arguments = inputs(eager.config)
    with monkeypatch.context() as patch:  # it computes from what was copied, and from nothing else
        patch.setattr(streaming.InOrder, "copy", lambda _, source, target, after: target.zero_())
        assert relative_error(predict(model, arguments), predict(eager, arguments)) > 1e-2
    with pytest.raises(ValueError, match="offload is 'disk', expected 'blocks'"):
        load_package(package.path, package.checkpoint, offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"load_package\(\.\.\., offload='blocks'\)"):
        streaming.stream_blocks(load_package(package.path, package.checkpoint), torch.device("cpu"))


# -- beside diffusers --------------------------------------------------------------------------------------------------


def test_a_pipeline_takes_it_for_its_transformer(package: Package) -> None:
    from diffusers.models.modeling_utils import ModelMixin

    assert isinstance(load_package(package.path, package.checkpoint, for_pipelines=True), ModelMixin)
    plain = load_package(package.path, package.checkpoint, for_pipelines=False)
    assert type(plain) is CogVideoXModel
    assert cogx_fast.load_package is load_package


def test_the_manifest_is_readable(package: Package) -> None:
    manifest, members = read_artifact(package.path, module.KIND)
    assert json.dumps(manifest)
    assert len(members) == 1  # both blocks are of one kind
    assert manifest["sizes"] == {"tokens": [2, 264], "batch": 4}
    assert not any("safetensors" in name for name in members)


def test_a_package_runs_where_the_batch_is_shared(package: Package, tmp_path: Path) -> None:
    arguments = {"package": str(package.path), "checkpoint": str(package.checkpoint)}
    assert max(worlds.results("tests.runtime.shared_steps:packaged", 2, tmp_path, seconds=250, **arguments)) <= 1e-6
