"""Packages that only some of this one needs: imported where used, missed with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRAS = {
    "diffusers": "pipelines", "transformers": "pipelines", "huggingface_hub": "hub",
    "imageio": "video", "imageio_ffmpeg": "video", "PIL": "video", "matplotlib": "plot",
    "sklearn": "quality", "skimage": "quality",
}  # fmt: skip


class MissingDependencyError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def require(module: str, *, why: str) -> Any:
    """Import an optional package, or a module of it.

    Args:
        module: its name, as ``import`` takes it.
        why: what it is needed for, for the error: "to write videos".

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # it is there, but something that it needs is not: its own message is the better one
        wanted = ",".join(sorted({"pipelines", "video", _EXTRAS[package]} - {"hub"}))
        raise MissingDependencyError(f"{package} is needed {why}: pip install 'cogx-fast[{wanted}]'") from None


__all__ = ["MissingDependencyError", "require"]
