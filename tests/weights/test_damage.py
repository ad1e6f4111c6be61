"""Damaged checkpoints by the hundred: each is refused in our own words, or loads with every bit in its place."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cogx_fast
import quant
from cogx_fast.config import ConfigError
from cogx_fast.weights.errors import CheckpointError
from tests.cases import for_each
from tests.support import small, upstream
from tests.weights.support import INDEX, WEIGHTS, assert_same_model, save_upstream

Damage = Callable[[Path], None]


CONFIG = small("5b", num_attention_heads=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(directory with a single file, directory with shards, the model that is in both)"""
    single, shards = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("shards")
    save_upstream(CONFIG, single)
    save_upstream(CONFIG, shards, max_shard_size="150KB")
    return single, shards, cogx_fast.load(upstream(CONFIG))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The same, quantized."""
    single, shards = tmp_path_factory.mktemp("quantized"), tmp_path_factory.mktemp("quantized shards")
    model = cogx_fast.load(upstream(CONFIG), dtype="bf16")
    quant.quantize(model, "int8-dynamic")
    model.save_pretrained(single)
    model.save_pretrained(shards, max_shard_size="60KB")
    return single, shards, model


def cut(name: str, fraction: float) -> Damage:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * fraction)])

    return damage


def flip(name: str, position: int, bit: int) -> Damage:
    """Flip a bit of a byte; positions below 0 count from the end."""

    def damage(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[position % len(data)] ^= 1 << bit
        (directory / name).write_bytes(data)

    return damage


def flip_header(seed: int) -> Damage:
    def damage(directory: Path) -> None:
        data = bytearray((directory / WEIGHTS).read_bytes())
        generator = random.Random(seed)
        position = generator.randrange(8 + int.from_bytes(data[:8], "little"))
        data[position] ^= 1 << generator.randrange(8)
        (directory / WEIGHTS).write_bytes(data)

    return damage


def grow(name: str, extra: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes() + extra) and None


def config(**changes: object) -> Damage:
    def damage(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(content))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(content) and None


def remove(pattern: str) -> Damage:
    return lambda directory: sorted(directory.glob(pattern))[0].unlink()


def directory_in_place_of(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return damage


def swap_shards(directory: Path) -> None:
    first, second = sorted(directory.glob("*-of-*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


IMPOSSIBLE = [
    *({"num_layers": value} for value in (0, 1, 3, -1, 10**6, 10**12, 2.5, "2", None, True, [2])),
    *({"num_attention_heads": value} for value in (0, 2, 3, 10**9, 10**30, "1", None)),
    *({"attention_head_dim": value} for value in (0, 8, 63, 65, 128, -64)),
    *({"in_channels": value} for value in (0, 15, 32, 10**18)),
    *({"patch_size": value} for value in (0, 1, 3, 10**9)),
    *({"patch_size_t": value} for value in (1, 2, -2, "2")),
    *({"time_embed_dim": value} for value in (0, 47, 512)),
    *({"text_embed_dim": value} for value in (0, 31, 4096)),
    {"ofs_embed_dim": 48}, {"ofs_embed_dim": 7}, {"out_channels": 4}, {"norm_eps": -1}, {"norm_eps": float("nan")},
    {"activation_fn": "geglu"}, {"activation_fn": "relu6"}, {"timestep_activation_fn": "none"}, {"dropout": 2},
    {"use_learned_positional_embeddings": True}, {"norm_elementwise_affine": False}, {"attention_bias": False},
    {"patch_bias": False}, {"unknown": 1}, {"_class_name": "UNet2DModel"}, {"_class_name": None}, {"sample_width": 0},
    {"use_rotary_positional_embeddings": "yes"}, {"freq_shift": 10**6}, {"quantization_config": {"bits": 4}},
]  # fmt: skip


def on_the_single_file() -> Iterator[tuple[str, Damage]]:
    for step in range(30):
        yield f"cut to {step}/30", cut(WEIGHTS, step / 30)
    for length in (1, 7, 8, 9, 100, -1, -2, -1000):
        yield f"cut {length} bytes", lambda path, n=length: write(WEIGHTS, (path / WEIGHTS).read_bytes()[:n])(path)
    for seed in range(60):
        yield f"flip header {seed}", flip_header(seed)
    for byte in range(8):
        yield f"flip length byte {byte}", flip(WEIGHTS, byte, byte)
    for changes in IMPOSSIBLE:
        yield f"config {changes}"[:80], config(**changes)
    for seed in range(20):
        yield f"flip config {seed}", flip("config.json", random.Random(seed).randrange(800), seed % 8)
    for step in range(5):
        yield f"cut config to {step}/5", cut("config.json", step / 5)
    for content in (
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"num_layers": 1' + b"0" * 5000 + b"}",
    ):
        yield f"config is {content[:20]!r}", write("config.json", content)
    yield "more bytes", grow(WEIGHTS, b"\0" * 16)
    yield "no config", remove("config.json")
    yield "no weights", remove(WEIGHTS)
    yield "config is a directory", directory_in_place_of("config.json")
    yield "weights are a directory", directory_in_place_of(WEIGHTS)
    yield "zeros", write(WEIGHTS, b"\0" * 4096)
    yield "a pickle by another name", write(WEIGHTS, b"\x80\x02}q\x00.")
    yield "a header that is a list", write(WEIGHTS, (2).to_bytes(8, "little") + b"[]")
    yield "an empty header", write(WEIGHTS, (2).to_bytes(8, "little") + b"{}")
    yield "a header of endless depth", write(WEIGHTS, (99_999).to_bytes(8, "little") + b"[" * 99_999)


def on_the_shards() -> Iterator[tuple[str, Damage]]:
    yield "no first shard", remove("*-00001-of-*")
    yield "no index", remove(INDEX)
    yield "swapped shards", swap_shards
    for step in range(5):
        yield f"cut index to {step}/5", cut(INDEX, step / 5)
    for seed in range(20):
        yield f"flip index {seed}", flip(INDEX, random.Random(seed).randrange(4000), seed % 8)
    for content in (b"null", b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": "../x.safetensors"}}', b"\xff"):
        yield f"index is {content!r}", write(INDEX, content)
    yield "index is a directory", directory_in_place_of(INDEX)


def on_the_metadata() -> Iterator[tuple[str, Damage]]:
    """The header of a quantized file is larger, and half of it are descriptions: more flips, of every bit in turn."""
    for seed in range(60, 180):
        yield f"flip header {seed}", flip_header(seed)
    for old, new in [
        (b"PerRow", b"PerRaw"), (b"SYMMETRIC", b"ASYMETRIC"), (b"[1, 64]", b"[1, 32]"),
        (b'\\"dim\\": -1', b'\\"dim\\": -2'), (b'\\"reduce_range\\": false', b'\\"reduce_range\\": 10000'),
        (b"bfloat16", b"float128"), (b"Int8Tensor", b"Int4Tensor"), (b"quant.format", b"quant.farmat"),
        (b'"quant.format":"1"', b'"quant.format":"2"'), (b"quant.sha256", b"quant.sha255"), (b'"I8"', b'"U8"'),
        (b"tensor_names", b"tensor-names"), (b"to_q._weight_scale", b"to_k._weight_scale"), (b"scheme", b"schema"),
    ]:  # fmt: skip
        yield f"{old!r} is {new!r}", replace(old, new)


def replace(old: bytes, new: bytes) -> Damage:
    """Replace some text of the header, all of it, by as much."""
    assert len(old) == len(new)

    def damage(directory: Path) -> None:
        data = (directory / WEIGHTS).read_bytes()
        assert old in data
        (directory / WEIGHTS).write_bytes(data.replace(old, new))

    return damage


SINGLE, SHARDS, METADATA = dict(on_the_single_file()), dict(on_the_shards()), dict(on_the_metadata())


@for_each("damage", SINGLE.values(), ids=SINGLE)
def test_single_file(damage: Damage, whole: Any, tmp_path: Path) -> None:
    check(damage, whole[0], whole[2], tmp_path)


@for_each("damage", SHARDS.values(), ids=SHARDS)
def test_shards(damage: Damage, whole: Any, tmp_path: Path) -> None:
    check(damage, whole[1], whole[2], tmp_path)


@for_each("damage", (SINGLE | METADATA).values(), ids=SINGLE | METADATA)
def test_quantized_file(damage: Damage, quantized: Any, tmp_path: Path) -> None:
    check(damage, quantized[0], quantized[2], tmp_path)


@for_each("damage", SHARDS.values(), ids=SHARDS)
def test_quantized_shards(damage: Damage, quantized: Any, tmp_path: Path) -> None:
    check(damage, quantized[1], quantized[2], tmp_path)


def check(damage: Damage, source: Path, model: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "copy")
    damage(directory)
    try:
        loaded = cogx_fast.load(directory)
    except (CheckpointError, ConfigError) as error:
        assert len(str(error)) > 40, "no more than a bare key"  # noqa: PT017
    else:
        assert_same_model(loaded, model)


def test_there_are_enough() -> None:
    assert len(SINGLE | SHARDS) >= 120
    assert len(METADATA) >= 120
