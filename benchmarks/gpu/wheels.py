"""What a GPU machine without a network lacks, as wheels in folders of bounded size (``make gpu-wheels``).

    python -m benchmarks.gpu.wheels [--out .wheels] [--python 3.12] [--piece 60] [--have FILE]

By default for a machine with torch, transformers and what they need: diffusers, torchao and what they need beyond that.
``--have`` names a list of what is there instead, one ``name==version`` a line (``pip list --format=freeze``): then all
that this project needs and that is not there in its tested version, but torch, triton and CUDA, which must be there.
There, for each piece (the wheels need no index and no compiler):

    python3 -m pip install --no-index --no-deps --target SITE PIECE/*.whl
    export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from benchmarks import ROOT

WANTED = ("diffusers", "torchao", "safetensors", "numpy", "psutil", "pytest", "pytest-benchmark", "pytest-timeout",
          "matplotlib", "pillow")  # fmt: skip
"""What the package, the gate and the tests marked gpu import, beside torch."""
NEVER = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|pytorch-triton.*)$")
PRESENT = (
    "accelerate", "anyio", "certifi", "charset-normalizer", "contourpy", "cycler", "filelock", "fonttools", "fsspec",
    "h11", "hf-xet", "httpcore", "httpx", "huggingface-hub", "idna", "iniconfig", "jinja2", "kiwisolver", "matplotlib",
    "numpy", "packaging", "pillow", "pluggy", "psutil", "py-cpuinfo", "pygments", "pyparsing", "pytest",
    "pytest-benchmark", "python-dateutil", "pyyaml", "regex", "requests", "safetensors", "setuptools", "six", "tqdm",
    "transformers", "typing-extensions", "urllib3", "zipp",
)  # fmt: skip
"""What a machine set up for transformers has."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux_2_5_x86_64", "manylinux1_x86_64")  # fmt: skip


def fetch(folder: Path, python: str) -> list[Path]:
    """Download the wheels of what is wanted and of all that it needs, in this project's tested versions.

    Args:
        folder: where they go.
        python: the version of the Python that is to run them, "3.12"; on Linux x86-64.

    Raises:
        ValueError: there is no wheel of one.
    """
    versions = folder / "constraints.txt"
    pinned = constraints((ROOT / "constraints.txt").read_text(), python)
    versions.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", python, *(f"--platform={each}" for each in PLATFORMS),
        "--constraint", str(versions), "--dest", str(folder), *WANTED,
    ]  # fmt: skip
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise ValueError(f"no wheels for Python {python}: {child.stderr.strip()}")
    return sorted(folder.glob("*.whl"))


def missing(wheels: Iterable[str], present: Mapping[str, str]) -> list[str]:
    """Those that must go there.

    Args:
        wheels: names of files.
        present: versions of packages that are there, by name; empty where it is not known and taken to do.
    """
    known = {canonicalize_name(name): version for name, version in present.items()}
    parsed = {wheel: parse_wheel_filename(wheel)[:2] for wheel in wheels}
    return [
        wheel
        for wheel, (name, version) in parsed.items()
        if not NEVER.match(name) and known.get(name, "none") not in ("", str(version))
    ]


def constraints(text: str, python: str) -> dict[str, str]:
    """Versions by name, those that hold for that Python."""
    found = {}
    for line in text.splitlines():
        stripped = line.partition("#")[0].strip()
        if stripped:
            each = Requirement(stripped)
            if each.marker is None or each.marker.evaluate({"python_version": python}):
                found[str(canonicalize_name(each.name))] = str(each.specifier).removeprefix("==")
    return found


def pieces(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Files in as few groups as come easily, none above that many bytes.

    Raises:
        ValueError: one file is larger alone.
    """
    groups: list[tuple[int, list[str]]] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size > most:
            raise ValueError(f"{name} has {size / 1e6:.0f} MB alone, more than a piece of {most / 1e6:.0f} MB may have")
        place = next((index for index, (held, _) in enumerate(groups) if held + size <= most), None)
        if place is None:
            groups.append((size, [name]))
        else:
            groups[place] = (groups[place][0] + size, [*groups[place][1], name])
    return [names for _, names in groups]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels", metavar="DIR", help="default: .wheels")
    parser.add_argument("--python", default="3.12", help="that it has (default: %(default)s)")
    parser.add_argument("--piece", type=float, default=60, metavar="MIB", help="largest folder (default: %(default)s)")
    parser.add_argument("--have", type=Path, metavar="FILE", help="what is there: name==version, one a line")
    options = parser.parse_args(arguments)
    present = dict.fromkeys(PRESENT, "")
    if options.have is not None:
        lines = (line.strip().partition("==") for line in options.have.read_text().splitlines())
        present = {name: version for name, _, version in lines if name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            sizes = {wheel.name: wheel.stat().st_size for wheel in fetch(Path(folder), options.python)}
            groups = pieces({name: sizes[name] for name in missing(sizes, present)}, int(options.piece * 1024**2))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        shutil.rmtree(options.out, ignore_errors=True)
        for number, names in enumerate(groups, start=1):
            place = options.out / f"piece-{number}"
            place.mkdir(parents=True)
            for name in names:
                shutil.move(Path(folder) / name, place / name)
            size = sum(path.stat().st_size for path in place.iterdir())
            print(f"{place}: {size / 1024**2:.1f} MiB: {', '.join(sorted(names))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
