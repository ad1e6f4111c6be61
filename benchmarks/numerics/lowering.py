"""Lowers a module for the described GPU, by the gate's own code, and finds what the generated code is to run on.

The module is there twice: with values on the CPU, and as fake tensors of the GPU. The second is compiled; for each
input of its graphs the first one's value is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.codegen import inductor
from benchmarks.codegen.report import CodegenError


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of generated code."""

    source: str
    names: Mapping[str, Any]
    """What the generated module holds besides what its source says."""
    inputs: tuple[Any, ...]
    """Of the graph, on the CPU."""


class Lowered:
    """A module compiled for the described GPU, called with fake tensors; each call is noted, none is run.

    Args:
        options: Inductor options besides the gate's.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._capture = inductor.Capture()
        self._values: dict[Any, Tensor] = {}
        self._kept: list[Any] = []
        self._calls: list[Call] = []
        self.compile = inductor.compiler(self._capture, self._stand_in)
        """As ``torch.compile``."""
        torch._dynamo.reset()

    @property
    def graphs(self) -> int:
        """How many were generated."""
        return len(self._capture.graphs)

    def pair(self, real: Any, fake: Any) -> None:
        """Modules, or arguments, that are the same but for values.

        Raises:
            CodegenError: they are not.
        """
        values, fakes = dict(_tensors(real)), dict(_tensors(fake))
        if values.keys() != fakes.keys():
            raise CodegenError(f"values without their fake, or the other way round: {values.keys() ^ fakes.keys()}")
        for name, value in values.items():
            one, other = ((each.shape, each.stride(), each.dtype) for each in (value, fakes[name]))
            if one != other:
                raise CodegenError(f"{name} is {one} with values and {other} without")
            self._values[_place(fakes[name])] = value
        self._kept.append((real, fake))  # values are found by their fakes' memory

    def call(self, compiled: Any, fakes: tuple[Any, ...]) -> Call:
        """Call what ``compile`` made.

        Raises:
            CodegenError: it was not one call of one graph.
        """
        self._calls.clear()
        with inductor.lowering(self._capture, lambda lowered: None, self._options), torch.no_grad():
            compiled(*fakes)
        if len(self._calls) != 1:
            raise CodegenError(f"the module made {len(self._calls)} calls of generated code, expected 1")
        return self._calls[0]

    def _stand_in(self, outputs: list[Any]) -> Any:
        source, module, _ = self._capture.graphs[-1]
        names = vars(module)

        def run(inputs: list[Any]) -> list[Any]:
            self._calls.append(Call(source=source, names=names, inputs=tuple(map(self._value, inputs))))
            inputs.clear()
            return [_like(output) for output in outputs]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _value(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return int(item)
        if _place(item) not in self._values:
            raise CodegenError(f"an input of the graph, {tuple(item.shape)} {item.dtype}, is none of the module's")
        return self._values[_place(item)]


def _place(tensor: Tensor) -> Any:
    """Equal for tensors of the same values: the model detaches some of what it is given."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _like(output: Any) -> Any:
    """What dynamo is given for a result: of no size where that is symbolic, for nobody looks at it."""
    if not isinstance(output, Tensor):
        return output
    sizes = output.shape if all(isinstance(size, int) for size in output.shape) else (0,)
    return torch.empty(sizes, dtype=output.dtype, device=output.device)


def _tensors(item: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every plain tensor of a module or of arguments, also those that quantized weights and block masks are made of."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(item, torch.nn.Module):
        for part, tensor in (*item.named_parameters(), *item.named_buffers()):
            yield from _tensors(tensor, f"{name}.{part}")
    elif hasattr(type(item), "__tensor_flatten__") and not isinstance(item, FakeTensor):
        for part in item.__tensor_flatten__()[0]:
            yield from _tensors(getattr(item, part), f"{name}.{part}")
    elif isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, tuple | list):
        for number, part in enumerate(item):
            yield from _tensors(part, f"{name}.{number}")
    elif type(item).__name__ == "BlockMask":
        for part, value in vars(item).items():
            if isinstance(value, Tensor):
                yield f"{name}.{part}", value
        yield from _tensors(_captured(item.mask_mod), f"{name}.mask_mod")


def _captured(function: Any) -> tuple[Any, ...]:
    """What a mask's function has captured."""
    cells = getattr(function, "__closure__", None) or ()
    return tuple(cell.cell_contents for cell in cells)


__all__ = ["Call", "Lowered"]
