"""The schemes by name: what each needs, what it is in torchao, and what stands in for it where it cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.requirements import ANY, Requirement

if TYPE_CHECKING:
    import torch

EMULATED = "-emulated"

# torchao divides a row by its largest value without a floor, which makes an all-zero row NaN. This floor, far below
# what bf16 activations hold, is torchao's own remedy; a finite scale of it quantizes zeros to zeros.
_LEAST_ACTIVATION = 1e-12


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantize a linear."""

    name: str
    description: str
    weight_bits: int
    activation_bits: int | None = None
    """None: activations stay as they are, and the product is computed in their dtype (weight-only)."""
    requires: Requirement = ANY
    multiple: int = 1
    """Both sizes of the weight must be multiples of it."""
    group: int = 1
    """The weight's inputs must be a multiple of it."""
    by_rows: bool = True
    """Each row has scales of its own, so a weight can be quantized some rows at a time, to the same values."""
    dtype: str | None = None
    """The dtype that the weights must have; None is any."""
    nearest: str | None = None
    """The scheme that stands in for this one under ``on_unsupported="nearest"``."""

    @property
    def dynamic(self) -> bool:
        """Whether activations are quantized as they come, for a product in low precision."""
        return self.activation_bits is not None

    def unmet(self, shape: tuple[int, int], dtype: torch.dtype | None, device: torch.device | None) -> str | None:
        """Why a weight of that shape (outputs, inputs) cannot be quantized so, or None. None for what is not known."""
        outputs, inputs = shape
        if outputs % self.multiple or inputs % self.multiple:
            return f"it needs sizes that are multiples of {self.multiple}, and this one is {outputs} × {inputs}"
        if inputs % self.group:
            return f"it needs inputs that are a multiple of {self.group}, and this one has {inputs}"
        if self.dtype is not None and dtype is not None and str(dtype) != f"torch.{self.dtype}":
            return f"it needs {self.dtype} weights, and these are {dtype}: load the model with dtype={self.dtype!r}"
        return None if device is None else self.requires.unmet(device)


_FP8_HARDWARE = Requirement(device="cuda", compute_capability="8.9")
_FP8 = {"weight_bits": 8, "activation_bits": 8, "multiple": 16, "dtype": "bfloat16"}

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="int8-weight-only", description="int8 weights, a scale for each row", weight_bits=8),
        Scheme(
            name="int8-dynamic",
            description="int8 weights and activations, a scale for each row of both; int8 matmul",
            weight_bits=8, activation_bits=8, multiple=8, nearest="int8-weight-only",
        ),
        Scheme(name="fp8-weight-only", description="fp8 (e4m3) weights, a scale for each row", weight_bits=8),
        Scheme(
            name="fp8-dynamic",
            description="fp8 (e4m3) weights and activations, a scale for each row of both; scaled fp8 matmul",
            requires=_FP8_HARDWARE, nearest="int8-dynamic", **_FP8,  # type: ignore[arg-type]
        ),
        Scheme(
            name="fp8-dynamic-tensor",
            description="fp8 (e4m3) weights and activations, one scale for each tensor; scaled fp8 matmul",
            requires=_FP8_HARDWARE, nearest="int8-dynamic", by_rows=False, **_FP8,  # type: ignore[arg-type]
        ),
        Scheme(
            name="fp8-dynamic" + EMULATED,
            description="emulated: fp8-dynamic's rounding and scales, product in fp32; for quality figures only, slow",
            **_FP8,  # type: ignore[arg-type]
        ),
        Scheme(
            name="fp8-dynamic-tensor" + EMULATED,
            description="emulated: fp8-dynamic-tensor's rounding and scale, product in fp32; for quality figures only",
            by_rows=False, **_FP8,  # type: ignore[arg-type]
        ),
        Scheme(
            name="int4-weight-only",
            description="int4 weights in groups of 128, torch's own packed layout and kernel",
            weight_bits=4, group=128, by_rows=False, dtype="bfloat16", nearest="int8-weight-only",
            requires=Requirement(device="cuda", compute_capability="8.0"),
        ),
    )
}  # fmt: skip


def torchao_config(name: str) -> Any:
    """The configuration in torchao (an ``AOBaseConfig``) of a scheme, for ``torchao.quantization.quantize_``.

    Global compiler flags, which torchao's configurations set unless told not to, are left alone.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        PerTensor,
    )
    from torchao.quantization.quantize_.common import KernelPreference

    def fp8(granularity: Any) -> Any:
        # KernelPreference.TORCH: quantization that Inductor fuses, and the same kernels on every machine.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=granularity,
            activation_value_lb=_LEAST_ACTIVATION,
            kernel_preference=KernelPreference.TORCH,
            set_inductor_config=False,
        )

    match name:
        case "int8-weight-only":
            return Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
        case "int8-dynamic":
            return Int8DynamicActivationInt8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        case "fp8-weight-only":
            return Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
        case "fp8-dynamic":
            return fp8(PerRow())
        case "fp8-dynamic-tensor":
            return fp8(PerTensor())
        case "int4-weight-only":
            return Int4WeightOnlyConfig(
                group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        case _:
            from quant.emulation import EmulatedFloat8Config

            assert name.endswith(EMULATED), name
            return EmulatedFloat8Config(torchao_config(name.removesuffix(EMULATED)))


__all__ = ["EMULATED", "SCHEMES", "Scheme", "torchao_config"]
