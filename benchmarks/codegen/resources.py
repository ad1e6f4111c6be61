"""Registers and memory of compiled kernels, and the identity of their code, by the tools that triton brings."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path


def tool(name: str) -> Path:
    """One of the CUDA programs in triton's package."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def ptxas_version() -> str:
    """As "12.8.93"."""
    said = subprocess.run([tool("ptxas"), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+(?:\.\d+)+)", said)
    return found[1] if found else "unknown"


@functools.cache
def of_machine_code(code: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as a driver reports them when it loads the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(tool("cuobjdump")), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {said!r}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def hash_of_ptx(texts: list[str], kernel: str) -> str:
    """The same for the same instructions on every machine: without comments, line information, debug sections (which
    hold paths) and the kernel's name (which holds its place in the graph).
    """
    digest = hashlib.sha256()
    for text in texts:
        code = text.split(".section", 1)[0].replace(kernel, "kernel")
        code = re.sub(r"//[^\n]*", "", code)
        lines = (" ".join(line.split()) for line in code.splitlines())
        digest.update("\n".join(line for line in lines if line and not line.startswith((".loc", ".file"))).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
