"""The described devices, which ``cogx-fast roofline`` reads as well: ``cogx_fast.devices``."""

from cogx_fast.devices import DEVICES, GIGA, TERA, Device, get_device

__all__ = ["DEVICES", "GIGA", "TERA", "Device", "get_device"]
