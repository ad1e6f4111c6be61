"""The configuration: equal to upstream's in fields and defaults, and strict about what no model can have."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogx_fast.config import HUB_IDS, PRESETS, ConfigError, TransformerConfig
from tests.cases import for_each
from tests.support import RELEASED, small, upstream

# As published on the hub: what differs from the defaults of upstream's class.
PUBLISHED: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "5b-i2v": {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True, "in_channels": 32,
    },
    "1.5-5b": {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True, "patch_size_t": 2,
        "sample_height": 300, "sample_width": 300, "sample_frames": 81, "patch_bias": False,
    },
    "1.5-5b-i2v": {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True, "patch_size_t": 2,
        "sample_height": 300, "sample_width": 300, "sample_frames": 81, "patch_bias": False, "in_channels": 32,
        "ofs_embed_dim": 512,
    },
}  # fmt: skip


def upstream_defaults() -> dict[str, Any]:
    from diffusers import CogVideoXTransformer3DModel

    parameters = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def test_fields_and_defaults_are_upstreams() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    assert ours == upstream_defaults()
    assert {name: type(default) for name, default in ours.items()} == {
        name: type(default) for name, default in upstream_defaults().items()
    }


@for_each("name", RELEASED)
def test_preset_is_the_published_configuration(name: str) -> None:
    expected = {"_class_name": "CogVideoXTransformer3DModel", **upstream_defaults(), **PUBLISHED[name]}
    assert TransformerConfig.preset(name).to_dict() == expected


@for_each(
    "name, inner_dim, sample, grid",
    [
        ("2b", 1920, (13, 60, 90), (13, 30, 45)),
        *((name, 3072, (13, 60, 90), (13, 30, 45)) for name in ("5b", "5b-i2v")),
        *((name, 3072, (22, 96, 170), (11, 48, 85)) for name in ("1.5-5b", "1.5-5b-i2v")),
    ],
)
def test_preset_has_the_published_width_and_grid(name: str, inner_dim: int, sample: Any, grid: Any) -> None:
    config = PRESETS[name]
    assert config.inner_dim == inner_dim
    assert config.grid(*sample) == grid


def test_presets_are_the_released_ones_and_tiny() -> None:
    assert tuple(PRESETS) == (*RELEASED, "tiny")
    assert tuple(HUB_IDS) == RELEASED
    assert all(hub_id.startswith("THUDM/CogVideoX") for hub_id in HUB_IDS.values())
    with pytest.raises(ConfigError, match=r"'7b' is not known: choose one of 2b, 5b.*tiny"):
        TransformerConfig.preset("7b")


@for_each("name", [*RELEASED, "tiny"])
def test_round_trip_through_a_config_json_that_diffusers_wrote(name: str, tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    config = PRESETS[name] if name == "tiny" else small(name)
    upstream(config).save_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_diffusers_version"]
    assert TransformerConfig.from_json(tmp_path / "config.json") == config
    assert TransformerConfig.from_json(str(tmp_path / "config.json")) == config
    assert TransformerConfig.from_dict(written) == config
    assert config.to_dict() == {key: value for key, value in written.items() if key != "_diffusers_version"}

    (tmp_path / "ours.json").write_text(json.dumps(config.to_dict()))
    read = CogVideoXTransformer3DModel.load_config(str(tmp_path / "ours.json"))
    again = CogVideoXTransformer3DModel.from_config(read)
    assert {key: again.config[key] for key in config} == dict(config)


def test_keys_that_config_json_leaves_out_have_upstreams_defaults(tmp_path: Path) -> None:
    old = {"_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.30.0.dev0", "num_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert TransformerConfig.from_json(tmp_path / "config.json") == TransformerConfig(num_layers=3)
    assert TransformerConfig.from_dict({}) == TransformerConfig()


def test_it_reads_as_an_object_and_as_a_mapping() -> None:
    config = PRESETS["5b"]
    assert isinstance(config, collections.abc.Mapping)
    assert config.num_layers == config["num_layers"] == config.get("num_layers") == 42
    assert config.get("nothing") is None
    assert config.get("inner_dim", 7) == 7  # a property of ours is no field of config.json
    assert "num_layers" in config
    assert "inner_dim" not in config
    assert len(config) == len(list(config)) == len(upstream_defaults())
    assert dict(config) == {**config} == dict(config.items()) == dataclasses.asdict(config)
    with pytest.raises(KeyError, match="nothing"):
        config["nothing"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        hash(config)
    with pytest.raises(TypeError):
        TransformerConfig(48)  # type: ignore[misc]


def test_it_is_copied_pickled_compared_and_changed() -> None:
    config = PRESETS["5b"]
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)  # noqa: S301
    changed = dataclasses.replace(config, num_layers=2)
    assert changed != config
    assert changed.num_layers == 2
    with pytest.raises(ConfigError, match="num_layers is 0"):
        dataclasses.replace(config, num_layers=0)


def test_numbers_of_other_types_become_pythons_own() -> None:
    config = TransformerConfig(num_layers=np.int64(3), norm_eps=np.float32(0.5), temporal_interpolation_scale=2)  # type: ignore[arg-type]
    assert type(config.num_layers) is int
    assert type(config.norm_eps) is float
    assert json.loads(json.dumps(config.to_dict()))["temporal_interpolation_scale"] == 2
    assert TransformerConfig(ofs_embed_dim=0).ofs_embed_dim is None  # upstream's "if ofs_embed_dim"


ROTARY = {"use_rotary_positional_embeddings": True}
LEARNED = {**ROTARY, "use_learned_positional_embeddings": True}

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    # the field, the value and what to do
    ({"num_layers": "2"}, r"num_layers is '2' \(str\), expected an int"),
    ({"num_layers": True}, r"num_layers is True \(bool\), expected an int"),
    ({"num_layers": 2.0}, r"num_layers is 2.0 \(float\), expected an int"),
    ({"num_layers": None}, r"num_layers is None \(NoneType\), expected an int"),
    ({"num_layers": [2]}, r"num_layers is \[2\] \(list\)"),
    ({"num_layers": float("nan")}, r"num_layers is nan \(float\), expected an int"),
    ({"out_channels": None}, r"out_channels is None \(NoneType\), expected an int"),
    ({"patch_size_t": "2"}, r"patch_size_t is '2' \(str\), expected an int or None"),
    ({"patch_size_t": False}, r"patch_size_t is False \(bool\), expected an int or None"),
    ({"ofs_embed_dim": False}, r"ofs_embed_dim is False \(bool\), expected an int or None"),
    ({"attention_bias": 1}, r"attention_bias is 1 \(int\), expected a bool"),
    ({"attention_bias": "true"}, r"attention_bias is 'true' \(str\), expected a bool"),
    ({"flip_sin_to_cos": None}, r"flip_sin_to_cos is None \(NoneType\), expected a bool"),
    ({"norm_eps": "1e-5"}, r"norm_eps is '1e-5' \(str\), expected a float"),
    ({"norm_eps": True}, r"norm_eps is True \(bool\), expected a float"),
    ({"dropout": None}, r"dropout is None \(NoneType\), expected a float"),
    ({"activation_fn": None}, r"activation_fn is None \(NoneType\), expected a str"),
    ({"freq_shift": 0.5}, r"freq_shift is 0.5 \(float\), expected an int"),
    # sizes
    *(({name: 0}, f"{name} is 0, expected 1 to") for name in (
        "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim", "text_embed_dim",
        "num_layers", "sample_width", "sample_height", "sample_frames", "patch_size", "patch_size_t",
        "temporal_compression_ratio", "max_text_seq_length")),
    *(({name: -2}, f"{name} is -2, expected") for name in (
        "num_attention_heads", "in_channels", "ofs_embed_dim", "num_layers", "patch_size_t", "freq_shift")),
    ({"num_layers": 30_000_000}, "num_layers is 30000000, expected 1 to 1000"),
    ({"text_embed_dim": 10**30}, "text_embed_dim is 10{30}, expected 1 to"),
    ({"num_attention_heads": 4096}, "num_attention_heads × attention_head_dim is 262144, expected 65536 or less"),
    ({"patch_size": 100}, r"sample_height is 60, less than one patch \(patch_size 100\)"),
    ({"sample_width": 1}, r"sample_width is 1, less than one patch"),
    # numbers
    ({"dropout": -0.1}, "dropout is -0.1, expected a probability between 0 and 1"),
    ({"dropout": 1.5}, "dropout is 1.5, expected a probability between 0 and 1"),
    ({"dropout": float("nan")}, "dropout is nan, expected a probability between 0 and 1"),
    ({"norm_eps": -1e-5}, "norm_eps is -1e-05, expected a small number"),
    ({"norm_eps": float("nan")}, "norm_eps is nan, expected a small number"),
    ({"norm_eps": float("inf")}, "norm_eps is inf, expected a small number"),
    ({"norm_eps": 10**400}, "norm_eps is 10{400}, expected a small number"),
    *(({f"{axis}_interpolation_scale": value}, f"{axis}_interpolation_scale is {value}, expected a number above 0")
      for axis in ("spatial", "temporal") for value in (0.0, -1.0, float("nan"), float("inf"))),
    # names
    ({"activation_fn": "relu"}, "activation_fn is 'relu', expected one of .*'gelu-approximate'"),
    ({"activation_fn": "GELU"}, "activation_fn is 'GELU', expected one of"),  # upstream fails on it too
    ({"timestep_activation_fn": "tanh"}, "timestep_activation_fn is 'tanh', expected one of .*'silu'"),
    # together
    ({"use_learned_positional_embeddings": True}, "use_learned.* is True while use_rotary.*: .*set use_rotary"),
    ({**ROTARY, "attention_head_dim": 72}, "attention_head_dim is 72 with rotary.*multiple of 16"),
    ({**ROTARY, "attention_head_dim": 8}, "attention_head_dim is 8 with rotary.*multiple of 16"),
    ({"num_attention_heads": 3, "attention_head_dim": 40}, "is 120; added sin-cos positions need a multiple of 16"),
    ({"patch_size_t": 2}, "patch_size_t is 2 with added positions.*use use_rotary.*or patch_size_t=None"),
    ({**LEARNED, "patch_size_t": 2}, "patch_size_t is 2 with added positions.*use_learned_positional_embeddings=False"),
    ({**LEARNED, "patch_size_t": 1, "sample_height": 13}, "sample_height is 13 with learned.*multiple of patch_size"),
    ({**LEARNED, "patch_size_t": 1, "sample_width": 13}, "sample_width is 13 with learned.*multiple of patch_size"),
    ({"ofs_embed_dim": 256}, "ofs_embed_dim is 256 and time_embed_dim is 512.*make them equal"),
    ({"time_embed_dim": 256, "ofs_embed_dim": 512}, "ofs_embed_dim is 512 and time_embed_dim is 256"),
    ({"freq_shift": 960}, r"freq_shift is 960, expected less than half of the model's width \(960\)"),
    ({"freq_shift": 4, "time_embed_dim": 8, "ofs_embed_dim": 8}, r"freq_shift is 4, .* half of ofs_embed_dim \(4\)"),
    # what is no field
    ({"num_layer": 2}, r"unknown field 'num_layer' \(did you mean 'num_layers'\?\): remove or correct"),
    ({"quux": 2, "zorro": 3}, "unknown fields 'quux', 'zorro': remove or correct"),
    ({f"x{i}": i for i in range(7)}, "'x4' and 2 more: remove"),
    ({5: 1}, "unknown field '5'"),  # type: ignore[dict-item]
    ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel', expected 'CogVideoXTransformer3DModel'"),
    ({"_class_name": None}, "_class_name is None"),
    ({"_class_name": ["CogVideoXTransformer3DModel"]}, "_class_name is .*another model"),
]  # fmt: skip


@for_each("fields, message", IMPOSSIBLE)
def test_impossible_configuration_is_refused_by_field_value_and_remedy(
    fields: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as direct:
        TransformerConfig.from_dict(fields, origin="model/config.json")
    assert str(direct.value).startswith("model/config.json: ")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        TransformerConfig.from_json(tmp_path / "config.json")


NO_JSON = [
    "",
    "{",
    "not json",
    '{"num_layers": }',
    '\ufeff{"num_layers": 2}',
    "[" * 100_000,
    "9" * 5_000,
    b"\xff\x00{}",
]
NO_MAPPING = ["[]", '[{"num_layers": 2}]', "null", "3", '"2b"', "true"]


@for_each(
    "content, words",
    [
        *((content, "not valid JSON .*: restore the file") for content in NO_JSON),
        *((content, "got a .*, expected a mapping of the fields") for content in NO_MAPPING),
    ],
)
def test_a_file_that_is_no_json_or_no_mapping_is_named(content: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"config.json: {words}"):
        TransformerConfig.from_json(tmp_path / "config.json")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TransformerConfig.from_json(tmp_path / "config.json")
    with pytest.raises(OSError, match="director"):
        TransformerConfig.from_json(tmp_path)


def test_grid_counts_whole_patches_and_refuses_what_has_none() -> None:
    assert PRESETS["2b"].grid(1, 2, 3) == (1, 1, 1)
    assert PRESETS["5b"].grid(13, 61, 91) == (13, 30, 45)
    assert PRESETS["1.5-5b"].grid(22, 60, 90) == (11, 30, 45)
    for config, sizes, message in [
        (PRESETS["2b"], (0, 60, 90), "frames is 0: at least one patch"),
        (PRESETS["2b"], (1, 1, 90), "height is 1: at least one patch"),
        (PRESETS["1.5-5b"], (1, 60, 90), "frames is 1: at least one patch"),
        (PRESETS["1.5-5b"], (21, 60, 90), "frames is 21.*pad it to 22"),
        (PRESETS["1.5-5b"], (22, 60, 91), "width is 91.*pad it to 92"),
    ]:
        with pytest.raises(ValueError, match=message):
            config.grid(*sizes)
