"""Runs Inductor's generated code on the CPU: the wrapper as it is, its kernels in Triton's interpreter.

For a process that has called ``interpreter.install`` and ``install``.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.numerics import interpreter
from benchmarks.numerics.library import Library

_PRODUCT = "_tem_fused__int_mm_"
"""In the names of Triton's products of int8."""
_WIDEST = 1 << 17
"""Elements of a widened block."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of the generated source: a planted fault."""

    pattern: str
    replacement: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How generated code is run."""

    candidate: int | None = None
    """Which of each kernel's configurations (modulo their number). None: the one with the fewest programs, its blocks
    widened beyond what a GPU would be given, which is faster here and computes the same."""
    edit: Edit | None = None


@dataclass
class Outcome:
    """What a run gave."""

    outputs: list[Any]
    launches: int = 0
    candidates: int = 1
    """Configurations of the kernel that has the most."""
    library: list[str] = field(default_factory=list)
    """Library calls, in order."""
    quantized: list[Any] = field(default_factory=list)
    """Of each product with quantized activations what it read of them, in order."""


class ChangedInput(RuntimeError):
    """The generated code wrote into an input of the graph."""


class NotInTheCode(ValueError):
    """An edit whose pattern the generated code does not hold."""


def run(source: str, names: Mapping[str, Any], inputs: Sequence[Any], settings: Settings | None = None) -> Outcome:
    """Run the code of one graph.

    Args:
        source: the wrapper with its kernels, as generated.
        names: what Inductor puts into the module besides (constants).
        inputs: the graph's, on the CPU: tensors and sizes.
        settings: how.

    Raises:
        NotInTheCode: the edit's pattern is not in the source.
        MemoryFault: a kernel touches what it must not.
        ChangedInput: an input was written.
    """
    settings = settings or Settings()
    outcome = Outcome(outputs=[])
    library = Library(outcome.library, outcome.quantized)
    module = _load(_edited(source, settings.edit))
    for kernel in _kernels(module):
        kernel.begin(settings, outcome)
    for name, value in names.items():
        vars(module).setdefault(name, value)
    module.empty_strided_cuda = module.empty_strided_cpu = unwritten
    module.extern_kernels = library.extern_kernels
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    call = module.call if hasattr(module, "call") else module.runner.call
    with torch.no_grad(), library:
        outcome.outputs = list(call(list(inputs)))
    for number, (value, was) in enumerate(zip(inputs, before, strict=True)):
        if isinstance(value, torch.Tensor) and not _same_bits(value, was):
            value.copy_(was)  # for the next run
            raise ChangedInput(f"input {number}, {tuple(value.shape)} {value.dtype}, was written")
    return outcome


def unwritten(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that is not a number until it is written; integers are large ones."""
    out = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
    elements = out.untyped_storage().nbytes() // out.element_size()
    out.as_strided((elements,), (1,)).view(torch.uint8).fill_(0xFF if dtype.is_floating_point else 0x7F)
    return out


class Kernel:
    """What the wrapper's ``kernel.run(…)`` calls in the place of Inductor's launcher."""

    def __init__(self, name: str, source: str) -> None:
        self._name, self._source = name, source
        self._tuner: Any = None
        self._settings, self._outcome = Settings(), Outcome(outputs=[])

    def begin(self, settings: Settings, outcome: Outcome) -> None:
        """For the launches that follow."""
        self._settings, self._outcome = settings, outcome

    def run(self, *arguments: Any, stream: Any = None, **named: Any) -> None:
        from torch._inductor.codecache import PyCodeCache
        from torch.utils._python_dispatch import _disable_current_modes

        if self._tuner is None:
            self._tuner = getattr(PyCodeCache.load(self._source), self._name)
        self._outcome.launches += 1
        self._outcome.candidates = max(self._outcome.candidates, len(self._tuner.configs))
        config = self._config(arguments)
        values, grid = self._tuner._interpret_args_grid(arguments, config)
        names = [name for name in self._tuner.fn.arg_names if name not in config.kwargs]
        bound = dict(zip(names, values, strict=True)) | dict(config.kwargs) | named
        with _disable_current_modes():
            if _PRODUCT in self._name:
                self._outcome.quantized.append(bound["arg_A"].clone())
            interpreter.run(self._tuner.fn, tuple(map(int, grid)), bound, races=True)

    def _config(self, arguments: tuple[Any, ...]) -> Any:
        configs = self._tuner.configs
        if self._settings.candidate is not None:
            return configs[self._settings.candidate % len(configs)]
        return self._widened(min(configs, key=lambda config: math.prod(self._grid(arguments, config))), arguments)

    def _widened(self, config: Any, arguments: tuple[Any, ...]) -> Any:
        from torch._inductor.runtime.hints import TRITON_MAX_BLOCK

        if "XBLOCK" not in config.kwargs:
            return config
        config = copy.deepcopy(config)
        row = math.prod(value for name, value in config.kwargs.items() if name.endswith("BLOCK") and name != "XBLOCK")
        if not any(name.startswith("R0_") for name in config.kwargs):  # the block holds whole rows
            row *= (self._tuner.size_hints or {}).get("r0_", 1)
        while (
            2 * config.kwargs["XBLOCK"] * row <= _WIDEST
            and 2 * config.kwargs["XBLOCK"] <= TRITON_MAX_BLOCK["X"]  # up to this a kernel may do without a mask
            and self._grid(arguments, config)[0] > 1
        ):
            config.kwargs["XBLOCK"] *= 2
        return config

    def _grid(self, arguments: tuple[Any, ...], config: Any) -> tuple[int, ...]:
        return tuple(map(int, self._tuner._interpret_args_grid(arguments, config)[1]))


def install() -> None:
    """Have generated modules make ``Kernel``s, for the rest of the process; and no device to be chosen."""
    from torch._inductor.async_compile import AsyncCompile

    def load(self: Any, name: str, source: str, device_str: str = "cuda") -> Kernel:
        return Kernel(name, source)

    AsyncCompile.triton = load  # type: ignore[method-assign]
    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.set_device = lambda index: None  # type: ignore[assignment]


def _load(source: str) -> Any:
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.load(source)


def _kernels(module: Any) -> Iterator[Kernel]:
    return (value for value in vars(module).values() if isinstance(value, Kernel))


def _edited(source: str, edit: Edit | None) -> str:
    if edit is None:
        return source
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#"))
    changed, count = re.subn(edit.pattern, edit.replacement, code)
    if not count:
        raise NotInTheCode(f"{edit.pattern!r} is nowhere in the generated code")
    return changed


def _same_bits(value: torch.Tensor, was: torch.Tensor) -> bool:
    return torch.equal(value.contiguous().view(torch.uint8), was.contiguous().view(torch.uint8))


__all__ = ["ChangedInput", "Edit", "NotInTheCode", "Outcome", "Settings", "install", "run", "unwritten"]
