"""What a GPU machine without a network lacks, as wheels in folders of bounded size (``make gpu-wheels``).

    python -m benchmarks.gpu.wheels [--out .wheels] [--python 3.12] [--piece 60] [--have FILE]

By default for a machine with torch, transformers and what they need: diffusers, torchao and what they need beyond that.
``--have`` names a list of what is there instead, one ``name==version`` a line (``pip list --format=freeze``): then
everything that this project needs and that is not in it, but torch, triton and CUDA, which must be there. There, for
each piece (the wheels need no index and no compiler):

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
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
WANTED = (
    "diffusers",
    "torchao",
    "safetensors",
    "numpy",
    "psutil",
    "pytest",
    "pytest-benchmark",
    "matplotlib",
    "pillow",
)
"""What the package, the battery and the tests marked gpu import, beside torch."""
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


def needed(wanted: Iterable[str], present: Mapping[str, str], fetch: Fetch) -> list[Path]:
    """The wheels of some packages and of all that they need, but for what is present.

    Args:
        wanted: names of packages.
        present: versions of packages that are there, by name; empty where it is not known and taken to do.
        fetch: gives the wheel of a package.
    """
    known = {canonicalize_name(name): version for name, version in present.items()}
    queue = [Requirement(name) for name in wanted]
    found: dict[str, Path] = {}
    while queue:
        each = queue.pop(0)
        name = canonicalize_name(each.name)
        does = name in known and (not known[name] or each.specifier.contains(known[name], prereleases=True))
        if does or name in found or NEVER.match(name):
            continue
        found[name] = fetch(name)
        queue += requirements(found[name], fetch.python)
    return list(found.values())


def requirements(wheel: Path, python: str) -> list[Requirement]:
    """What a wheel needs on Linux with that Python, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "extra": "", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    parsed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [each for each in parsed if each.marker is None or each.marker.evaluate(environment)]


class Fetch:
    """Downloads wheels for a Python on Linux x86-64 in this project's tested versions.

    Args:
        folder: where they go.
        python: its version, "3.12".
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        self.versions = constraints((ROOT / "constraints.txt").read_text(), python)

    def __call__(self, name: str) -> Path:
        version = self.versions.get(name)
        before = set(self.folder.glob("*.whl"))
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
            "--only-binary=:all:", "--implementation", "cp", "--python-version", self.python,
            *(f"--platform={each}" for each in PLATFORMS),
            "--dest", str(self.folder), f"{name}=={version}" if version else name,
        ]  # fmt: skip
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise ValueError(f"no wheel of {name} {version or ''} for Python {self.python}: {child.stderr.strip()}")
        (wheel,) = set(self.folder.glob("*.whl")) - before
        return wheel


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
            found = needed(WANTED, present, Fetch(Path(folder), options.python))
            groups = pieces({wheel.name: wheel.stat().st_size for wheel in found}, int(options.piece * 1024**2))
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
