"""What every test session shares: one compiled run of the demo, one package."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each, in their children too; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else each process with a new cache builds eleven libraries, in 8 s, to see which of the processor's vectors g++ knows.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def flags() -> dict[str, Any]:
    """torch's process-wide flags, as far as they are there yet; whether compiled code is found hangs on them."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    found = {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill uninitialized memory": torch.utils.deterministic.fill_uninitialized_memory,
    }
    backends = torch.backends
    for name, group in {"cuda.matmul": backends.cuda.matmul, "cudnn.conv": backends.cudnn.conv}.items():
        found[f"{name}.fp32_precision"] = group.fp32_precision
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        found[f"cuda.matmul.{name}"] = getattr(backends.cuda.matmul, name)
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        if name in sys.modules:
            found |= {f"{name}.{key}": value for key, value in sys.modules[name].get_config_copy().items()}
    return found


@pytest.fixture(autouse=True, scope="module")
def flags_stay_as_they_were() -> Iterator[None]:
    """A file that leaves a flag of torch changed would make others fail, by the order in which they happen to run."""
    before = flags()
    yield
    after = flags()
    changed = [f"{key}: {before[key]!r} is now {after[key]!r}" for key in before if before[key] != after.get(key)]
    assert not changed, "; ".join(changed)


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_looked_through_once() -> Iterator[None]:
    """What torch's compiler keeps for the session, millions of objects, made a third of the time that of collecting."""
    yield
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Finished:
    """A run of the command line."""

    status: int
    out: str
    err: str


def run_cli(*arguments: str | Path) -> Finished:
    """The command line in this process, as if piped."""
    from cogx_fast.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Finished(status, out.getvalue(), err.getvalue())


def report(finished: Finished) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert finished.status == 0, finished.err
    assert finished.out.count("\n") == 1
    return json.loads(finished.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """A short compiled run of ``cogx-fast demo --json``, and where it wrote."""
    out = tmp_path_factory.mktemp("demo")
    return run_cli("demo", "--steps", "4", "--rounds", "1", "--out", out, "--json"), out


@dataclass(frozen=True)
class Package:
    """A package of two small blocks in fp32, made by the command line, and the checkpoint that it was made with."""

    path: Path
    checkpoint: Path
    facts: dict[str, Any]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """``cogx-fast export`` of a small 5b."""
    from tests.support import small, upstream

    directory = tmp_path_factory.mktemp("package")
    upstream(small("5b", num_attention_heads=1)).save_pretrained(directory / "model")
    finished = run_cli(
        "export", directory / "model", "--out", directory / "m.pt2", "--sizes", "1x16x16,13x128x128", "--json"
    )
    return Package(directory / "m.pt2", directory / "model", report(finished))
