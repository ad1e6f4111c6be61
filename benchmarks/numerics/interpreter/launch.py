"""One launch: a kernel's programs one after the other, on tensors in memory."""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti

from benchmarks.numerics.interpreter.memory import MEMORY, mark

_LANGUAGE: Any = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
"""What is bound to the interpreter for a launch: kernels see ``tl``, the language's own functions ``core``."""


def run(function: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, races: bool = False) -> None:
    """Run a kernel.

    Args:
        function: a ``triton.jit`` function.
        grid: programs along (x, y, z).
        arguments: every parameter by name.
        races: look for programs that touch what another one writes.

    Raises:
        MemoryFault: an access outside of a buffer, or a race.
    """
    grid = (*grid, 1, 1)[:3]
    body = function.rewrite()
    constexprs = ti.GridExecutor(body, function.arg_names, grid).constexprs
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    scope = ti._patch_lang(_LANGUAGE)
    try:
        converted = {}
        for name, value in arguments.items():
            converted[name] = value if name in constexprs else ti._implicit_cvt(value)
            if isinstance(value, torch.Tensor):
                mark(converted[name].handle, value)
        ti.interpreter_builder.set_grid_dim(*grid)
        with np.errstate(all="ignore"), MEMORY.launch(function.__name__, tensors, races=races):
            for program in range(math.prod(grid)):
                MEMORY.program = program
                x, rest = program % grid[0], program // grid[0]
                ti.interpreter_builder.set_grid_idx(x, rest % grid[1], rest // grid[1])
                body(**converted)
    finally:
        scope.restore()


def _call_bound(self: Any, *arguments: Any, **named: Any) -> Any:
    """A device function; the interpreter would bind the whole language anew at each call."""
    return self.rewrite()(*arguments, **named)


def install() -> None:
    ti.InterpretedFunction.__call__ = _call_bound


__all__ = ["install", "run"]
