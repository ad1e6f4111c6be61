"""Triton's interpreter made right, fast enough and strict, for kernels as Inductor generates them.

For a process that was started with ``TRITON_INTERPRET=1``; ``install`` changes Triton's interpreter for all of it.
Written for triton 3.7 and torch 2.13. A file a subject:

- ``rounding``: to bf16 and fp8 as a GPU rounds; arithmetic on both.
- ``dot``: products of bf16, fp8, tf32 and int8.
- ``reductions``: reductions by a kernel's own function.
- ``libdevice``: CUDA's mathematical functions.
- ``memory``: every access lies in the buffer that its pointer came from.
- ``races``: programs of one launch do not touch what another one writes.
- ``launch``: the programs of one launch, one after the other.
"""

from __future__ import annotations

from benchmarks.numerics.interpreter import dot, launch, libdevice, memory, reductions, rounding
from benchmarks.numerics.interpreter.launch import run
from benchmarks.numerics.interpreter.memory import MEMORY, MemoryFault


def install() -> None:
    """Correct the interpreter, for the rest of the process.

    Raises:
        RuntimeError: Triton was imported without ``TRITON_INTERPRET=1``, so it does not interpret.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("start the process with TRITON_INTERPRET=1, which Triton reads when it is imported")
    for subject in (rounding, dot, libdevice, reductions, memory, launch):
        subject.install()


__all__ = ["MEMORY", "MemoryFault", "install", "run"]
