"""The described devices, which ``cogx-fast roofline`` reads as well: ``cogx_fast.measure.devices``."""

from cogx_fast.measure.devices import DEVICES, GIGA, TERA, Device, get_device

__all__ = ["DEVICES", "GIGA", "TERA", "Device", "get_device"]
