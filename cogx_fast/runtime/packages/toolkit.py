"""What packages are built with: a C++ compiler and, for CUDA, the toolkit's headers and the driver's library."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_USED = "#include <cuda.h>\n#include <cuda_runtime.h>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
"""What the code that AOTInductor generates includes."""
_HEADERS = {"13": "nvidia-cuda-runtime nvidia-cuda-crt", "12": "nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12"}


@contextmanager
def build_tools(device: torch.device) -> Iterator[None]:
    """See that generated code can be built for a device, and have torch build it with what was found.

    For CUDA that is the toolkit that torch knows (``CUDA_HOME``, ``nvcc``, ``/usr/local/cuda``), else what wheels in
    this environment bring: NVIDIA's headers, Triton's where those lack some, and the driver's library of this process.

    Raises:
        ValueError: a compiler, headers or the driver's library is missing; the message says where they were looked for.
    """
    compiler = _compiler()
    if device.type != "cuda" or torch.version.hip is not None:
        yield
        return
    from torch.utils import cpp_extension

    known = cpp_extension.CUDA_HOME
    if known is not None and _failure(compiler, Path(known)) is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="cogx-fast-toolkit-") as folder:
        includes, driver = _wheels(), _driver()
        _put_together(Path(folder), includes, driver)
        failure = _failure(compiler, Path(folder))
        if failure is not None:
            raise ValueError(_missing(failure, known, includes, driver))
        cpp_extension.CUDA_HOME = folder  # which torch reads anew for each thing that it builds
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = known


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler as error:
        raise ValueError(
            "packages are made with a C++ compiler, and there is none: install g++ or clang++, or name one in the "
            "environment variable CXX (running a package needs none)"
        ) from error


def _failure(compiler: str, home: Path) -> str | None:
    """Why a library with the toolkit's headers and the driver's functions cannot be built, or None."""
    paths = [f"-I{home / 'include'}"] if home != Path("/usr") else []  # where compilers look by themselves
    paths += [f"-L{home / name}" for name in ("lib64", "lib64/stubs", "lib", "lib/stubs")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "used.cpp")
        source.write_text(_USED)
        made = ["-shared", "-fPIC", str(source), "-o", str(Path(folder, "used.so")), *paths, "-lcuda"]
        done = subprocess.run([compiler, *made], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
    return (lines or done.stderr.splitlines() or ["the compiler failed"])[0].strip()


def _wheels() -> list[Path]:
    """Folders of the toolkit's headers in this environment, NVIDIA's before Triton's."""
    found: list[Path] = []
    for package, patterns in (
        ("nvidia", ("cu[0-9]*/include", "cuda_*/include")),
        ("triton", ("backends/nvidia/include",)),
    ):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec is not None else ():
            found += [path for pattern in patterns for path in sorted(Path(root).glob(pattern))]
    return found


def _driver() -> Path | None:
    """The driver's library that this process has loaded; it may be there without the name that linkers look for."""
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:
        return None
    return next((Path(word) for word in mapped if Path(word).name.startswith("libcuda.so")), None)


def _put_together(folder: Path, includes: list[Path], driver: Path | None) -> None:
    """A toolkit of links: the headers, each from the first that has it, and the driver's library."""
    (folder / "include").mkdir()
    (folder / "lib64").mkdir()
    for entry in (entry for include in includes for entry in sorted(include.iterdir())):
        link = folder / "include" / entry.name
        if not link.exists():
            link.symlink_to(entry)
    if driver is not None:
        (folder / "lib64" / "libcuda.so").symlink_to(driver)


def _missing(failure: str, known: str | None, includes: list[Path], driver: Path | None) -> str:
    major = (torch.version.cuda or "").partition(".")[0]
    wheels = _HEADERS.get(major, _HEADERS["13"])
    named = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
    toolkit = f"{known} ({named or 'found by itself'})" if known else "no toolkit (CUDA_HOME is not set)"
    return (
        "packages for CUDA are built with the CUDA toolkit's headers and libcuda.so, and a trial failed: "
        f"{failure}. Looked in: {toolkit}; wheels: {', '.join(map(str, includes)) or 'none with headers'}; the driver: "
        f"{driver or 'libcuda.so is not loaded'}. Install the headers (pip install {wheels}), or the toolkit and set "
        "CUDA_HOME before Python starts; libcuda.so comes with the GPU's driver (running a package needs none of these)"
    )


__all__ = ["build_tools"]
