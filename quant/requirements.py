"""What a recipe or scheme needs of a machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant.errors import QuantError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A device, how new it must be, and packages that must be installed. Empty: everything will do.

    Raises:
        QuantError: the capability is no "major.minor".
    """

    device: str | None = None
    """A device type, e.g. "cuda"."""
    compute_capability: str | None = None
    """Lowest CUDA compute capability, e.g. "8.9"."""
    packages: tuple[str, ...] = ()
    """Import names."""

    def __post_init__(self) -> None:
        if self.compute_capability is not None:
            if self.device != "cuda":
                raise QuantError(f"compute_capability is given with device {self.device!r}: it is for device 'cuda'")
            _version(self.compute_capability)

    def unmet(self, device: torch.device) -> str | None:
        """What is missing there, in words, or None."""
        if self.device is not None and device.type != self.device:
            return f"it needs {self}, and the model is on {device}"
        if self.compute_capability is not None:
            import torch

            found = torch.cuda.get_device_capability(device)
            if found < _version(self.compute_capability):
                return f"it needs {self}, and {device} has {found[0]}.{found[1]}"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"it needs {', '.join(missing)}, not installed: pip install {' '.join(missing)}"
        return None

    def __str__(self) -> str:
        device = {"cuda": "CUDA"}.get(self.device or "", self.device)
        capability = f" ≥ {self.compute_capability}" if self.compute_capability else ""
        return " with ".join([*([f"{device}{capability}"] if device else []), *self.packages]) or "any device"


ANY = Requirement()


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise QuantError(f"compute_capability is {text!r}, expected a string such as '8.9'")
    return int(major), int(minor)


__all__ = ["ANY", "Requirement"]
