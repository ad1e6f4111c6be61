"""Which blocks one graph holds for, and functions that torch keeps the graphs of apart."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cogx_fast.runtime.tensors import is_wrapper

_serial = itertools.count()


def kind_of(block: nn.Module) -> Any:
    """Equal for blocks that one graph holds for: the same modules with weights of the same types, dtypes and shapes.

    So a model whose blocks are quantized in different ways has as many graphs as ways, and none counts as a recompile.
    """
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    return modules, tuple((name, tensor.requires_grad, *_kind_of_tensor(tensor)) for name, tensor in tensors)


def _kind_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    kind: tuple[Any, ...] = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if is_wrapper(tensor):  # holds other tensors: a quantized one
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # such a one has that
        inner = ((name, getattr(tensor, name)) for name in names)
        kind += (repr(context), tuple((name, _kind_of_tensor(value)) for name, value in inner))
    return kind


def own(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function with a code object and a name of its own.

    Dynamo keeps what it compiled and counts recompiles by code object, and remembers which sizes changed by the
    function's name: so each kind of block of each model has its own, and none starts with the limits or sizes of
    another of the process.

    Args:
        function: a plain one.
        name: the copy's, in front of a number; ``explain`` and torch's own messages show it.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{name}_{next(_serial)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, None, function.__closure__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copy


__all__ = ["kind_of", "own"]
