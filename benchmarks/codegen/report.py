"""What is said of a case: every launch with its bytes, operations and machine code, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cogx_fast.measure.devices import Device

Kind = Literal["pointwise", "reduction", "persistent", "template", "extern"]


class CodegenError(RuntimeError):
    """A report that would not be true, or could not be made; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One compiled configuration of a Triton kernel. Which one runs is timed on the device, so it is not known here."""

    config: Mapping[str, int]
    registers: int
    """A thread."""
    local_bytes: int
    """A thread's local memory: what does not fit in registers is spilled there."""
    shared_bytes: int
    """A block's shared memory."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a generated kernel, or one call of a library's.

    Bytes: each element of memory that the launch must read counts once, and each that it writes once, however often
    the code touches it; so a view counts its own part of a buffer, and a broadcast what is stored. Library calls and
    templates count their inputs and outputs, attention without its repeated reads of keys and values. Attention
    under a block mask counts as dense: which blocks are empty is known at run time.
    """

    name: str
    """The generated kernel's name, or the library's operator."""
    kind: Kind
    read_bytes: int
    written_bytes: int
    flops: int = 0
    """Of matrix products and attention, a multiplication and an addition counted as two."""
    products: Literal["bf16", "fp8", "int8"] = "bf16"
    exponentials: int = 0
    """Of attention."""
    attention: bool = False
    ptx: str = ""
    """Hash of the candidates' code without names and line information; empty for library calls."""
    candidates: tuple[Candidate, ...] = ()

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    @property
    def identity(self) -> str:
        """Its name, bytes and code in a line: what changed when a total did."""
        code = f", code {self.ptx}" if self.ptx else ""
        return f"{self.name}: {self.read_bytes / 1e6:.1f} MB read, {self.written_bytes / 1e6:.1f} MB written{code}"

    def predicted_seconds(self, device: Device) -> float:
        """The least time that the device's stated ceilings allow."""
        return max(
            self.bytes / device.bandwidth,
            self.flops / device.peak(self.products) if self.flops else 0.0,
            self.exponentials / device.exponentials,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """One case on one device."""

    case: str
    device: str
    layers: int
    versions: Mapping[str, str]
    """Of torch, triton and ptxas, which the machine code depends on."""
    real: bool
    """Compiled for the machine's own GPU instead of a described one."""
    launches: tuple[Launch, ...]
    """In the order of the generated code."""
    graphs: int
    inductor_bytes: int
    """Inductor's own count, ``num_bytes_accessed``: a view is charged as its whole buffer at most."""
    seconds: float
    """Spent compiling."""
    source: str = ""
    """Hash of the generated code, wrapper and kernels."""

    @property
    def triton(self) -> tuple[Launch, ...]:
        """The generated kernels' launches."""
        return tuple(launch for launch in self.launches if launch.kind != "extern")

    @property
    def triton_launches(self) -> int:
        """How many of them."""
        return len(self.triton)

    @property
    def kinds(self) -> Counter[str]:
        """Launches by kind."""
        return Counter(launch.kind for launch in self.launches)

    @property
    def extern_calls(self) -> Counter[str]:
        """Library calls by operator."""
        return Counter(launch.name for launch in self.launches if launch.kind == "extern")

    @property
    def attention(self) -> str:
        """Which kernels compute attention: the library's operator, or ``template``."""
        names = sorted(
            {launch.name if launch.kind == "extern" else launch.kind for launch in self.launches if launch.attention}
        )
        return "+".join(names) or "none"

    @property
    def bytes(self) -> int:
        """Read and written by all launches, counted as ``Launch`` says."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        """Of all launches."""
        return sum(launch.flops for launch in self.launches)

    def _over(self, attribute: str, pick: Any) -> int:
        """The largest over kernels of the picked (``min``: best, ``max``: worst) of each kernel's candidates."""
        return max((pick(getattr(c, attribute) for c in launch.candidates) for launch in self.triton), default=0)

    @property
    def metrics(self) -> dict[str, int | str]:
        """What is gated: numbers, less is better, and words. Spills and registers are of the neediest kernel, with its
        best and its worst candidate.
        """
        return {
            "triton_launches": self.triton_launches,
            "extern_calls": sum(self.extern_calls.values()),
            "attention": self.attention,
            "bytes": self.bytes,
            "inductor_bytes": self.inductor_bytes,
            "flops": self.flops,
            "registers_best": self._over("registers", min),
            "registers_worst": self._over("registers", max),
            "spilled_bytes_best": self._over("local_bytes", min),
            "spilled_bytes_worst": self._over("local_bytes", max),
            "shared_bytes_worst": self._over("shared_bytes", max),
        }

    def predicted_seconds(self, device: Device) -> float:
        """A prediction, not a measurement: one run of the module, each launch at the device's stated ceilings."""
        return sum(launch.predicted_seconds(device) for launch in self.launches)

    def predicted_step_seconds(self, device: Device) -> float:
        """A prediction: all layers' runs; embedding, modulation and head are not in it."""
        return self.layers * self.predicted_seconds(device)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Back from ``to_dict``."""
        launches = tuple(
            Launch(**{**launch, "candidates": tuple(Candidate(**item) for item in launch["candidates"])})
            for launch in data["launches"]
        )
        return cls(**{**data, "launches": launches})
