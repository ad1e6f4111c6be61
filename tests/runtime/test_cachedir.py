"""A cache directory that cannot be written to costs one warning, not the run."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cogx_fast.runtime.cachedir import CacheDirectory, storage_error
from cogx_fast.runtime.compile import CompileConfig, compile_model
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
    model = CogVideoXModel(small("2b", num_layers=2, attention_head_dim=16)).eval()
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
