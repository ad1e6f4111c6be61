"""LoRA files of every writer, merged as diffusers merges them; what cannot be merged is refused by name."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cogx_fast
from cogx_fast.weights.lora import LoraError
from tests.cases import for_each
from tests.pipes import FRAMES, HEIGHT, WIDTH, make_pipe
from tests.support import relative_error, upstream
from tests.weights.lora_files import (
    ALPHA,
    CONFIG,
    EVERYWHERE,
    FINETRAINERS,
    RANK,
    TARGETS,
    as_diffusers,
    as_kohya,
    halves,
    merged,
    run,
)  # fmt: skip

# -- files as each writer writes them ----------------------------------------------------------------------------------


def as_sat() -> dict[str, Tensor]:
    found = {}
    for layer in range(CONFIG.num_layers):
        for index, target in enumerate(("to_q", "to_k", "to_v")):
            down, up = halves()[f"transformer_blocks.{layer}.attn1.{target}"]
            place = f"model.diffusion_model.mixins.lora.transformer.layers.{layer}.attention.query_key_value"
            found |= {f"{place}.matrix_A.{index}": down, f"{place}.matrix_B.{index}": up}
        down, up = halves()[f"transformer_blocks.{layer}.attn1.to_out.0"]
        place = f"model.diffusion_model.mixins.lora.transformer.layers.{layer}.attention.dense"
        found |= {f"{place}.matrix_A.0": down, f"{place}.matrix_B.0": up}
    return found


def old_names() -> dict[str, Tensor]:
    return {
        f"transformer.{module}.lora.{half}.weight": tensor
        for module, pair in halves().items()
        for half, tensor in zip(("down", "up"), pair, strict=True)
    }


PEFT = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})
STABILIZED = json.dumps({"r": RANK, "lora_alpha": ALPHA, "use_rslora": True})
PATTERNS = json.dumps({"r": RANK, "lora_alpha": 1.0, "alpha_pattern": {r"attn1\.to_(q|k|v|out\.0)": ALPHA}})

WRITERS: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, str], float, tuple[str, ...]]] = {
    "diffusers": (as_diffusers, {}, 1.0, TARGETS),
    "diffusers with its metadata": (as_diffusers, {"lora_adapter_metadata": PEFT}, ALPHA / RANK, TARGETS),
    "an adapter saved alone": (
        lambda: as_diffusers(""),
        {"lora_adapter_metadata": FINETRAINERS},
        ALPHA / RANK,
        TARGETS,
    ),
    "alphas by pattern": (lambda: as_diffusers(""), {"lora_adapter_metadata": PATTERNS}, ALPHA / RANK, TARGETS),
    "finetrainers": (as_diffusers, {"lora_config": FINETRAINERS}, ALPHA / RANK, TARGETS),
    "rsLoRA": (as_diffusers, {"lora_config": STABILIZED}, ALPHA / RANK**0.5, TARGETS),
    "CogKit": (lambda: as_diffusers(""), {}, 1.0, TARGETS),
    "PEFT": (lambda: as_diffusers("base_model.model."), {}, 1.0, TARGETS),
    "an adapter's name": (lambda: as_diffusers("diffusion_model.", ".default"), {}, 1.0, TARGETS),
    "old diffusers": (old_names, {}, 1.0, TARGETS),
    "SAT": (as_sat, {}, 1.0 / RANK, TARGETS),
    "VideoX-Fun": (as_kohya, {}, ALPHA / RANK, EVERYWHERE),
    "VideoX-Fun without alpha": (lambda: as_kohya(alpha=False), {}, 1.0, EVERYWHERE),
}


@for_each("make, metadata, scale, targets", WRITERS.values(), ids=WRITERS)
def test_each_writers_file_is_merged(
    make: Callable[[], dict[str, Tensor]], metadata: dict[str, str], scale: float, targets: Any, tmp_path: Path
) -> None:
    save_file(make(), tmp_path / "lora.safetensors", metadata)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = cogx_fast.load(upstream(CONFIG), loras=[(tmp_path / "lora.safetensors", 0.8)])
    assumed = [str(each.message) for each in told if "says no alpha" in str(each.message)]
    assert len(assumed) == (scale == 1.0)
    wanted = run(merged(upstream(CONFIG), 0.8 * scale, halves(targets)))
    assert relative_error(run(model), wanted) <= 1e-5
    assert relative_error(run(cogx_fast.load(upstream(CONFIG))), wanted) > 1e-3


def test_an_alpha_of_the_callers_own_comes_first(tmp_path: Path) -> None:
    save_file(as_kohya(targets=TARGETS), tmp_path / "lora.safetensors")
    model = cogx_fast.load(upstream(CONFIG), loras=[cogx_fast.Lora(tmp_path / "lora.safetensors", 0.5, alpha=2.0)])
    assert relative_error(run(model), run(merged(upstream(CONFIG), 0.5 * 2.0 / RANK, halves()))) <= 1e-5
    save_file(as_diffusers(), tmp_path / "lora.safetensors", {"lora_config": STABILIZED})
    model = cogx_fast.load(upstream(CONFIG), loras=[cogx_fast.Lora(tmp_path / "lora.safetensors", 0.5, alpha=2.0)])
    assert relative_error(run(model), run(merged(upstream(CONFIG), 0.5 * 2.0 / RANK**0.5, halves()))) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_files_own_dtype_is_brought_to_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in as_kohya(alpha=False).items()}
    save_file(stored, tmp_path / "lora.safetensors")
    rounded = {name: tuple(half.to(dtype).float() for half in pair) for name, pair in halves(EVERYWHERE).items()}
    model = cogx_fast.load(upstream(CONFIG))
    for loras in ([tmp_path / "lora.safetensors"], [], [tmp_path / "lora.safetensors"]):
        model.set_loras(loras)
        scale = float(len(loras))
        assert relative_error(run(model), run(merged(upstream(CONFIG), scale, rounded))) <= 1e-5
    if dtype.itemsize == 1:
        next(iter(stored.values())).view(torch.uint8)[0, 0] = 0x7F
        save_file(stored, tmp_path / "lora.safetensors")
        with pytest.raises(LoraError, match="infinite or NaN"):
            model.set_loras([tmp_path / "lora.safetensors"])


def test_a_file_may_be_written_over_after_it_was_read(tmp_path: Path) -> None:
    """What is mapped from a file that became shorter would end the process (SIGBUS)."""
    script = (
        "import sys, pathlib, cogx_fast\n"
        "from safetensors.torch import save_file\n"
        "from tests.support import upstream\n"
        "from tests.weights.lora_files import CONFIG, TARGETS, as_kohya\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for name in ('a', 'b'):\n"
        "    save_file(as_kohya(targets=TARGETS), folder / name)\n"
        "model = cogx_fast.load(upstream(CONFIG), loras=[folder / 'a'])\n"
        "(folder / 'a').write_bytes(b'')\n"
        "model.set_loras([folder / 'b'])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_several_are_summed_and_a_live_source_keeps_its_own_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        pairs = halves(seed=seed)
        tensors = {
            f"{name}.lora_{half}.weight": tensor
            for name, pair in pairs.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, tmp_path / f"{seed}.safetensors", {"lora_config": json.dumps({"lora_alpha": RANK})})
    source = upstream(CONFIG)
    before = run(source)
    model = cogx_fast.load(source, loras=[(tmp_path / "0.safetensors", 0.8), (tmp_path / "1.safetensors", -0.3)])
    assert torch.equal(run(source), before)
    wanted = merged(merged(upstream(CONFIG), 0.8, halves()), -0.3, halves(seed=1))
    assert relative_error(run(model), run(wanted)) <= 1e-5


def test_files_are_merged_in_fp32_before_they_are_rounded_and_quantized(tmp_path: Path) -> None:
    save_file(as_kohya(), tmp_path / "lora.safetensors")
    upstream(CONFIG).save_pretrained(tmp_path / "model")
    merged(upstream(CONFIG), ALPHA / RANK, halves(EVERYWHERE)).save_pretrained(tmp_path / "merged")
    for options in ({"dtype": "bf16"}, {"quant": "int8-weight-only"}):
        found = cogx_fast.load(tmp_path / "model", loras=[tmp_path / "lora.safetensors"], **options).state_dict()
        wanted = cogx_fast.load(tmp_path / "merged", **options).state_dict()
        for name, tensor in found.items():
            both = (tensor, wanted[name])
            if "quant" in options and type(tensor).__name__ == "Int8Tensor":
                both = (tensor.dequantize(), wanted[name].dequantize())
            assert relative_error(both[0].float(), both[1].float()) <= 4e-3, name


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_a_pipelines_video_is_that_of_diffusers_with_the_same_file(weight: float, tmp_path: Path) -> None:
    """Written and read by diffusers and PEFT."""
    from peft import LoraConfig, get_peft_model_state_dict

    trained = make_pipe("CogVideoXPipeline", "5b")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    trained.transformer.add_adapter(config, adapter_name="mine")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    type(trained).save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained.transformer, adapter_name="mine"),
        transformer_lora_adapter_metadata=config.to_dict() | {"target_modules": sorted(config.target_modules)},
    )
    file = next(tmp_path.glob("*.safetensors"))
    options = {
        "num_inference_steps": 3, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "output_type": "latent",
        "max_sequence_length": 8,
    }  # fmt: skip

    def video(pipe: Any) -> Tensor:
        frames: Tensor = pipe("a digit", generator=torch.Generator().manual_seed(0), **options).frames
        return frames

    theirs = make_pipe("CogVideoXPipeline", "5b")
    plain = video(theirs)
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="mine")
    theirs.set_adapters("mine", weight)
    ours = cogx_fast.accelerate(make_pipe("CogVideoXPipeline", "5b"), loras=[(file, weight)])
    wanted = video(theirs)
    assert relative_error(video(ours), wanted) <= 1e-5
    assert relative_error(plain, wanted) > 1e-3


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = as_diffusers()
        change(tensors)
        save_file(tensors, path)

    return write


FIRST = "transformer.transformer_blocks.0.attn1.to_q"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an unknown tensor": (
        changed(lambda t: t.update({"transformer.gate.lora_A.weight": torch.ones(4, 4)})), "1 of its 17 .*gate"
    ),
    "another model's layers": (
        changed(lambda t: t.update({f"{FIRST.replace('.0.', '.7.')}.lora_A.weight": torch.ones(4, 4)})), "no place"
    ),
    "another width": (changed(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(RANK, 8)})), "another model"),
    "other ranks": (changed(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2, 128)})), "expected"),
    "one half": (changed(lambda t: t.pop(f"{FIRST}.lora_B.weight")), "no up"),
    "the other half": (changed(lambda t: t.pop(f"{FIRST}.lora_A.weight")), "no down"),
    "NaN": (changed(lambda t: t[f"{FIRST}.lora_A.weight"].fill_(torch.nan)), "infinite or NaN"),
    "DoRA without magnitudes": (
        lambda path: save_file(as_diffusers(), path, {"lora_config": json.dumps({"use_dora": True})}), "not whole"
    ),
    "DoRA in part": (changed(lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(128)})), "not whole"),
    "DoRA of columns": (
        changed(
            lambda t: t.update(
                {f"transformer.{name}.lora_magnitude_vector.weight": torch.ones(1, 128) for name in halves()}
            )
        ),
        r"128 rows here, but its magnitude vector is \(1, 128\)",
    ),
    "LyCORIS' DoRA": (changed(lambda t: t.update({f"{FIRST}.dora_scale": torch.ones(1, 128)})), "LyCORIS' DoRA"),
    "the text encoder's": (
        changed(lambda t: t.update({"text_encoder.q.lora_A.weight": torch.ones(4, 4)})), "text encoder"
    ),
    "a convolution's": (
        changed(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(RANK, 128, 1, 1)})), "expected"
    ),
    "nothing": (lambda path: save_file({}, path), "no tensors"),
    "no safetensors": (lambda path: path.write_bytes(b"\x80\x04 a pickle"), "cannot be read"),
    "bad metadata": (lambda path: save_file(as_diffusers(), path, {"lora_config": "{"}), "metadata cannot be read"),
    "alpha is text": (
        lambda path: save_file(as_diffusers(), path, {"lora_config": json.dumps({"lora_alpha": "much"})}), "lora_alpha"
    ),
    "rsLoRA without alpha": (
        lambda path: save_file(as_diffusers(), path, {"lora_config": json.dumps({"use_rslora": True})}), "no alpha"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipe("CogVideoXPipeline", "5b")


@pytest.mark.filterwarnings("ignore:.*says no alpha")
@for_each("write, message", BAD.values(), ids=BAD)
def test_bad_files_are_refused_and_nothing_is_merged(write: Any, message: str, pipe: Any, tmp_path: Path) -> None:
    write(tmp_path / "bad.safetensors")
    save_file(as_diffusers(), tmp_path / "good.safetensors")
    before, state = pipe.transformer, {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    with pytest.raises(LoraError, match=message):
        cogx_fast.load(upstream(CONFIG), loras=[tmp_path / "good.safetensors", tmp_path / "bad.safetensors"])
    with pytest.raises(LoraError):
        cogx_fast.accelerate(pipe, loras=[tmp_path / "bad.safetensors"])
    assert pipe.transformer is before
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    for wrong in ("a.safetensors", [7], [("a", "b", "c")], [("a.safetensors", "strong")]):
        with pytest.raises(LoraError):
            cogx_fast.load(upstream(CONFIG), loras=wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        cogx_fast.load(upstream(CONFIG), loras=[tmp_path / "none.safetensors"])


def test_the_command_line_takes_files_with_weights(tmp_path: Path) -> None:
    from cogx_fast.assets import tiny_pipeline_dir
    from tests.conftest import report, run_cli

    config = cogx_fast.TransformerConfig.from_json(tiny_pipeline_dir() / "transformer" / "config.json")
    pairs = halves(config=config)
    tensors = {f"{name}.lora_A.weight": down for name, (down, _) in pairs.items()}
    tensors |= {f"{name}.lora_B.weight": up for name, (_, up) in pairs.items()}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    work = ("generate", "--model", "tiny", "--prompt", "the digit one moving up", "--steps", 1, "--json")
    facts = report(run_cli(*work, "--lora", f"{file}=0.5", "--out", tmp_path / "a.mp4"))
    assert facts["loras"] == [[str(file), 0.5]]
    refused = run_cli(*work, "--lora", f"{file}=strong", "--out", tmp_path / "b.mp4")
    assert refused.status == 2
    assert "'strong' for its weight" in refused.err


def test_weights_that_are_quantized_already_are_refused(tmp_path: Path) -> None:
    save_file(as_kohya(), tmp_path / "lora.safetensors")
    quantized = cogx_fast.load(upstream(CONFIG), quant="int8-weight-only")
    with pytest.raises(LoraError, match="quantized already"):
        cogx_fast.load(quantized, loras=[tmp_path / "lora.safetensors"])


def test_fuzzed_files_are_merged_or_refused(tmp_path: Path) -> None:
    save_file(as_diffusers(), tmp_path / "lora.safetensors")
    good = (tmp_path / "lora.safetensors").read_bytes()
    generator, seen = random.Random(0), {"merged": 0, "refused": 0}
    source = upstream(CONFIG)
    for _ in range(300):
        data = bytearray(good[: generator.choice([len(good), generator.randrange(len(good))])])
        for _ in range(generator.randrange(4)):
            if data:
                data[generator.randrange(min(len(data), 3000))] = generator.randrange(256)
        (tmp_path / "fuzzed.safetensors").write_bytes(bytes(data))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cogx_fast.load(source, loras=[tmp_path / "fuzzed.safetensors"])
            seen["merged"] += 1
        except LoraError:
            seen["refused"] += 1
    assert min(seen.values()) > 10
    assert load_file(tmp_path / "lora.safetensors").keys() == as_diffusers().keys()
