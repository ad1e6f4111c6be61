"""Build the stand-in for this environment's torch, and load programs with it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.standin.cards import Card

NATIVE = Path(__file__).with_name("native")
LIBRARY = "libcuda.so.1"
"""All of it is in one library, under the driver's own name: whoever opens that finds the one that is loaded."""

_FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC")
_REPLACED = re.compile(r" U (cublas\w+|cudnnBackend\w+)")
"""What torch imports of the libraries that the stand-in is in the place of. The rest of cuDNN is left as it is: torch
asks it for its version."""
_TORCH_LIBRARIES = ("libtorch_cuda.so", "libtorch_cuda_linalg.so", "libc10_cuda.so")
_COMPUTES = re.compile(r"cublas(?!Lt|Set)[SDCZI]\w+")


class StandinError(RuntimeError):
    """The stand-in cannot be built here; the message says what is missing."""


def build(out: Path) -> Path:
    """The folder with the stand-in for this environment's torch, which is built if it is not there.

    Args:
        out: where builds are kept, each under a name that its sources and torch's version give it.

    Raises:
        StandinError: no compiler, or no CUDA build of torch.
    """
    torch_home = _package("torch")
    sources = sorted(NATIVE.glob("*.[ch]"))
    identity = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, Path(__file__)]))
    identity.update((torch_home / "version.py").read_bytes())
    folder = out / identity.hexdigest()[:16]
    if (folder / LIBRARY).exists():
        return folder
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise StandinError(f"{tool} is not there: install gcc and binutils")
    if not (torch_home / "lib" / "libtorch_cuda.so").exists():
        raise StandinError("torch here is not a CUDA build: use the environment that `make test-cuda-standin` sets up")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as working:
        _compile(Path(working), torch_home / "lib")
        if not folder.exists():
            Path(working).rename(folder)
            Path(working).mkdir()  # which is then removed
    return folder


def environment(folder: Path, card: Card, devices: int = 1) -> dict[str, str]:
    """The variables of a process that runs on the stand-in instead of a GPU.

    Args:
        folder: of ``build``.
        card: what it is.
        devices: how many of it.
    """
    searched = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        **card.environment(devices),
        "LD_PRELOAD": str(folder / LIBRARY),
        "LD_LIBRARY_PATH": os.pathsep.join(searched),
        "CPATH": os.pathsep.join(map(str, _includes())),  # as where a toolkit is installed: AOTInductor's C++ takes it
        "LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the process itself: what is asked of the device is in one journal
    }


def _compile(folder: Path, torch_lib: Path) -> None:
    flags = [*_FLAGS, *(f"-I{path}" for path in _includes())]
    objects = []
    for source in sorted(NATIVE.glob("*.c")):
        objects.append(folder / f"{source.stem}.o")
        _run("gcc", "-c", *flags, source, "-o", objects[-1])
    generated = folder / "generated.c"
    generated.write_text(_remaining(objects, torch_lib))
    _run("gcc", "-shared", *flags, f"-Wl,-soname,{LIBRARY}", *objects, generated, "-o", folder / LIBRARY, "-ldl")
    (folder / "libcuda.so").symlink_to(LIBRARY)  # as programs that Triton and AOTInductor link find it


def _remaining(objects: list[Path], torch_lib: Path) -> str:
    """C of the functions that torch imports and nothing of ours defines: they succeed, and what computes is noted."""
    defined = set(re.findall(r" [TD] (\w+)", _run("nm", *objects)))
    wanted: set[str] = set()
    for name in _TORCH_LIBRARIES:
        wanted |= set(_REPLACED.findall(_run("nm", "-D", torch_lib / name)))
    lines = ["void standin_work(void *stream, const char *format, ...);"]
    for name in sorted(wanted - defined):
        note = f'standin_work(0, "library {name}"); ' if _COMPUTES.fullmatch(name) else ""
        lines.append(f"int {name}(void) {{ {note}return 0; }}")
    return "\n".join([*lines, ""])


def _includes() -> list[Path]:
    """The toolkit's headers, as far as wheels bring them: CUDA's own, and those among Triton's that these include."""
    return [_package("nvidia") / "cu13" / "include", _package("triton") / "backends" / "nvidia" / "include"]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise StandinError(f"the package {name} is not there: install the CUDA build of torch")
    return Path(next(iter(spec.submodule_search_locations)))


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StandinError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout
