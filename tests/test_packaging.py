"""The wheel: built from the checkout, installed elsewhere, and used from there. Nothing is fetched."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cogx_fast
from tests.cases import for_each

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cogx_fast", "quant")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that sees neither the checkout nor PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    child = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, f"{command} exited {child.returncode}\n{child.stdout}\n{child.stderr}"
    return child.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel in it, which borrows the dependencies of this one."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=home)
    # A folder that a .pth file names joins sys.path, but its own .pth files (an editable install) are not read.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1])}
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (purelib / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return home


def test_the_version_is_the_same_everywhere(wheel, installed):
    code = "import cogx_fast, importlib.metadata as m; print(cogx_fast.__version__, m.version('cogx-fast'))"
    version = cogx_fast.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", version)
    assert wheel.name.split("-")[1] == version
    assert run(installed / "bin" / "python", "-c", code, cwd=installed).split() == [version, version]


def test_the_wheel_holds_every_file_of_both_packages_and_no_other(wheel):
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if "__pycache__" not in path.parts and path.name != ".DS_Store"
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {f"{package}/py.typed" for package in PACKAGES} <= held
    assert sorted(held) == sorted(expected)


def test_the_wheel_names_its_licence_and_its_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        (licence,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/LICENSE"))
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert licence == (ROOT / "LICENSE").read_text()


def test_both_packages_are_imported_from_where_they_were_installed(installed):
    code = "import cogx_fast, quant; print(cogx_fast.__file__); print(quant.__file__)"
    for path in run(installed / "bin" / "python", "-c", code, cwd=installed.parent).split():
        assert Path(path).is_relative_to(installed)
        assert Path(path).with_name("py.typed").is_file()


def test_the_console_script_gives_help(installed):
    assert "usage" in run(installed / "bin" / "cogx-fast", "--help", cwd=installed.parent).lower()


@for_each("python", ["3.10", "3.11", "3.12"])
def test_the_constraints_pin_every_dependency_once_and_within_its_range(python):
    def requirements(lines):
        parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
        return [item for item in parsed if not item.marker or item.marker.evaluate({"python_version": python})]

    pinned = requirements((ROOT / "constraints.txt").read_text().splitlines())
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    assert len(versions) == len(pinned)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lines in [project["dependencies"], *project["optional-dependencies"].values()]:
        for needed in requirements(lines):
            if needed.name != project["name"]:
                assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), needed
