import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import cogx_fast
from cogx_fast.config import HUB_IDS
from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError
from tests.cases import for_each
from tests.model.pairs import call
from tests.support import RELEASED, predict, relative_error, small, upstream
from tests.weights.support import INDEX, WEIGHTS, assert_same_bits, diffusers_view, save_upstream, small_state


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory that diffusers wrote; tests copy what they change."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_upstream(small("5b"), directory)
    return directory


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit(directory, change):
    """Rewrite a single file's tensors."""
    tensors = load_file(directory / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


@for_each("shard", ["10GB", "200KB"], "name", RELEASED)
def test_directory_of_every_variant(name, shard, tmp_path):
    config = small(name)
    state = save_upstream(config, tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard != "10GB")
    model = cogx_fast.load(tmp_path)
    assert_same_bits(diffusers_view(model), state)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())

    arguments = call(config)
    assert relative_error(predict(model, arguments), predict(upstream(config), arguments)) < 1e-5


def test_learned_positions_keep_the_dtype_they_are_stored_in(tmp_path):
    model = upstream(small("5b-i2v")).to(torch.bfloat16)
    model.patch_embed.pos_embedding = torch.randn(model.patch_embed.pos_embedding.shape, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    loaded = cogx_fast.load(tmp_path)
    assert loaded.patch_embed.pos_embedding.dtype == torch.float64
    assert_same_bits(diffusers_view(loaded), model.state_dict())
    assert cogx_fast.load(tmp_path, dtype="bf16").patch_embed.pos_embedding.dtype == torch.bfloat16


class TestSources:
    def same(self, model):
        assert_same_bits(diffusers_view(model), small_state())

    def test_pipeline_directory(self, checkpoint, tmp_path):
        shutil.copytree(checkpoint, tmp_path / "transformer")
        (tmp_path / "model_index.json").write_text("{}")
        self.same(cogx_fast.load(tmp_path))
        self.same(cogx_fast.load(str(tmp_path / "transformer")))

    def test_single_file(self, copy):
        self.same(cogx_fast.load(copy / WEIGHTS))
        (copy / WEIGHTS).rename(copy / "renamed.safetensors")
        self.same(cogx_fast.load(copy / "renamed.safetensors"))

    @for_each("kind", ["object", "dict", "path", "directory"])
    def test_config_given(self, kind, checkpoint, tmp_path):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        (copy / "config.json").unlink()
        config = small("5b")
        given = {
            "object": config,
            "dict": config.to_dict(),
            "path": checkpoint / "config.json",
            "directory": checkpoint,
        }
        self.same(cogx_fast.load(copy / WEIGHTS, config=given[kind]))

    def test_config_by_the_name_of_a_preset_is_checked_against_the_weights(self, copy):
        with pytest.raises(CheckpointError, match="2 transformer blocks, but its config says num_layers=42"):
            cogx_fast.load(copy, config="5b")

    def test_index_file(self, tmp_path):
        state = save_upstream(small("5b"), tmp_path, max_shard_size="200KB")
        assert_same_bits(diffusers_view(cogx_fast.load(tmp_path / INDEX)), state)

    @pytest.mark.parametrize("shard", ["10GB", "200KB"])
    def test_variant(self, shard, tmp_path):
        state = save_upstream(small("5b"), tmp_path, variant="fp16", max_shard_size=shard)
        assert_same_bits(diffusers_view(cogx_fast.load(tmp_path, variant="fp16")), state)
        with pytest.raises(CheckpointNotFoundError, match="pass variant="):
            cogx_fast.load(tmp_path)

    def test_hub_id_in_the_cache(self, checkpoint, tmp_path):
        repository = tmp_path / "models--someone--video"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40) / "transformer")
        self.same(cogx_fast.load("someone/video", cache_dir=tmp_path, local_files_only=True))

    def test_hub_id_not_in_the_cache(self, tmp_path):
        with pytest.raises(CheckpointNotFoundError, match=r"not in the hub's cache.*local_files_only.*hf download"):
            cogx_fast.load("someone/video", cache_dir=tmp_path, local_files_only=True)

    @for_each("kind", ["RepositoryNotFoundError", "GatedRepoError", "ConnectError", "OSError"])
    def test_hub_that_answers_no(self, kind, monkeypatch):
        import huggingface_hub

        errors = huggingface_hub.errors
        kinds = {"ConnectError": errors.HfHubHTTPError.__bases__[0], "OSError": OSError}
        error = kinds.get(kind) or getattr(errors, kind)
        error = error.__new__(error, "no route")  # the hub's own need a whole response to be made

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointNotFoundError, match="someone/video"):
            cogx_fast.load("someone/video")

    def test_hub_without_huggingface_hub(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"cogx-fast\[hub\]"):
            cogx_fast.load("someone/video")

    def test_only_the_transformer_is_asked_for(self, checkpoint, monkeypatch):
        import huggingface_hub

        asked = {}
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download",
            lambda name, **options: asked.update(options, name=name) or str(checkpoint),
        )  # fmt: skip
        cogx_fast.load("someone/video", revision="v1")
        assert asked["revision"] == "v1"
        assert "transformer/config.json" in asked["allow_patterns"]
        assert not any("*" in pattern for pattern in asked["allow_patterns"])
        assert asked["name"] == "someone/video"
        cogx_fast.load("5b")
        assert asked["name"] == HUB_IDS["5b"]


class TestDtype:
    @for_each("dtype", ["bf16", "bfloat16", torch.bfloat16, "fp16", "float32", "torch.float16"])
    def test_conversion_is_torchs(self, dtype, checkpoint):
        model = cogx_fast.load(checkpoint, dtype=dtype)
        assert_same_bits(diffusers_view(model), {name: t.to(model.dtype) for name, t in small_state().items()})

    def test_stored_as_is_tensor_by_tensor(self, copy):
        def mixed(tensors):
            return {name: t.bfloat16() if name.startswith("transformer_blocks") else t for name, t in tensors.items()}

        edit(copy, mixed)
        assert_same_bits(diffusers_view(cogx_fast.load(copy)), mixed(small_state()))

    def test_slices_that_disagree_are_promoted_with_a_warning(self, copy):
        def mixed(tensors):
            return {name: t.half() if "to_q.weight" in name else t.bfloat16() for name, t in tensors.items()}

        edit(copy, mixed)
        with pytest.warns(UserWarning, match="to_qkv.weight is one tensor made of slices stored as BF16, F16"):
            model = cogx_fast.load(copy)
        assert model.transformer_blocks[0].attn1.to_qkv.weight.dtype == torch.float32
        for name, tensor in mixed(small_state()).items():
            assert torch.equal(diffusers_view(model)[name].to(tensor.dtype), tensor)

    def test_float8_needs_a_dtype(self, copy):
        edit(copy, lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})
        with pytest.raises(CheckpointError, match="pass dtype='bf16'"):
            cogx_fast.load(copy)
        expected = {name: t.to(torch.float8_e4m3fn).to(torch.bfloat16) for name, t in small_state().items()}
        assert_same_bits(diffusers_view(cogx_fast.load(copy, dtype="bf16")), expected)


BLOCK = "transformer_blocks.0"
TENSORS = {
    "missing": (
        lambda own: {name: tensor for name, tensor in own.items() if "blocks.0.attn1" not in name},
        "12 are missing: transformer_blocks.0.attn1.norm_q.weight.*and 8 more",
    ),
    "too many": (lambda own: own | {f"{BLOCK}.extra": torch.zeros(1)}, f"1 do not belong to it: {BLOCK}.extra"),
    "another shape": (
        lambda own: own | {"proj_out.bias": torch.zeros(3)},
        r"1 have another shape: proj_out.bias \(3,\) in place of \(64,\)",
    ),
    "an adapter": (lambda own: own | {f"{BLOCK}.attn1.to_q.lora_A.weight": torch.zeros(1)}, r"fuse_lora.*unload"),
    "int8": (lambda own: own | {"proj_out.weight": torch.zeros(64, 128, dtype=torch.int8)}, "quantized"),
    "another library's": (lambda own: own | {"proj_out.weight.absmax": torch.zeros(64, 128)}, "quantized"),
}


class TestRefused:
    def refused(self, directory, words, kind=CheckpointError, **options):
        with pytest.raises(kind, match=words) as caught:
            cogx_fast.load(directory, **options)
        return str(caught.value)

    @for_each("change, words", TENSORS.values(), ids=TENSORS)
    def test_tensors(self, change, words, checkpoint, tmp_path):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        edit(copy, change)
        self.refused(copy, words)

    @for_each(
        "key, value", [*(("num_layers", count) for count in (1, 3, 10**9)), ("_class_name", "FluxTransformer2DModel")]
    )
    def test_another_models_config(self, key, value, checkpoint, tmp_path):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {key: value}))
        self.refused(copy, f"2 transformer blocks, but its config says {key}={value}|{key} is .*{value}", ValueError)

    @for_each("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
    def test_pickles_are_never_opened(self, name, checkpoint, tmp_path):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        (copy / WEIGHTS).rename(copy / name)
        self.refused(copy / name, "run any code.*convert")
        if name.startswith("diffusion"):
            self.refused(copy, "run any code.*convert")

    def test_nothing_there(self, tmp_path):
        for source in (tmp_path / "absent", "./absent", "6b", "/a/b/c"):
            self.refused(source, "no such file or directory", FileNotFoundError)
        self.refused("5b", "THUDM/CogVideoX-5b", cache_dir=tmp_path / "hub", local_files_only=True)
        self.refused(tmp_path, "it holds nothing")

    def test_no_config(self, copy):
        (copy / "config.json").unlink()
        self.refused(copy, "pass config=", CheckpointNotFoundError)
        self.refused(copy, "neither a file nor a preset", CheckpointNotFoundError, config="absent.json")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_on_request(self, bad, copy):
        def poison(tensors):
            tensors["transformer_blocks.1.attn1.to_k.weight"][3, 5] = bad

        edit(copy, poison)
        cogx_fast.load(copy)
        self.refused(copy, r"1 tensors hold .* transformer_blocks.1.attn1.to_k.weight\.", check_finite=True)

    def test_overflow_in_the_dtype_asked_for(self, copy):
        edit(copy, lambda tensors: {**tensors, "proj_out.bias": torch.full((64,), 1e5)})
        cogx_fast.load(copy, check_finite=True)
        self.refused(copy, "wider range", check_finite=True, dtype="fp16")

    def test_files_that_are_not_weights(self, copy):
        self.refused(copy / "config.json", "give its directory")
        (copy / "notes.txt").write_text("hello")
        self.refused(copy / "notes.txt", r"expected a \.safetensors")


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path):
        save_upstream(small("5b"), tmp_path, max_shard_size="200KB")
        return tmp_path

    def change(self, directory, change):
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    def refused(self, directory, words, kind=CheckpointError):
        with pytest.raises(kind, match=words):
            cogx_fast.load(directory)

    def test_missing_shard(self, sharded):
        sorted(sharded.glob("*-00002-*"))[0].unlink()
        self.refused(sharded, "names the shard .*-00002-.*not there", CheckpointNotFoundError)

    def test_names_that_no_shard_holds(self, sharded):
        self.change(sharded, lambda index: index["weight_map"].update({"more": index["weight_map"]["proj_out.bias"]}))
        self.refused(sharded, "names more, which the shards do not hold")

    def test_tensor_in_another_shard(self, sharded):
        def swap(index):
            shards = sorted(set(index["weight_map"].values()))
            index["weight_map"]["proj_out.bias"] = next(s for s in shards if s != index["weight_map"]["proj_out.bias"])

        self.change(sharded, swap)
        self.refused(sharded, "index and shards are not of one checkpoint")

    def test_tensor_it_does_not_name(self, sharded):
        self.change(sharded, lambda index: index["weight_map"].pop("proj_out.bias"))
        self.refused(sharded, "proj_out.bias is in no shard")

    @for_each("shard", ["../other.safetensors", "weights.bin", 3])
    def test_names_that_are_no_shard(self, shard, sharded):
        self.change(sharded, lambda index: index["weight_map"].update({"proj_out.bias": shard}))
        self.refused(sharded, f"is in {shard!r}, expected the name of a .safetensors file beside it")

    @for_each("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
    def test_no_index(self, content, sharded):
        (sharded / INDEX).write_text(content)
        self.refused(sharded, "not valid JSON|no weight_map")


def test_a_file_that_shrinks_while_it_is_read(copy, monkeypatch):
    from cogx_fast.weights import checkpoint

    def cut_and_read(pieces):
        with (copy / WEIGHTS).open("r+b") as file:
            file.truncate(5000)
        return read(pieces)

    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", cut_and_read)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        cogx_fast.load(copy, dtype="bf16")


def test_mapped_weights_can_be_changed_without_touching_the_file(copy):
    before = (copy / WEIGHTS).read_bytes()
    model = cogx_fast.load(copy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (copy / WEIGHTS).read_bytes() == before


def test_sources_are_told_apart_from_other_objects():
    for thing in (None, 3, types.SimpleNamespace(transformer=1)):
        with pytest.raises(CheckpointError, match="expected a path"):
            cogx_fast.load(thing)


@for_each("dtype", [None, "bf16", "float64"])
def test_tensors_of_many_chunks(dtype, checkpoint, monkeypatch):
    from cogx_fast.weights import reading

    monkeypatch.setattr(reading, "_CHUNK_BYTES", 1004)
    model = cogx_fast.load(checkpoint, dtype=dtype)
    assert_same_bits(diffusers_view(model), {name: t.to(model.dtype) for name, t in small_state().items()})
