"""Whether code runs as it stands, or is traced for a graph."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether this very code is part of what torch compiles or exports.

    ``torch.compiler.is_compiling()`` is true in all threads of the process while one of them compiles (torch 2.13).
    """
    return bool(torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting())


__all__ = ["is_traced"]
