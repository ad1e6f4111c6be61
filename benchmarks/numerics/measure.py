"""One case: lowered for the described GPU, run on the CPU, and held against eager execution.

For a process that is described as that GPU and whose interpreter is installed (``worker``).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.codegen import inductor
from benchmarks.codegen.report import CodegenError
from benchmarks.numerics import kernels, plain
from benchmarks.numerics.cases import Case, Size, without_values
from benchmarks.numerics.kernels import Outcome, Settings
from benchmarks.numerics.lowering import Call, Lowered
from benchmarks.numerics.report import Figures, Result
from cogx_fast.measure.devices import Device
from cogx_fast.measure.dtypes import default_dtype


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One size of a case: the code, and what it should compute."""

    size: Size
    call: Call
    graphs: int
    """Generated so far."""
    stream: Tensor | None
    """What a block adds to, which hides errors: the relative ones are of what it adds."""
    exact: tuple[Tensor, ...]
    """fp32, eager, the weights rounded to the case's dtype but not quantized."""
    eager: tuple[Tensor, ...]
    """Eager, in the case's dtype and recipe."""
    plain: Callable[[plain.Rows], Tensor] | None
    """Of a block: fp32, with the roundings of its dtype and recipe where the generated code has them."""


def measure(case: Case, device: Device) -> list[Result]:
    """Run a case with every size; with every configuration, if it asks for that."""
    results = []
    start = time.process_time()
    for prepared in prepare(case, device):
        first = run(prepared, Settings(candidate=0 if case.every_candidate else None))
        outcomes = [first]
        if case.every_candidate:
            outcomes += [run(prepared, Settings(candidate=number)) for number in range(1, first.candidates)]
        found = [judge(prepared, outcome) for outcome in outcomes]
        figures = {name: max(each[name] for each in found) for name in found[0]}
        seconds, start = time.process_time() - start, time.process_time()
        results.append(
            Result(
                case=case.name, size=str(prepared.size), figures=figures, graphs=prepared.graphs,
                launches=first.launches, library=len(first.library), candidates=len(outcomes),
                source=inductor.hash_of_source(prepared.call.source), seconds=round(seconds, 2),
            )
        )  # fmt: skip
    return results


def run(prepared: Prepared, settings: Settings) -> Outcome:
    """Run the code of a prepared size."""
    return kernels.run(prepared.call.source, prepared.call.names, prepared.call.inputs, settings)


def judge(prepared: Prepared, outcome: Outcome) -> Figures:
    """The errors of what the generated code gave.

    Raises:
        CodegenError: it gave another number of results.
    """
    if len(outcome.outputs) != len(prepared.exact):
        raise CodegenError(f"the code gave {len(outcome.outputs)} results, expected {len(prepared.exact)}")
    return {
        "error": _worst(outcome.outputs, prepared.exact, prepared.stream),
        "eager": _worst(prepared.eager, prepared.exact, prepared.stream),
        "rounded": 0.0 if prepared.plain is None else _rounded(outcome, prepared.plain, prepared.stream),
    }


def _rounded(outcome: Outcome, compute: Callable[[plain.Rows], Tensor], stream: Tensor | None) -> float:
    """The distance from the same roundings done plainly: of the result, or of what was quantized on the way."""
    rows = plain.Rows(outcome.quantized)
    expected = compute(rows)
    return max(rows.distance, _relative(outcome.outputs[0], expected, stream))


def _worst(outputs: Any, expected: tuple[Tensor, ...], stream: Tensor | None) -> float:
    return max(_relative(output, wanted, stream) for output, wanted in zip(outputs, expected, strict=True))


def _relative(output: Tensor, expected: Tensor, stream: Tensor | None) -> float:
    """The error's norm in parts of what was added to the stream; infinite where something is not a number."""
    if output.shape != expected.shape or not output.isfinite().all():
        return float("inf")
    added = expected.double() - (0.0 if stream is None else stream.double())
    return float((output.double() - expected.double()).norm() / added.norm())


def prepare(case: Case, device: Device) -> Iterator[Prepared]:
    """Lower a case; each of its sizes in turn, none run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with default_dtype(getattr(torch, case.dtype)):
        model = case.model()
        wide = copy.deepcopy(model)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.device("cuda"):
            fake_model = case.model()
            fake = case.module(fake_model)
        real = case.module(model)
        wide = _in_fp32_case(case).module(wide.float())
    lowered = Lowered(case.options)
    lowered.pair(real, fake)
    compiled = _as_the_model_is(fake_model, lowered) if case.is_symbolic else lowered.compile(fake, dynamic=False)
    for size in case.sizes:
        arguments = case.arguments(size)
        inductor.state_sdpa(case.sdpa_of(device))
        with ExitStack() as stack:
            stack.enter_context(mode)
            stack.enter_context(default_dtype(getattr(torch, case.dtype)))
            fakes = without_values(arguments)
            lowered.pair(arguments, fakes)
            call = lowered.call(compiled, fakes)
        yield _expected(case, size, call, lowered.graphs, real, wide, arguments)


def _in_fp32_case(case: Case) -> Case:
    """The same, neither rounded nor quantized."""
    return dataclasses.replace(case, recipe=None, dtype="float32")


def _as_the_model_is(model: Any, lowered: Lowered) -> Any:
    """The first block as a compiled model calls it: by its runner, which says which sizes are symbolic."""
    from cogx_fast.measure.explain.capture import unbacked_sizes_of_fake_tensors
    from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model

    compile_model(model, CompileConfig(), compiler=lowered.compile)

    def call(*arguments: Any) -> Any:
        with unbacked_sizes_of_fake_tensors():
            return model.runner.slots.call_block(0, model.transformer_blocks[0])(*arguments)

    return call


def _expected(
    case: Case, size: Size, call: Call, graphs: int, real: Any, wide: Any, arguments: tuple[Any, ...]
) -> Prepared:
    with torch.no_grad(), inductor.own_sdpa():
        exact = wide(*_in_fp32(arguments))
        eager = real(*arguments)
    is_block = case.part == "block"
    return Prepared(
        size=size, call=call, graphs=graphs, exact=_tuple(exact), eager=_tuple(eager),
        stream=arguments[0] if is_block else None,
        plain=functools.partial(plain.block, real, getattr(torch, case.dtype), arguments) if is_block else None,
    )  # fmt: skip


def _in_fp32(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(item.float() if isinstance(item, Tensor) and item.is_floating_point() else item for item in arguments)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


__all__ = ["Prepared", "judge", "measure", "prepare", "run"]
