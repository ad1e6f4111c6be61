"""GPUs as data: what the compiler asks about a device, and the ceilings that its vendor states.

Every ceiling is a published peak, not a measurement; what a kernel reaches is lower. Properties are those of the CUDA
programming guide's table of compute capabilities and of ``cudaGetDeviceProperties``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KIB, MIB, GIB = 1024, 1024**2, 1024**3
TERA, GIGA = 10**12, 10**9

PCIE_X16 = {"PCIe 3.0 × 16": 15.75 * GIGA, "PCIe 4.0 × 16": 31.51 * GIGA, "PCIe 5.0 × 16": 63.02 * GIGA}
"""Bytes a second in one direction: 8, 16 and 32 GT/s a lane, encoded as 128b/130b (PCI-SIG)."""
PCIE_SHARE = 0.8
"""Of that, what one copy from pinned memory is taken to reach, for packets have headers. An assumption."""

EXPONENTIALS_A_CLOCK = 16
"""Special functions that one multiprocessor starts in a clock (CUDA programming guide, arithmetic throughput, for
compute capabilities 8.0 to 10.0)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU model."""

    name: str
    """As ``torch.cuda.get_device_name`` gives it."""
    capability: tuple[int, int]
    """Compute capability, (major, minor)."""
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_per_multiprocessor: int
    """Bytes."""
    shared_per_block: int
    """Bytes that one block can get when it asks (``shared_memory_per_block_optin``)."""
    l2_bytes: int
    memory_bytes: int
    clock_khz: int
    """The highest clock the driver reports."""
    memory_clock_khz: int
    memory_bus_bits: int
    boost_hz: float
    """The clock behind the stated peaks."""
    bf16: float
    """Dense bf16 operations a second, accumulated in fp32."""
    fp8: float | None
    """Dense fp8 operations a second, accumulated in fp32; None: not supported."""
    int8: float
    """Dense int8 operations a second."""
    bandwidth: float
    """Bytes a second between the GPU and its memory."""
    link: float
    """Bytes a second that one GPU can send to others of its kind while it receives as many."""
    source: str
    """Where the ceilings are stated."""
    link_latency: float = 0.0
    """Seconds that a collective takes however little it sends (``mesh.LINKS``)."""

    @property
    def arch(self) -> int:
        """90 for compute capability 9.0."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def exponentials(self) -> float:
        """Exponentials a second of the special-function units."""
        return EXPONENTIALS_A_CLOCK * self.multiprocessors * self.boost_hz

    def peak(self, kind: str) -> float:
        """Operations a second of "bf16", "fp8" or "int8" products.

        Raises:
            ValueError: the device has no such products.
        """
        rates = {"bf16": self.bf16, "fp8": self.fp8, "int8": self.int8}
        rate = rates.get(kind)
        if rate is None:
            raise ValueError(
                f"{self.name} states no peak for {kind!r}: use one of {[k for k, v in rates.items() if v]}"
            )
        return rate


_HOPPER: dict[str, Any] = {
    "capability": (9, 0), "multiprocessors": 132, "threads_per_multiprocessor": 2048,
    "shared_per_multiprocessor": 228 * KIB, "shared_per_block": 227 * KIB, "l2_bytes": 50 * MIB,
    "clock_khz": 1_980_000, "boost_hz": 1.83e9, "bf16": 989.4 * TERA, "fp8": 1978.9 * TERA, "int8": 1978.9 * TERA,
    "link": 450 * GIGA,
}  # fmt: skip
_ADA: dict[str, Any] = {
    "capability": (8, 9), "threads_per_multiprocessor": 1536, "shared_per_multiprocessor": 100 * KIB,
    "shared_per_block": 99 * KIB, "memory_bus_bits": 384, "boost_hz": 2.52e9, "link": 32 * GIGA,  # PCIe 4.0 × 16
}  # fmt: skip

DEVICES: dict[str, Device] = {
    "h100": Device(
        **_HOPPER,
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=85_029_158_912,
        memory_clock_khz=2_619_000,
        memory_bus_bits=5120,
        bandwidth=3352 * GIGA,
        source="NVIDIA H100 Tensor Core GPU data sheet and architecture paper, SXM5 (halves of the sparse rates)",
    ),
    "h200": Device(
        **_HOPPER,
        name="NVIDIA H200",
        memory_bytes=141 * GIGA,
        memory_clock_khz=3_201_000,
        memory_bus_bits=6144,
        bandwidth=4800 * GIGA,
        source="NVIDIA H200 Tensor Core GPU data sheet, SXM (halves of the sparse rates)",
    ),
    "a100": Device(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        threads_per_multiprocessor=2048,
        shared_per_multiprocessor=164 * KIB,
        shared_per_block=163 * KIB,
        l2_bytes=40 * MIB,
        memory_bytes=80 * GIB,
        clock_khz=1_410_000,
        memory_clock_khz=1_593_000,
        memory_bus_bits=5120,
        boost_hz=1.41e9,
        bf16=312 * TERA,
        fp8=None,
        int8=624 * TERA,
        bandwidth=2039 * GIGA,
        link=300 * GIGA,
        source="NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM",
    ),
    "b200": Device(
        name="NVIDIA B200",
        capability=(10, 0),
        multiprocessors=148,
        threads_per_multiprocessor=2048,
        shared_per_multiprocessor=228 * KIB,
        shared_per_block=227 * KIB,
        l2_bytes=126 * MIB,
        memory_bytes=180 * GIGA,
        clock_khz=1_965_000,
        memory_clock_khz=3_996_000,
        memory_bus_bits=8192,
        boost_hz=1.855e9,
        bf16=2250 * TERA,
        fp8=4500 * TERA,
        int8=4500 * TERA,
        bandwidth=7700 * GIGA,
        link=900 * GIGA,
        source="NVIDIA HGX B200 data sheet, one of eight GPUs (halves of the sparse rates)",
    ),
    "rtx3060": Device(
        name="NVIDIA GeForce RTX 3060",
        capability=(8, 6),
        multiprocessors=28,
        threads_per_multiprocessor=1536,
        shared_per_multiprocessor=100 * KIB,
        shared_per_block=99 * KIB,
        l2_bytes=3 * MIB,
        memory_bytes=12 * GIB,
        clock_khz=2_100_000,
        memory_clock_khz=7_501_000,
        memory_bus_bits=192,
        boost_hz=1.777e9,
        bf16=25.5 * TERA,
        fp8=None,
        int8=101.9 * TERA,
        bandwidth=360 * GIGA,
        link=32 * GIGA,  # PCIe 4.0 × 16
        source="NVIDIA Ampere GA102 paper's rates of a multiprocessor (accumulation in fp32), times 28 at 1.777 GHz",
    ),
    "l40": Device(
        **_ADA,
        name="NVIDIA L40",
        multiprocessors=142,
        l2_bytes=96 * MIB,
        memory_bytes=48 * GIB,
        clock_khz=2_490_000,
        memory_clock_khz=9_001_000,
        bf16=181.05 * TERA,
        fp8=362 * TERA,
        int8=362 * TERA,
        bandwidth=864 * GIGA,
        source="NVIDIA L40 data sheet (the rates without sparsity)",
    ),
    "l40s": Device(
        **_ADA,
        name="NVIDIA L40S",
        multiprocessors=142,
        l2_bytes=96 * MIB,
        memory_bytes=48 * GIB,
        clock_khz=2_520_000,
        memory_clock_khz=9_001_000,
        bf16=362.05 * TERA,
        fp8=733 * TERA,
        int8=733 * TERA,
        bandwidth=864 * GIGA,
        source="NVIDIA L40S data sheet (the rates without sparsity)",
    ),
    "rtx4090": Device(
        **_ADA,
        name="NVIDIA GeForce RTX 4090",
        multiprocessors=128,
        l2_bytes=72 * MIB,
        memory_bytes=24 * GIB,
        clock_khz=2_520_000,
        memory_clock_khz=10_501_000,
        bf16=165.2 * TERA,
        fp8=330.3 * TERA,
        int8=660.6 * TERA,
        bandwidth=1008 * GIGA,
        source="NVIDIA Ada GPU architecture paper, appendix A (accumulation in fp32, without sparsity)",
    ),
}
"""Devices by short name."""


def get_device(name: str) -> Device:
    """The described device of that short name.

    Raises:
        ValueError: there is none.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not described: choose one of {', '.join(DEVICES)}, or add it here")
    return DEVICES[name]


def find_device(name: str) -> Device | None:
    """The device that ``torch.cuda.get_device_name`` calls so, if it is described."""
    return next((device for device in DEVICES.values() if device.name == name), None)


__all__ = [
    "DEVICES", "GIB", "GIGA", "KIB", "MIB", "PCIE_SHARE", "PCIE_X16", "TERA", "Device", "find_device", "get_device"
]  # fmt: skip
