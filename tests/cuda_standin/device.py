"""What the cases share: models on the stand-in device, and what a call of them made it do."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cogx_fast
from benchmarks.standin import journal
from benchmarks.standin.journal import Journal
from cogx_fast.config import PRESETS
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.module import CogVideoXModel
from tests.support import AROUND, inputs, small

GIB = 1024**3
EVERY_CARD = ("t4", "a100", "rtx3060", "rtx4060", "rtx4090", "h100", "b200")
TENSOR_CARDS = EVERY_CARD[1:]
"""With bf16 products and flash attention: compute capability 8.0 and more."""
FAST = CompileConfig(mode="default")
"""Compiled without timing candidates, which is most of the time that compiling takes."""
FEW_CANDIDATES = {"test_configs.max_mm_configs": 2}
"""Options of a mode that times: of what Triton would try, so many for each product. The library's stay."""
IS_ONE_APART = torch.__version__ < "2.12"
"""torch cannot be told that a batch is 1 or more: one has a graph of its own."""
STOPS_AT_VIEWS = torch.__version__ < "2.12"
"""torch joins nothing to a product that reads its result as another shape: the residual, where a block ends."""
BLOCK_PRODUCTS = 4
"""Of a block: query, key and value; attention's output; the feed-forward's two."""


def of_all_batches(scope: str = "block") -> tuple[int, int, int]:
    """Graphs, breaks and recompiles of calls with several batches, one among them."""
    parts = 1 + AROUND * (scope == "block")
    again = parts if IS_ONE_APART else 0
    return parts + again, 0, again


def model(
    preset: str = "5b",
    *,
    device: str = "cuda",
    dtype: Any = torch.bfloat16,
    sizes: Mapping[str, Any] | None = None,
    **options: Any,
) -> CogVideoXModel:
    """A small model as ``cogx_fast.load`` makes it from files, two layers, for inference; with ``load``'s options."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), preset, **(sizes or {}))
        made = cogx_fast.load(folder, device=device, dtype=dtype, **{"attention": "sdpa", **options})
    return made.requires_grad_(False)


def full_width(preset: str = "5b", *, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> CogVideoXModel:
    """A released model with one layer, its values unset."""
    with torch.device("meta"):
        made = CogVideoXModel(dataclasses.replace(PRESETS[preset], num_layers=1), attention=attention)
    return made.to(dtype).to_empty(device="cuda").eval().requires_grad_(False)


def checkpoint(folder: Path, preset: str = "5b", **changes: Any) -> Path:
    """A small model's files."""
    torch.manual_seed(0)
    CogVideoXModel(small(preset, **changes)).save_pretrained(folder)
    return folder


def call(model: CogVideoXModel, *, grad: bool = False, **options: Any) -> Journal:
    """One call, and what it asked the device for; ``options`` are those of ``tests.support.inputs``."""
    arguments = inputs(model.config, **{"dtype": model.dtype, "device": str(model.device), **options})
    journal.clear()
    with torch.set_grad_enabled(grad):
        (sample,) = model(**arguments, return_dict=False)
    latents = arguments["hidden_states"]
    assert sample.shape == (*latents.shape[:2], model.config.out_channels, *latents.shape[3:])
    assert sample.device == model.device
    return journal.read()


def attention_kernels(journal: Journal) -> Counter[str]:
    """How often each kind of attention kernel ran, or was recorded to run."""
    kinds = {
        "cudnn": "cudnnBackendExecute", "flash": "flash_fwd", "efficient": "fmha_cutlassF", "flex": "flex_attention",
        "flash-backward": "flash_bwd_dq_dk_dv", "efficient-backward": "fmha_cutlassB",
    }  # fmt: skip
    counted = {kind: sum(word in line for line in journal.lines) for kind, word in kinds.items()}
    counted["flash"] -= sum("flash_fwd_splitkv_combine" in line for line in journal.lines)  # a launch of its own
    counted["flex"] = sum("triton_tem" in line and "flex_attention" in line for line in journal.lines)
    return Counter({kind: count for kind, count in counted.items() if count})


def products(journal: Journal, *, width: int = 128) -> int:
    """The blocks' products of cuBLASLt, by their size: ``width`` is the model's."""
    sizes = {(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)}
    lines = [*journal.of("library"), *journal.of("library", captured=True)]
    shapes = [tuple(map(int, line.split()[2:7:2])) for line in lines if line.startswith("cublasLtMatmul")]
    tokens = {columns for rows, columns, _ in shapes if rows == 3 * width}  # the patch projection has fewer
    return sum((rows, depth) in sizes and columns in tokens for rows, columns, depth in shapes)


@contextmanager
def peak_bytes(device: int = 0) -> Iterator[list[int]]:
    """Torch's own count of the bytes above what is held at the start: the list gets it at the end."""
    gc.collect()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    peak: list[int] = []
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device) - held)
