"""The stand-in device, as far as it can be seen without the CUDA build of torch; tests/cuda_standin runs on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.standin import journal
from benchmarks.standin.build import NATIVE, StandinError, build, environment
from benchmarks.standin.cards import CARDS, get_card
from benchmarks.standin.journal import Journal
from cogx_fast.measure.devices import DEVICES

ROOT = Path(__file__).resolve().parents[2]


def test_the_library_reads_the_variables_that_a_card_sets():
    read = set(re.findall(r'"(STANDIN_\w+)"', (NATIVE / "card.c").read_text()))
    assert read == set(CARDS["h100"].environment())


def test_cards_are_those_that_are_described_and_more():
    assert set(DEVICES) < set(CARDS)
    assert get_card("a100").environment(2)["STANDIN_CAPABILITY"] == "80"
    assert get_card("a100").environment(2)["STANDIN_DEVICES"] == "2"
    assert get_card("h100").with_memory(8).memory_bytes == 8 * 2**30
    with pytest.raises(ValueError, match=r"'gtx' is not described: choose one of .*t4"):
        get_card("gtx")


def test_a_process_gets_the_library_before_the_real_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.standin.build._package", lambda name: tmp_path / name)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    variables = environment(tmp_path, get_card("t4"), 2)
    assert variables["LD_PRELOAD"] == str(tmp_path / "libcuda.so.1")
    assert variables["LD_LIBRARY_PATH"] == f"{tmp_path}{os.pathsep}/elsewhere"


def test_a_cpu_build_of_torch_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.standin.build._package", lambda name: tmp_path)
    (tmp_path / "version.py").touch()
    with pytest.raises(StandinError, match=r"not a CUDA build: .*make test-cuda-standin"):
        build(tmp_path / "out")


def test_a_journal_is_read_by_kind():
    lines = """kernel _Zflash_fwd grid 1,1,1 block 128 device 0
captured triton fused_0 grid 8,1,1 block 128 device 1
triton fused_0 grid 8,1,1 block 128 device 1
library cublasLtMatmul m 1 n 2 k 3 type 14 epilogue 4
graph begin
graph end 7
graph launch 7
graph launch 7"""
    read = Journal(tuple(lines.splitlines()))
    assert read.kernels == {"_Zflash_fwd": 1}
    assert read.triton == {"fused_0": 1}
    assert read.library == {"cublasLtMatmul": 1}
    assert (read.recordings, read.replays) == ([7], [7, 7])
    assert read.devices == {0, 1}
    assert read.of("triton", captured=True) == ["fused_0 grid 8,1,1 block 128 device 1"]


def test_without_the_stand_in_its_journal_cannot_be_read():
    assert not journal.is_loaded()
    with pytest.raises(RuntimeError, match=r"python -m benchmarks\.standin"):
        journal.launches()


def test_the_default_tests_leave_its_suite_out():
    command = [sys.executable, "-m", "pytest", "tests/cuda_standin", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
