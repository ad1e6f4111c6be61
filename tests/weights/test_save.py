import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cogx_fast
import quant
from cogx_fast.weights import save
from cogx_fast.weights.errors import CheckpointError
from tests.cases import for_each
from tests.model.pairs import call
from tests.support import RELEASED, predict, relative_error, small, upstream
from tests.weights.support import (
    INDEX,
    WEIGHTS,
    assert_same_bits,
    assert_same_model,
    diffusers_view,
    from_upstream,
    save_upstream,
)

CONFIG = small("5b", num_attention_heads=1, num_layers=1)


@for_each("shard", ["10GB", "200KB"], "quantization", [None, "int8-weight-only"])
def test_pickled_files_are_diffusers_and_take_the_place_of_others(shard, quantization, tmp_path):
    source = upstream(small("5b"))
    model = cogx_fast.load(source)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    if quantization is None:
        model.save_pretrained(tmp_path, safe_serialization=False, save_function=torch.save, max_shard_size=shard)
        assert_same_bits(from_upstream(tmp_path, use_safetensors=False).state_dict(), diffusers_view(model))
    else:
        model = cogx_fast.load(model, quant=quantization)
        model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=shard)
    read = {}
    for path in tmp_path.glob("*.bin"):
        read |= torch.load(path, weights_only=True)
    assert {name: tensor.shape for name, tensor in read.items()} == {
        name: tensor.shape for name, tensor in model.state_dict(layout="diffusers").items()
    }
    assert (
        sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
        < 1.2 * sum(parameter.numel() for parameter in source.parameters()) * 4 + 1e6
    ), "each tensor with the memory of all"
    with pytest.raises(CheckpointError, match="never loaded"):
        cogx_fast.load(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_model(cogx_fast.load(tmp_path), model)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@for_each("shard", ["10GB", "200KB", 1], "name", RELEASED)
def test_round_trip_is_bit_exact_and_upstream_reads_it(name, shard, tmp_path):
    config = small(name)
    state = save_upstream(config, tmp_path / "theirs")
    cogx_fast.load(tmp_path / "theirs").save_pretrained(tmp_path / "ours", max_shard_size=shard)
    assert (tmp_path / "ours" / INDEX).exists() == (shard != "10GB")

    assert_same_bits(diffusers_view(cogx_fast.load(tmp_path / "ours")), state)
    theirs = from_upstream(tmp_path / "ours", torch_dtype=torch.float32)  # else float64 for the positions
    assert_same_bits(theirs.state_dict(), state)
    assert {key: theirs.config[key] for key in config} == dict(config)

    arguments = call(config)
    expected = predict(theirs, arguments)
    assert torch.equal(expected, predict(upstream(config), arguments))
    assert relative_error(predict(cogx_fast.load(tmp_path / "ours"), arguments), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_round_trip_of_other_dtypes(dtype, tmp_path):
    model = cogx_fast.load(upstream(small("5b-i2v")), dtype=dtype)
    model.save_pretrained(tmp_path)
    assert_same_bits(cogx_fast.load(tmp_path).state_dict(), model.state_dict())
    assert_same_bits(from_upstream(tmp_path, torch_dtype=model.dtype).state_dict(), diffusers_view(model))


def test_float64_positions_round_trip(tmp_path):
    source = upstream(small("5b-i2v")).to(torch.bfloat16)
    source.patch_embed.pos_embedding = torch.randn(source.patch_embed.pos_embedding.shape, dtype=torch.float64)
    model = cogx_fast.load(source)
    model.save_pretrained(tmp_path)
    assert_same_bits(diffusers_view(cogx_fast.load(tmp_path)), source.state_dict())


def test_format(tmp_path):
    model = cogx_fast.load(upstream(CONFIG))
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["config.json", WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "CogVideoXTransformer3DModel"

    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in diffusers_view(model).values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert files(tmp_path / "sharded") == sorted([*shards, INDEX, "config.json"])


def test_what_is_one_tensor_here_is_mapped_whole(tmp_path, monkeypatch):
    from cogx_fast.weights import checkpoint

    cogx_fast.load(upstream(CONFIG)).save_pretrained(tmp_path)
    read = []
    monkeypatch.setattr(checkpoint, "read", read.append)
    cogx_fast.load(tmp_path)
    assert read == [[]]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_stale_files_of_the_same_variant_go_and_others_stay(variant, tmp_path):
    model = cogx_fast.load(upstream(CONFIG))
    other = "bf16" if variant is None else None
    model.save_pretrained(tmp_path, variant=other)
    model.save_pretrained(tmp_path, variant=other, max_shard_size="150KB")
    (tmp_path / "README.md").write_text("mine")
    kept = set(files(tmp_path))
    stages = [{}, {"max_shard_size": "100KB"}, {"max_shard_size": "100KB"}, {"max_shard_size": "200KB"}, {}]
    for stage in stages:
        model.save_pretrained(tmp_path, variant=variant, **stage)
        assert_same_bits(diffusers_view(cogx_fast.load(tmp_path, variant=variant)), diffusers_view(model))
    name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else WEIGHTS
    assert set(files(tmp_path)) == kept | {name}
    cogx_fast.load(tmp_path, variant=other)


def test_over_the_files_that_the_model_is_mapped_from(tmp_path):
    save_upstream(CONFIG, tmp_path)
    model = cogx_fast.load(tmp_path)
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
    expected = {name: tensor.clone() for name, tensor in diffusers_view(model).items()}
    model.save_pretrained(tmp_path)
    assert_same_bits(diffusers_view(model), expected)
    assert_same_bits(diffusers_view(cogx_fast.load(tmp_path)), expected)


def test_pipeline_saves_it(tmp_path):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    model = cogx_fast.load(upstream(CONFIG))
    pipe = CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())
    pipe.save_pretrained(tmp_path)
    assert_same_bits(from_upstream(tmp_path / "transformer").state_dict(), diffusers_view(model))


class TestRefused:
    def refused(self, words, directory="unused", **options):
        with pytest.raises(CheckpointError, match=words):
            cogx_fast.load(upstream(CONFIG)).save_pretrained(directory, **options)

    def test_arguments(self, tmp_path):
        self.refused("upload_folder", push_to_hub=True)
        for size in ("ten", 0, "-1GB", "1 parsec", "0.1B"):
            self.refused("max_shard_size", max_shard_size=size)
        self.refused("variant", variant="../fp16")
        (tmp_path / "file").write_text("")
        self.refused("give a directory", directory=tmp_path / "file")
        assert not Path("unused").exists()

    def test_models_that_were_changed(self, tmp_path):
        model = cogx_fast.load(upstream(CONFIG))
        model.proj_out = nn.Linear(2, 2)
        with pytest.raises(CheckpointError, match=r"proj_out.weight.*load it anew"):
            model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="meta device"):
            cogx_fast.load(upstream(CONFIG)).to("meta").save_pretrained(tmp_path)
        assert files(tmp_path) == []

    def test_other_processes_write_nothing(self, tmp_path):
        cogx_fast.load(upstream(CONFIG)).save_pretrained(tmp_path, is_main_process=False)
        assert files(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    state = save_upstream(CONFIG, tmp_path)
    before = files(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cogx_fast.load(upstream(CONFIG, seed=1)).save_pretrained(tmp_path)
    assert files(tmp_path) == before
    assert_same_bits(diffusers_view(cogx_fast.load(tmp_path)), state)


STEPS = [
    (os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"),
    (save, "write_tensors"), (save, "write_json"), (save, "write_text"),
]  # fmt: skip
STORED = {"one file": {}, "shards": {"max_shard_size": "150KB"}, "other shards": {"max_shard_size": "250KB"}}
SMALL, SMALLER = {"max_shard_size": "80KB"}, {"max_shard_size": "60KB"}
KILLED = {  # whether the old model and the new one are quantized, how they are stored, whether the disk has links
    **{f"{a} to {b}": (False, False, STORED[a], STORED[b], True) for a in STORED for b in STORED},
    "without links": (False, False, STORED["shards"], STORED["shards"], False),
    "from quantized": (True, False, {}, {}, True),
    "to quantized": (False, True, {}, {}, True),
    "to quantized shards": (False, True, STORED["shards"], SMALL, True),
    "from quantized shards": (True, False, SMALL, STORED["shards"], True),
    "quantized shards to others": (True, True, SMALL, SMALLER, True),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child process that can be killed is needed")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.timeout(900)
@for_each("was_quantized, is_quantized, before, after, links", KILLED.values(), ids=KILLED)
def test_killed_at_every_step(was_quantized, is_quantized, before, after, links, tmp_path):
    """Whatever step of a save is its last, what is there is the old checkpoint or the new one, whole, for everyone."""
    models = [cogx_fast.load(upstream(CONFIG, seed=seed), dtype="bf16") for seed in (1, 2)]
    for model, quantizes in zip(models, (was_quantized, is_quantized), strict=True):
        if quantizes:
            quant.quantize(model, "int8-weight-only")
    models[0].save_pretrained(tmp_path / "old", **before)
    seen = []
    for step in range(200):
        directory = shutil.copytree(tmp_path / "old", tmp_path / "killed")
        finished = save_and_be_killed(models[1], directory, step, links, after)
        loaded = cogx_fast.load(directory)
        seen.append([torch.equal(loaded.proj_out.weight, one.proj_out.weight) for one in models].index(True))
        assert_same_model(loaded, models[seen[-1]])
        if step % 3 == 0:
            theirs = from_upstream(directory, torch_dtype=torch.bfloat16)
            assert_same_model(cogx_fast.load(theirs), models[seen[-1]])
        models[0].save_pretrained(directory, **after)  # the next save cleans up
        assert not [name for name in files(directory) if name.startswith(".")]
        assert ("recipe.toml" in files(directory)) == was_quantized
        assert_same_model(cogx_fast.load(directory), models[0])
        shutil.rmtree(directory)
        if finished:
            break
    assert finished
    assert step > 5
    assert seen == sorted(seen)
    assert seen[-1] == 1


def save_and_be_killed(model, directory, step, links, options) -> bool:
    """Save in a child process that is killed before its step of that number; whether it got to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def killer(function, breaks):
            def killing(*args, **kwargs):
                nonlocal count
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                if breaks:
                    raise OSError("no links here")
                return function(*args, **kwargs)

            return killing

        for module, name in STEPS:
            setattr(module, name, killer(getattr(module, name), name == "link" and not links))
        try:
            model.save_pretrained(directory, **options)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_killed_in_the_middle_of_a_write(tmp_path):
    """A process of its own, killed by the clock rather than at a step: half a file is on the disk."""
    state = save_upstream(CONFIG, tmp_path / "checkpoint")
    script = tmp_path / "save.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        import cogx_fast
        from cogx_fast.weights import writing

        class Killing(dict):
            def values(self):
                for number, tensor in enumerate(super().values()):
                    if number == len(self) // 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield tensor

        from cogx_fast.weights import save
        save.write_tensors = lambda path, tensors, more: writing.write_tensors(path, Killing(tensors), more)
        cogx_fast.load(sys.argv[1]).save_pretrained(sys.argv[1])
        """)
    )
    root = str(Path(cogx_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script, tmp_path / "checkpoint"], env=os.environ | {"PYTHONPATH": root}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = [path for path in (tmp_path / "checkpoint").iterdir() if path.name.startswith(".")]
    assert [path.name.endswith(WEIGHTS) and path.stat().st_size > 0 for path in left].count(True) <= 1
    assert left
    assert_same_bits(diffusers_view(cogx_fast.load(tmp_path / "checkpoint")), state)
    assert_same_bits(from_upstream(tmp_path / "checkpoint").state_dict(), state)
    cogx_fast.load(tmp_path / "checkpoint").save_pretrained(tmp_path / "checkpoint")
    assert files(tmp_path / "checkpoint") == ["config.json", WEIGHTS]
