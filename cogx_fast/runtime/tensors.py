"""A block's weights as plain tensors, which compiled code takes: a quantized weight is several.

A sharded one (DTensor) counts as plain: it is whole when compiled code takes it.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

OTHER_WEIGHTS = "the weights are not those that the package is for any more: {} changed; export a package for them"


class Weights:
    """The plain tensors of a block, read at every call. What torch walks a module for is noted once.

    Args:
        block: its weights may be changed, or replaced by others of the kind; then they are noted again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = (block,)  # in a tuple, so that nothing takes it for a part of itself
        self._kind = hash_block(block)
        self._note()

    def read(self) -> list[Tensor]:
        """The weights as they are now, in the order of ``leaves``.

        Raises:
            ValueError: they were replaced by others that are not of the kind.
        """
        held = [member for members in self._members for member in members.values()]
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            if hash_block(self._block[0]) != self._kind:
                raise ValueError(OTHER_WEIGHTS.format("their names, shapes, dtypes or quantization"))
            self._note()
        return [get(tensor) for get, tensor in self._leaves]

    def _note(self) -> None:
        block = self._block[0]
        self._members = [
            members for part in block.modules() for members in (part._modules, part._parameters, part._buffers)
        ]
        self._held = [member for members in self._members for member in members.values()]
        self._leaves = _leaves(block)


def leaves(block: nn.Module) -> list[Tensor]:
    """Every weight of a block as plain tensors, in a fixed order."""
    return [get(tensor) for get, tensor in _leaves(block)]


def hash_block(block: nn.Module) -> str:
    """A name for a kind of block: names, shapes, dtypes and quantization of its weights."""
    text = "\n".join(f"{name} {_describe(tensor)}" for name, tensor in named_weights(block))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named_weights(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers."""
    yield from block.named_parameters()
    yield from block.named_buffers()


def unflatten(like: Any, values: Iterator[Tensor]) -> Tensor:
    """A tensor of the kind of ``like`` from plain ones, in the order of ``leaves``."""
    if not is_wrapper(like):
        return next(values)
    names, context = like.__tensor_flatten__()
    inner = {name: unflatten(getattr(like, name), values) for name in names}
    rebuilt: Tensor = type(like).__tensor_unflatten__(inner, context, like.shape, like.stride())
    return rebuilt


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of, in the order in which ``unflatten`` takes them; a plain one alone."""
    return [operator.attrgetter(path)(tensor) if path else tensor for path in _paths(tensor)]


def _leaves(block: nn.Module) -> list[tuple[Callable[[Any], Tensor], Tensor]]:
    """For each plain tensor the weight that it is, or is a part of, and what takes it from there."""
    return [
        (operator.attrgetter(path) if path else _itself, tensor)
        for _, tensor in named_weights(block)
        for path in _paths(tensor)
    ]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _paths(tensor: Any, prefix: str = "") -> Iterator[str]:
    """Where in a weight its plain tensors are, as attributes with dots between; a plain one is all of itself."""
    if not is_wrapper(tensor):
        yield prefix.removesuffix(".")
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _paths(getattr(tensor, name), f"{prefix}{name}.")


def is_wrapper(tensor: Any) -> bool:
    """Whether a weight is made of other tensors."""
    return hasattr(type(tensor), "__tensor_flatten__") and not hasattr(tensor, "full_tensor")


def _describe(tensor: Any) -> str:
    if not is_wrapper(tensor):
        return f"{tensor.dtype} {tuple(tensor.shape)}"
    names, context = tensor.__tensor_flatten__()
    inner = ", ".join(f"{name}: {_describe(getattr(tensor, name))}" for name in names)
    return f"{type(tensor).__name__}({inner}; {context})"


__all__ = [
    "OTHER_WEIGHTS",
    "Weights",
    "hash_block",
    "is_wrapper",
    "leaves",
    "named_weights",
    "plain_tensors",
    "unflatten",
]
