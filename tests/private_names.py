"""Run in a fresh interpreter by test_architecture: a torch whose private names have all been renamed, for this package.

What cogx_fast, quant and nothing else sees of torch has no attribute and no module with an underscore before its name;
with that, the package is imported, and loads and runs a small model, with and without gradients.

    python private_names.py [STATEMENTS…]

Statements are run as if they stood in the package: those that use a private name are refused. Prints, as JSON, those
that are not.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import sys
import types
from typing import Any

import torch

OURS = ("cogx_fast", "quant")
real_import = builtins.__import__


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


class Renamed(types.ModuleType):
    """A module of torch without its private names."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__)
        self.__dict__["renamed"] = module

    def __getattr__(self, name: str) -> Any:
        if is_private(name):
            raise AttributeError(f"{self.__name__}.{name} is private: it has another name now")
        return seen(getattr(self.__dict__["renamed"], name))


def seen(value: Any) -> Any:
    is_torch = isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "torch"
    return Renamed(value) if is_torch and not isinstance(value, Renamed) else value


def import_renamed(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """``__import__``, which gives the package's own files the renamed torch."""
    importer = (globals or {}).get("__name__", "")
    is_theirs = isinstance(fromlist, list)  # torch's C++, in the name of its caller; statements pass tuples
    if is_theirs or importer.split(".")[0] not in OURS or level or name.split(".")[0] != "torch":
        return real_import(name, globals, locals, fromlist, level)
    for wanted in (name, *(fromlist or ())):
        if is_private(wanted):
            raise ImportError(f"{importer} imports {wanted} of {name}, which is private: it has another name now")
    return seen(real_import(name, globals, locals, fromlist, level))


def main() -> None:
    builtins.__import__ = import_renamed
    import cogx_fast

    config = cogx_fast.TransformerConfig(
        num_attention_heads=1, num_layers=2, text_embed_dim=8, max_text_seq_length=4, time_embed_dim=16,
        sample_height=4, sample_width=4, sample_frames=5, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    from cogx_fast.runtime.module import CogVideoXModel

    model = cogx_fast.load(CogVideoXModel(config), dtype="fp32")
    latents, text = torch.randn(1, 2, config.in_channels, 4, 4), torch.randn(1, 4, 8)
    with torch.no_grad():
        assert model(latents, text, 500).sample.isfinite().all()
    model(latents, text, 500).sample.sum().backward()

    accepted = []
    for statements in sys.argv[1:]:
        with contextlib.suppress(AttributeError, ImportError):
            exec(statements, {"__name__": "cogx_fast.planted"})
            accepted.append(statements)
    print(json.dumps(accepted))


if __name__ == "__main__":
    del sys.path[0]  # this folder, where quant is a package of tests
    main()
