"""A cache directory that cannot be written to costs one warning, not the run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model
from cogx_fast.runtime.compiling.torch_cache import CacheDirectory, storage_error
from cogx_fast.runtime.module import CogVideoXModel
from tests.support import inputs, relative_error, small


def compile_and_call(model: CogVideoXModel, arguments: dict[str, Any]) -> torch.Tensor:
    compile_model(model, CompileConfig())
    output: torch.Tensor = model(**arguments).sample
    return output


def test_a_model_runs_where_the_cache_directory_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory under a file fails for root, too."""
    (tmp_path / "file").touch()
    unwritable = str(tmp_path / "file" / "cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", unwritable)
    model = tiny()
    arguments = inputs(model.config)
    with torch.no_grad():
        expected = model(**arguments).sample
        with pytest.warns(UserWarning, match="cache directory cannot be written to") as caught:
            actual = compile_and_call(model, arguments)
        assert relative_error(actual, expected) <= 1e-5
        assert len([each for each in caught if "cache directory" in str(each.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**arguments)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == unwritable


def test_a_full_disk_is_tried_once_more_elsewhere() -> None:
    directories = []

    def compile() -> str:
        directories.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        if len(directories) == 1:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/a.so")
            except OSError as error:
                raise RuntimeError("backend failed") from error
        return "compiled"

    with pytest.warns(UserWarning, match="No space left"):
        assert CacheDirectory().retried(compile) == "compiled"
    assert directories[0] != directories[1]


def test_other_errors_are_none_of_storage() -> None:
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "no such file", "g++"), None):
        assert storage_error(error) is None
    with pytest.raises(ZeroDivisionError):
        CacheDirectory().retried(lambda: 1 // 0)


@pytest.mark.slow
def test_a_disk_that_is_full_while_torch_writes_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real compilation; the first directory takes nothing from where the compiler writes code on."""
    from torch._inductor import codecache

    write, refused = codecache.write_atomic, []

    def write_or_fail(path: str | Path, *rest: Any, **options: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *rest, **options)

    monkeypatch.setattr(codecache, "write_atomic", write_or_fail)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = torch.compile(lambda x: x.sin() * 2 + 1, fullgraph=True)
    x = torch.randn(64)
    with pytest.warns(UserWarning, match="No space left") as caught:
        actual = CacheDirectory().retried(run, x)
    assert refused, "the compiler wrote nothing: this test holds nothing"
    assert len([each for each in caught if "cache directory" in str(each.message)]) == 1
    torch.testing.assert_close(actual, x.sin() * 2 + 1)


# -- interrupted, and shared -------------------------------------------------------------------------------------------

CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent in the background has it ignore
import torch
from torch._dynamo.callback import callback_handler
from tests.runtime.test_torch_cache import compile_and_call, tiny
from tests.support import inputs, relative_error
torch.manual_seed(0)
model = tiny()
arguments = inputs(model.config)
with torch.no_grad():
    expected = model(**arguments).sample
    callback_handler.register_start_callback(lambda _: print("compiling", flush=True))
    print(relative_error(compile_and_call(model, arguments), expected), flush=True)
"""


def tiny() -> CogVideoXModel:
    return CogVideoXModel(small("2b", num_layers=2, attention_head_dim=16)).eval()


def start(cache_dir: Path) -> subprocess.Popen[str]:
    """A process that compiles with that cache directory, in a group of its own, as a terminal has it."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache_dir), "TRITON_CACHE_DIR": str(cache_dir / "triton")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("moment", ["traced", "built"])
def test_processes_that_share_a_directory_where_another_was_interrupted(moment: str, tmp_path: Path) -> None:
    """Ctrl-C reaches the process and the C++ compiler that it runs; then two processes at once compile there."""
    interrupted = start(tmp_path)
    assert interrupted.stdout is not None
    assert interrupted.stdout.readline() == "compiling\n"
    while moment == "built" and not any(tmp_path.rglob("*.cpp")) and interrupted.poll() is None:
        time.sleep(0.02)
    os.killpg(interrupted.pid, signal.SIGINT)
    _, errors = interrupted.communicate(timeout=600)
    assert interrupted.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
    together = [start(tmp_path), start(tmp_path)]
    for process in together:
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors
        assert float(output.split()[-1]) <= 1e-5
