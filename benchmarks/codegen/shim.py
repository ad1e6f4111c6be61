"""The one piece of C++ that builds of torch for CPUs need (``guard.cpp``), built once by the machine's compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.codegen.report import CodegenError

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual ones that is there."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def cache_folder() -> Path:
    """Where built things are kept between runs: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogx-fast"


def guard() -> Path:
    """The shared library, built if this version of torch has none yet.

    Raises:
        CodegenError: there is no compiler, or it fails.
    """
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    told = f"{torch.__version__} {platform.machine()} {torch._C._GLIBCXX_USE_CXX11_ABI} {SOURCE.read_text()}"
    library = cache_folder() / f"guard-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    command = compiler()
    if command is None:
        raise CodegenError("a C++ compiler is needed once: install g++ or clang++, or name one in $CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / "guard.so"
        flags = [
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        ]
        paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        made = subprocess.run(
            [command, *flags, str(SOURCE), *paths, "-lc10", "-o", str(built)], capture_output=True, text=True
        )
        if made.returncode:
            raise CodegenError(f"{command} could not build {SOURCE.name}:\n{made.stderr}")
        os.replace(built, library)
    return library
