"""The least time that a device's ceilings allow for one denoising step, part by part.

Each part takes at least the longest of three times: its operations at the rate of the units that do them, its bytes at
the memory's bandwidth, and, for attention, its exponentials at the rate of the special-function units. Parts follow one
another, so a step takes at least their sum. What is counted is what no implementation of these kernels avoids: every
operand read once and every result written once, activations between kernels in 16 bits (or in the recipe's 8, written
so by whoever makes them), GELU in the product that precedes it. It is a floor, not a prediction.

Suffixes in words: S joint tokens, D model width, N heads, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cogx_fast.config import TransformerConfig
from cogx_fast.measure import costs
from cogx_fast.measure.devices import GIGA, PCIE_SHARE, PCIE_X16, TERA, Device
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from cogx_fast.sizes import Tokens

Products = Literal["bf16", "fp8", "int8"]
_HALF = 2  # bytes of a value in bf16 or fp16
_SCALE = 4  # bytes of a row's scale
_BLOCKS = ("attention", "feed-forward")


class Scheme(NamedTuple):
    """How the linears of the blocks are computed."""

    products: Products
    weight_bytes: float
    """Of one weight."""
    input_bytes: int
    """Of one value of the linears' inputs."""


UNQUANTIZED = "bf16"
SCHEMES: dict[str, Scheme] = {
    UNQUANTIZED: Scheme("bf16", 2, 2),
    "int8-dynamic": Scheme("int8", 1, 1),
    "int8-weight-only": Scheme("bf16", 1, 2),
    "int4-weight-only": Scheme("bf16", 0.5, 2),
    "fp8-dynamic": Scheme("fp8", 1, 1),
    "fp8-dynamic-tensor": Scheme("fp8", 1, 1),
    "fp8-weight-only": Scheme("bf16", 1, 2),
}
"""By the names of the recipes that give every linear of the blocks this scheme."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some kernels of one step."""

    name: str
    group: Literal["attention", "linears", "glue", "communication"]
    flops: int = 0
    products: Products = "bf16"
    bytes: int = 0
    exponentials: int = 0
    sent: int = 0
    """Bytes that one GPU sends to others."""
    messages: int = 0
    """Collectives, one after the other."""

    def times(self, device: Device) -> dict[str, float]:
        """Seconds that each ceiling asks for."""
        return {
            "products": self.flops / device.peak(self.products) if self.flops else 0.0,
            "memory": self.bytes / device.bandwidth,
            "exponentials": self.exponentials / device.exponentials,
            "link": self.sent / device.link + self.messages * device.link_latency,
        }

    def seconds(self, device: Device) -> float:
        """The longest of them."""
        return max(self.times(device).values())

    def bound(self, device: Device) -> str:
        """The ceiling that asks for most."""
        times = self.times(device)
        return max(times, key=lambda name: times[name])


def parts(
    config: TransformerConfig,
    tokens: Tokens,
    *,
    batch: int,
    scheme: str = UNQUANTIZED,
    kept: float = 1.0,
    guidance: int = 1,
    sequence: int = 1,
) -> list[Part]:
    """What one GPU does in one step, in the order of the forward pass.

    Args:
        config: the model's configuration.
        tokens: of one video.
        batch: videos in the call; 2 with guidance.
        scheme: of the blocks' linears, a name from ``SCHEMES``.
        kept: share of the attention scores that sparse attention computes; 1 is dense.
        guidance: GPUs that share the videos of the batch.
        sequence: GPUs that share the tokens of a video, with an exchange of heads for tokens around attention (Ulysses,
            arXiv:2309.14509).

    Raises:
        ValueError: an unknown scheme, a share outside (0, 1], or GPUs that cannot share the batch or the heads.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is not known: choose one of {', '.join(SCHEMES)}")
    if not 0 < kept <= 1:
        raise ValueError(f"kept is {kept}, expected a share above 0, at most 1 (dense)")
    for what, number, size in (("videos", batch, guidance), ("heads", config.num_attention_heads, sequence)):
        if number % size:
            raise ValueError(f"{size} GPUs cannot share {number} {what}: take a number that divides them")
    share = _Share(config, tokens, batch // guidance, sequence)
    used = SCHEMES[scheme]
    found = [*_linears(share, used), _attention(share, used, kept), *_glue(share, used)]
    return found + [part for part in _exchanges(share, guidance) if part.messages]


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Whether a block's copy hides under the computing of the one before it, over one link (``runtime.streaming``)."""

    link: str
    block_bytes: int
    copy_seconds: float
    """Of a block, at the rate that the link is taken to reach."""
    compute_seconds: float
    """Of a block, at least."""
    step_seconds: float
    """Of a step, at least."""

    @property
    def hides(self) -> bool:
        """Whether it does even where the device reaches its ceilings; what computes for longer hides more."""
        return self.copy_seconds <= self.compute_seconds


def streaming(config: TransformerConfig, found: list[Part], device: Device, *, scheme: str) -> list[Streaming]:
    """What ``offload="blocks"`` does to a step, over each generation of PCIe: a prediction.

    Args:
        config: the model's configuration.
        found: the step's ``parts``.
        device: where it computes.
        scheme: of the blocks' linears, as ``parts`` had it.
    """
    in_blocks = {each.role for each in costs.linears(config) if each.part in _BLOCKS}
    step = sum(part.seconds(device) for part in found)
    around = sum(part.seconds(device) for part in found if part.group == "linears" and part.name not in in_blocks)
    compute, size = (step - around) / config.num_layers, block_bytes(config, scheme)
    copies = {link: size / (PCIE_SHARE * rate) for link, rate in PCIE_X16.items()}
    return [
        Streaming(
            link=link, block_bytes=size, copy_seconds=copy, compute_seconds=compute,
            step_seconds=around + config.num_layers * max(copy, compute),
        )
        for link, copy in copies.items()
    ]  # fmt: skip


def block_bytes(config: TransformerConfig, scheme: str = UNQUANTIZED) -> int:
    """Bytes of one block's weights."""
    used = SCHEMES[scheme]
    scale = _SCALE if used.weight_bytes != _HALF else 0
    linears = sum(
        each.number * each.outputs * (each.inputs * used.weight_bytes + scale + _HALF * each.bias)
        for each in costs.linears(config)
        if each.part in _BLOCKS
    )
    wide = 4 * config.inner_dim if config.norm_elementwise_affine else 0
    return round(linears / config.num_layers) + _HALF * (wide + 4 * config.attention_head_dim)


@dataclass(frozen=True)
class _Share:
    """One GPU's part of the work."""

    config: TransformerConfig
    tokens: Tokens
    batch: int
    across_tokens: int

    def rows(self, kind: str) -> int:
        """Rows of a linear's input."""
        if kind == "video in the batch":
            return self.batch
        tokens = {"joint": self.tokens.joint, "video": self.tokens.video, "text": self.tokens.text}[kind]
        return self.batch * -(-tokens // self.across_tokens)

    @property
    def stream(self) -> int:
        """Values of the joint stream, S · D for every video."""
        return self.rows("joint") * self.config.inner_dim


def _linears(share: _Share, scheme: Scheme) -> list[Part]:
    found: dict[str, Part] = {}
    for linear in costs.linears(share.config):
        blocks = linear.part in _BLOCKS
        used = scheme if blocks else SCHEMES[UNQUANTIZED]
        rows, weights = share.rows(linear.rows), linear.inputs * linear.outputs
        inputs = rows * linear.inputs * used.input_bytes + (_SCALE * rows if used.input_bytes == 1 else 0)
        if linear.role == "queries, keys, values":
            inputs //= 3  # the three are one product of the same input
        scales = _SCALE * linear.outputs if used.weight_bytes != _HALF else 0
        outputs = rows * linear.outputs * _HALF
        if linear.role == "feed-forward in":  # the activation, gated or not, and its quantization are in the product
            outputs = rows * 4 * share.config.inner_dim * scheme.input_bytes
        stored = weights * used.weight_bytes + scales + _HALF * linear.outputs * linear.bias
        part = Part(
            name=linear.role,
            group="linears",
            products=used.products,
            flops=2 * linear.number * rows * weights,
            bytes=round(linear.number * (stored + inputs + outputs)),
        )
        before = found.get(part.name)
        found[part.name] = part if before is None else dataclasses.replace(
            part, flops=before.flops + part.flops, bytes=before.bytes + part.bytes
        )  # fmt: skip
    return list(found.values())


def _attention(share: _Share, scheme: Scheme, kept: float) -> Part:
    config = share.config
    tokens, layers = share.tokens.joint, config.num_layers
    scores = round(kept * tokens**2 * config.num_attention_heads * layers * share.batch / share.across_tokens)
    return Part(
        name="attention",
        group="attention",
        flops=4 * scores * config.attention_head_dim,
        exponentials=scores,
        bytes=(3 * _HALF + scheme.input_bytes) * share.stream * layers,
    )


def _glue(share: _Share, scheme: Scheme) -> list[Part]:
    stream, layers = share.stream, share.config.num_layers
    normed = stream * scheme.input_bytes  # what the next linear reads

    def part(name: str, block_bytes: int) -> Part:
        return Part(name=name, group="glue", bytes=layers * block_bytes)

    return [
        part("norm, modulation", _HALF * stream + normed),
        part("norm of queries and keys, rotation", 4 * _HALF * stream),
        part("gate, addition, norm, modulation", 3 * _HALF * stream + normed),
        part("gate, addition", 3 * _HALF * stream),
    ]


def _exchanges(share: _Share, guidance: int) -> Iterator[Part]:
    """Queries, keys and values to the GPUs of their heads, the result back, and the prediction to all; each keeps its
    own share."""
    config, ranks = share.config, share.across_tokens
    sent = 4 * _HALF * share.stream * config.num_layers * (ranks - 1) // ranks
    messages = 2 * config.num_layers if ranks > 1 else 0
    yield Part(name="heads for tokens", group="communication", sent=sent, messages=messages)
    patch = config.out_channels * config.patch_size**2 * (config.patch_size_t or 1)
    gathered = share.rows("joint") * patch * _HALF * (ranks - 1)
    predicted = share.batch * share.tokens.video * patch * _HALF * (guidance - 1)
    gathers = (ranks > 1) + (guidance > 1)
    yield Part(name="prediction", group="communication", sent=gathered + predicted, messages=gathers)


def schedule_seconds(
    schedule: StepSchedule, config: TransformerConfig, tokens: Tokens, device: Device, *, batch: int, **options: Any
) -> list[float]:
    """The least time of each step of a step schedule.

    A step computes what is outside of the blocks for all videos, its blocks for all of them or, where the schedule
    takes the halves of a guided call apart, for half, and reads what stands in for the others.

    Args:
        schedule: the model's.
        config: the model's configuration.
        tokens: of one video.
        device: whose ceilings are taken.
        batch: videos in the call; 2 with guidance.
        **options: ``parts``'.
    """

    def seconds(videos: int, layers: int) -> float:
        given = dataclasses.replace(config, num_layers=layers)
        return sum(part.seconds(device) for part in parts(given, tokens, batch=videos, **options))

    one, two = seconds(batch, 1), seconds(batch, 2)
    outside, block = 2 * one - two, two - one
    half = seconds(batch // 2, 2) - seconds(batch // 2, 1) if schedule.unconditional is not None else block
    halves = schedule.unconditional or (1,) * schedule.steps
    stream = _HALF * batch * tokens.joint * config.inner_dim / device.bandwidth
    found = []
    for count, both in zip(schedule.blocks, halves, strict=True):
        is_whole = count == schedule.num_layers
        found.append(
            outside
            + count * (block if both else half)
            + (0.0 if is_whole and both else (schedule.kept_steps + 2) * stream)
        )
    return found


def with_ceilings(device: Device, measured: Mapping[str, Any]) -> Device:
    """The device with ceilings measured on one of its kind in place of the stated ones.

    Args:
        device: a described device.
        measured: TFLOP/s under ``bf16``, ``fp8``, ``int8`` and GB/s under ``bandwidth`` and ``link``; any of them. The
            GPU gate writes such a file (``python -m benchmarks.gpu``: ``ceilings.json``).

    Raises:
        ValueError: a key or value that is none of these.
    """
    units = {"bf16": TERA, "fp8": TERA, "int8": TERA, "bandwidth": GIGA, "link": GIGA}
    for name, value in measured.items():
        if name not in units or isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"ceiling {name}={value!r}: expected TFLOP/s of bf16, fp8, int8 or GB/s of bandwidth, link, above 0"
            )
    changes: dict[str, Any] = {name: value * units[name] for name, value in measured.items()}
    return dataclasses.replace(device, **changes, source=f"measured {', '.join(changes)}; else {device.source}") if (
        changes
    ) else device  # fmt: skip


__all__ = [
    "SCHEMES", "UNQUANTIZED", "Part", "Scheme", "Streaming", "block_bytes", "parts", "schedule_seconds", "streaming",
    "with_ceilings",
]  # fmt: skip
