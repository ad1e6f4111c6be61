"""Quantized weights as plain tensors and back: torchao's own layout, bit for bit, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant import storage
from quant.errors import QuantError
from tests.cases import for_each
from tests.quant.support import assert_same_weight, bits, checksum, without_onednn

ROWS, COLUMNS = 96, 64


def make(scheme: str) -> Any:
    """A quantized weight of that kind, made without a GPU."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import (
        Float8Tensor,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        PerRow,
        PerTensor,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS).bfloat16()
    if scheme.startswith("fp8-dynamic"):  # torchao's config for them asks for a GPU, its tensor does not
        granularity = PerTensor() if scheme.endswith("tensor") else PerRow()
        fast = Float8MMConfig(use_fast_accum=True)
        activation = QuantizeTensorToFloat8Kwargs(granularity=granularity, mm_config=fast, hp_value_lb=1e-12)
        return Float8Tensor.from_hp(
            linear.weight.detach(), granularity=granularity, mm_config=fast, act_quant_kwargs=activation
        )
    config: Any = {
        "int8-weight-only": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
        "int8-tensor": lambda: Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
        "int8-dynamic": lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "fp8-weight-only": lambda: Float8WeightOnlyConfig(set_inductor_config=False),
        "int4-unpacked": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }[scheme]()
    quantize_(linear, config)
    return linear.weight


SCHEMES = ["int8-weight-only", "int8-tensor", "int8-dynamic", "fp8-weight-only", "fp8-dynamic", "fp8-dynamic-tensor"]
ALL = [*SCHEMES, "int4-unpacked"]


def written(description: str = "", torchao: str | None = None) -> storage.Written:
    version = storage.torchao_version() if torchao is None else torchao
    return storage.Written(descriptions={"a.weight": description}, recipe=None, torchao=version)


def restore(description: str, parts: dict[str, Tensor], **options: Any) -> Tensor:
    return storage.restore("a.weight", parts, written(description, **options), description)


@for_each("scheme", ALL)
def test_the_layout_is_torchaos_own(scheme):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    weight = make(scheme)
    data, metadata = flatten_tensor_state_dict({"a.weight": weight.detach(), "a.bias": torch.ones(3)})
    flat = storage.flatten(weight)
    ours = {storage.part_name("a.weight", part): tensor for part, tensor in flat.parts.items()}
    assert ours.keys() | {"a.bias"} == data.keys()
    assert all(torch.equal(bits(data[name]), bits(tensor)) for name, tensor in ours.items())
    assert storage.part_names("a.weight", flat.description).keys() == flat.parts.keys()
    packed = storage.pack(["a.weight", "a.bias"], {"a.weight": flat.description}, None)
    assert {key: text for key, text in packed.items() if not key.startswith("quant.")} == metadata


@for_each("scheme", ALL)
def test_round_trip_is_bit_exact_and_copies_nothing(scheme):
    weight = make(scheme)
    flat = storage.flatten(weight)
    restored = restore(flat.description, flat.parts)
    assert_same_weight(restored, weight)
    own = storage.flatten(restored).parts
    assert all(own[name].data_ptr() == part.data_ptr() for name, part in flat.parts.items())
    x = torch.randn(4, COLUMNS).bfloat16()
    with without_onednn():
        assert torch.equal(nn.functional.linear(x, restored), nn.functional.linear(x, weight))


@for_each("scheme", SCHEMES)
def test_parted_by_rows_and_joined(scheme):
    weight = make(scheme)
    whole = storage.flatten(weight)
    counts = [16, 48, 32]
    pieces = [whole.rows(sum(counts[:index]), count) for index, count in enumerate(counts)]
    for index, piece in enumerate(pieces):
        first = sum(counts[:index])
        part = restore(piece.description, piece.parts)
        assert torch.equal(part.dequantize(), weight.dequantize()[first : first + counts[index]])
    description = storage.join([piece.description for piece in pieces], counts)
    assert json.loads(description) == json.loads(whole.description)
    for name, part in whole.parts.items():
        parts = [piece.parts[name] for piece in pieces]
        if all(storage.is_by_rows(name, one.shape, count) for one, count in zip(parts, counts, strict=True)):
            assert torch.equal(bits(torch.cat(parts)), bits(part))
        else:
            assert all(torch.equal(one, part) for one in parts)


def test_what_cannot_be_parted_or_joined():
    flat = storage.flatten(make("int4-unpacked"))
    assert flat.rows(0, 32) is None
    with pytest.raises(QuantError, match="cannot be put together"):
        storage.join([flat.description] * 2, [96, 96])
    mixed = [storage.flatten(make(scheme)).description for scheme in ("int8-weight-only", "int8-dynamic")]
    with pytest.raises(QuantError, match="several ways"):
        storage.join(mixed, [96, 96])


def test_what_is_quantized():
    assert storage.is_quantized(make("int8-dynamic"))
    assert storage.is_quantized(nn.Parameter(make("fp8-dynamic"), requires_grad=False))
    assert not storage.is_quantized(nn.Parameter(torch.ones(2)))


def test_kinds_without_a_file_format_are_refused():
    from torchao.quantization import Float8Tensor

    class Emulated(Float8Tensor):
        pass

    weight = make("fp8-weight-only")
    other = Emulated(weight.qdata, weight.scale, block_size=weight.block_size, dtype=weight.dtype)
    assert storage.is_quantized(other)
    with pytest.raises(QuantError, match=r"Emulated, for which torchao .* no safetensors format"):
        storage.flatten(other)


# ------------------------------------------------------------------------------------------------------------ versions


def changed(description: str, **changes: Any) -> str:
    content = json.loads(description)
    for key, value in changes.items():
        content["_data"].pop(key, None)
        if value is not ...:
            content["_data"][key] = value
    return json.dumps(content)


OTHER_VERSIONS = {
    "a renamed field": ("int8-dynamic", {"block_size": ..., "block_sizes": [1, 64]}),
    "a field that is not known": ("fp8-weight-only", {"packing": "tight"}),
    "a class that is not known": (
        "int8-dynamic",
        {"act_quant_kwargs": {"_type": "QuantizeTensorToInt8KwargsV2", "_data": {}}},
    ),
    "a member that is not known": (
        "fp8-weight-only",
        {"kernel_preference": {"_type": "KernelPreference", "_data": "BEST"}},
    ),
    "a form that is not known, which torchao lets through": (
        "fp8-weight-only",
        {"mm_config": {"_type": "PerTensor", "_data": "fast"}},
    ),
    "a dtype that is not known": ("int8-weight-only", {"dtype": {"_type": "torch.dtype", "_data": "bfloat8"}}),
    "a dtype that is something else": ("int8-weight-only", {"dtype": {"_type": "torch.dtype", "_data": "save"}}),
    "a field that the class takes for another": ("int8-weight-only", {"dtype": "bfloat16"}),
}


@for_each("case", OTHER_VERSIONS)
def test_another_torchaos_files_are_refused_with_both_versions(case):
    scheme, changes = OTHER_VERSIONS[case]
    flat = storage.flatten(make(scheme))
    description = changed(flat.description, **changes)
    here = storage.torchao_version()
    with pytest.raises(
        QuantError, match=rf"written by torchao 9\.1\.0, which the installed torchao {here} cannot read"
    ):
        restore(description, flat.parts, torchao="9.1.0")
    with pytest.raises(QuantError, match="the file is damaged"):
        restore(description, flat.parts)


def test_another_torchaos_class_is_refused():
    flat = storage.flatten(make("int8-dynamic"))
    description = flat.description.replace('"Int8Tensor"', '"Int8TensorV3"')
    with pytest.raises(QuantError, match=r"written by torchao 0\.9\.0, which the installed torchao"):
        restore(description, flat.parts, torchao="0.9.0")


def test_an_older_file_without_a_field_that_was_added_since_is_read():
    weight = make("int8-weight-only")
    flat = storage.flatten(weight)
    description = changed(flat.description, reduce_range=...)
    assert_same_weight(restore(description, flat.parts, torchao="0.15.0"), weight)


def test_a_newer_format_is_refused():
    packed = storage.pack(["a.weight"], {}, None) | {"quant.format": "2", "quant.torchao": "9.1.0"}
    packed["quant.sha256"] = checksum({k: v for k, v in packed.items() if k != "quant.sha256"})
    with pytest.raises(QuantError, match=rf"format 2 by torchao 9\.1\.0.*torchao {storage.torchao_version()}"):
        storage.unpack(packed)


# -------------------------------------------------------------------------------------------------------------- damage


def test_every_changed_character_of_the_metadata_is_found():
    flat = storage.flatten(make("fp8-dynamic"))
    packed = storage.pack(["a.weight"], {"a.weight": flat.description}, 'name = "r"\n')
    assert storage.unpack(packed | {"format": "pt"}) == storage.Written(
        descriptions={"a.weight": flat.description}, recipe='name = "r"\n', torchao=storage.torchao_version()
    )
    for key, text in packed.items():
        for position in range(len(text)):
            damaged = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
            with pytest.raises(QuantError, match="checksum"):
                storage.unpack(packed | {key: damaged})
        if key != "quant.sha256":
            with pytest.raises(QuantError, match="checksum"):
                storage.unpack({other: value for other, value in packed.items() if other != key})


def test_plain_files_have_nothing_to_unpack():
    assert storage.unpack({"format": "pt"}) is None
    assert storage.unpack({}) is None


@for_each("text", ["3", "null", "[]", '{"_type": "Int8Tensor"}', "{", '["a"]', '"a"', "[" * 100_000])
def test_descriptions_without_sense_are_refused(text):
    for metadata in ({"tensor_names": '["a.weight"]', "a.weight": text}, {"tensor_names": text.replace("[]", "[[]]")}):
        with pytest.raises(QuantError, match="cannot be read"):
            storage.unpack(metadata)


def test_parts_that_do_not_fit_are_refused():
    flat = storage.flatten(make("int8-weight-only"))
    qdata, scale = flat.parts["qdata"], flat.parts["scale"]

    def refused(words: str, description: str = flat.description, **parts: Tensor) -> None:
        with pytest.raises(QuantError, match=words):
            restore(description, flat.parts | parts)

    refused("scale has shape", scale=scale[:-1])
    refused("scale has shape", scale=scale.flatten())
    refused("scale is torch.int32", scale=scale.int())
    refused("zero_point has shape", zero_point=flat.parts["zero_point"][:5])
    refused("its values are torch.uint8", qdata=qdata.view(torch.uint8))
    refused("do not divide", changed(flat.description, block_size=[1, 48]))
    refused("do not divide", changed(flat.description, block_size=[1, 0]))
    refused("do not divide", changed(flat.description, block_size=[64]))
    with pytest.raises(QuantError, match="damaged"):
        restore(flat.description, {"qdata": qdata})
    with pytest.raises(QuantError, match="damaged"):
        restore(flat.description.replace('"zero_point", ', ""), flat.parts | {"zero_points": scale})
