"""What the cases share: models on the stand-in device, and what a call of them made it do."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cogx_fast
from benchmarks.standin import journal
from benchmarks.standin.journal import Journal
from cogx_fast.runtime.module import CogVideoXModel
from tests.support import inputs, small

GIB = 1024**3
CALLS: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}


def model(
    preset: str = "5b", *, device: str = "cuda", dtype: torch.dtype | None = torch.bfloat16, **options: Any
) -> CogVideoXModel:
    """A small model as ``cogx_fast.load`` makes it from files: ``options`` are its own; two layers, for inference."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), preset)
        made = cogx_fast.load(folder, device=device, dtype=dtype, **{"attention": "sdpa", **options})
    return made.requires_grad_(False)


def checkpoint(folder: Path, preset: str = "5b", **changes: Any) -> Path:
    """A small model's files."""
    torch.manual_seed(0)
    CogVideoXModel(small(preset, **changes)).save_pretrained(folder)
    return folder


def call(model: CogVideoXModel, *, grad: bool = False, **options: Any) -> Journal:
    """One call; what the device was asked for during it. ``options`` are ``tests.support.inputs``'s."""
    arguments = inputs(model.config, **{"dtype": model.dtype, "device": str(model.device), **options})
    journal.clear()
    with torch.set_grad_enabled(grad):
        (sample,) = model(**arguments, return_dict=False)
    assert sample.shape == (*arguments["hidden_states"].shape[:2], model.config.out_channels, *sample.shape[3:])
    assert sample.device == model.device
    return journal.read()


@contextmanager
def peak_bytes(device: int = 0) -> Iterator[list[int]]:
    """Torch's own count of the bytes above what is held at the start: the list gets it at the end."""
    gc.collect()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    peak: list[int] = []
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device) - held)
