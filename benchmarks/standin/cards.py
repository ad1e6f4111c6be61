"""The GPU models that the stand-in can be: what the driver says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogx_fast.measure.devices import DEVICES, GIB, KIB, MIB, Device


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU model. The figures are NVIDIA's: data sheets, and the CUDA programming guide's table of capabilities."""

    name: str
    """As the driver gives it."""
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_per_multiprocessor: int
    """Bytes."""
    shared_per_block: int
    """Bytes that a block can get when it asks."""
    l2_bytes: int
    memory_bus_bits: int
    clock_khz: int
    memory_clock_khz: int

    @classmethod
    def of(cls, device: Device) -> Card:
        """The card that ``cogx_fast.measure.devices`` describes."""
        return cls(**{name: getattr(device, name) for name in cls.__dataclass_fields__})

    def with_memory(self, gib: float) -> Card:
        """The same with that much memory."""
        return replace(self, memory_bytes=int(gib * GIB))

    def environment(self, devices: int = 1) -> dict[str, str]:
        """The variables by which the stand-in is that card, ``devices`` times (native/card.c)."""
        major, minor = self.capability
        described = {name: getattr(self, name) for name in self.__dataclass_fields__}
        described |= {"capability": 10 * major + minor, "devices": devices}
        return {f"STANDIN_{name.upper()}": str(value) for name, value in described.items()}


CARDS: dict[str, Card] = {
    **{name: Card.of(device) for name, device in DEVICES.items()},
    "t4": Card(
        name="Tesla T4", capability=(7, 5), memory_bytes=16 * GIB, multiprocessors=40, threads_per_multiprocessor=1024,
        shared_per_multiprocessor=64 * KIB, shared_per_block=64 * KIB, l2_bytes=4 * MIB,
        memory_bus_bits=256, clock_khz=1_590_000, memory_clock_khz=5_001_000,
    ),
    "rtx4060": Card(
        name="NVIDIA GeForce RTX 4060", capability=(8, 9), memory_bytes=8 * GIB, multiprocessors=24,
        threads_per_multiprocessor=1536, shared_per_multiprocessor=100 * KIB, shared_per_block=99 * KIB,
        l2_bytes=24 * MIB, memory_bus_bits=128, clock_khz=2_460_000, memory_clock_khz=8_501_000,
    ),
}  # fmt: skip
"""Cards by short name: those of ``cogx_fast.measure.devices``, and some that it has no ceilings of."""


def get_card(name: str) -> Card:
    """The card of that short name.

    Raises:
        ValueError: there is none.
    """
    if name not in CARDS:
        raise ValueError(f"card {name!r} is not described: choose one of {', '.join(CARDS)}, or add it here")
    return CARDS[name]
