"""CUDA's libdevice, by numpy: the interpreter has no such functions.

Correctly rounded or nearly so, where a GPU's are within a unit or two in the last place (``exp2.approx``, ``rsqrt``).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as ti

from benchmarks.numerics.interpreter.rounding import Handle

_erf = np.frompyfunc(math.erf, 1, 1)

FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "rsqrt": lambda x: 1 / np.sqrt(x), "frsqrt_rn": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt, "fsqrt_rn": np.sqrt,
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "pow": np.power, "erf": lambda x: _erf(x).astype(x.dtype),
    "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "nearbyint": np.rint,
    "llrint": lambda x: np.rint(x).astype(np.int64), "abs": np.abs, "fabs": np.abs, "fmod": np.fmod,
    "fma": lambda x, y, z: x * y + z, "div_rn": np.divide, "fdiv_rn": np.divide,
    "isnan": np.isnan, "isinf": np.isinf, "signbit": np.signbit,
}  # fmt: skip
"""By libdevice's names, without ``__nv_`` and the ``f`` of those for fp32."""


def _call(self: Any, library: str, path: str, symbol: str, arguments: list[Handle], type_: Any, pure: bool) -> Handle:
    name = symbol.removeprefix("__nv_")
    function = FUNCTIONS.get(name) or FUNCTIONS.get(name.removesuffix("f"))
    if function is None:
        raise NotImplementedError(f"libdevice's {symbol} is not known here: add it to FUNCTIONS")
    out = function(*(argument.data for argument in arguments))
    return Handle(out.astype(ti._get_np_dtype(type_.scalar)), type_.scalar)


def _interpreted() -> Any:
    """libdevice as kernels import it, bound to the interpreter."""

    def bind(function: Any) -> Any:
        return lambda *arguments: function(*arguments, _semantic=ti.interpreter_semantic)

    members = vars(cuda_libdevice).items()
    return types.SimpleNamespace(**{name: bind(member) for name, member in members if tl.core.is_builtin(member)})


def install() -> None:
    from torch._inductor.runtime import triton_helpers

    ti.InterpreterBuilder.create_extern_elementwise = _call
    triton_helpers.libdevice = _interpreted()


__all__ = ["FUNCTIONS", "install"]
