"""What a package for CUDA is built with is looked for first, and what is missing is named."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from cogx_fast.runtime.packages.toolkit import build_tools
from tests.cases import for_each

CUDA = torch.device("cuda")
HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a toolkit and without wheels of its headers."""
    real = importlib.util.find_spec
    absent = ("nvidia", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    for name in ("CUDA_HOME", "CUDA_PATH", "CPATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)


def make_headers(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def make_driver(folder: Path) -> None:
    folder.mkdir(parents=True)
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", folder / "libcuda.so"], check=True)


def test_a_cpu_needs_no_toolkit() -> None:
    with build_tools(torch.device("cpu")):
        assert cpp_extension.CUDA_HOME is None


def test_what_is_missing_is_named_with_where_it_was_looked_for_and_how_to_get_it() -> None:
    wanted = r"cuda\.h.*Looked in: no toolkit \(CUDA_HOME is not set\); wheels: none.*pip install nvidia-cuda-runtime"
    with pytest.raises(ValueError, match=wanted), build_tools(CUDA):
        pytest.fail("it went on")


@for_each("lacking", HEADERS)
def test_a_toolkit_that_lacks_a_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    make_headers(tmp_path / "include", *(name for name in HEADERS if name != lacking))
    make_driver(tmp_path / "lib64")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"cuda.*Looked in: {tmp_path}"), build_tools(CUDA):
        pytest.fail("it went on")


def test_a_toolkit_without_the_drivers_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_headers(tmp_path / "include", *HEADERS)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec(tmp_path) if name == "nvidia" else None)
    (tmp_path / "cu13").mkdir()
    (tmp_path / "cu13" / "include").symlink_to(tmp_path / "include")
    with pytest.raises(ValueError, match=r"lcuda.*libcuda\.so is not loaded.*driver"), build_tools(CUDA):
        pytest.fail("it went on")


@for_each("folder", ["lib64", "lib64/stubs", "lib"])
def test_a_whole_toolkit_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    make_headers(tmp_path / "include", *HEADERS)
    make_driver(tmp_path / folder)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with build_tools(CUDA):
        assert str(tmp_path) == cpp_extension.CUDA_HOME


def test_headers_of_wheels_are_used_and_torchs_own_setting_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_headers(tmp_path / "cu13" / "include", *HEADERS)
    make_driver(tmp_path / "driver")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec(tmp_path) if name == "nvidia" else None)
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path / "driver"))
    with build_tools(CUDA):
        assert {path.name for path in Path(str(cpp_extension.CUDA_HOME), "include").iterdir()} == set(HEADERS)
    assert cpp_extension.CUDA_HOME is None


def spec(folder: Path) -> Any:
    found = importlib.util.spec_from_loader("nvidia", None)
    assert found is not None
    found.submodule_search_locations = [str(folder)]
    return found
