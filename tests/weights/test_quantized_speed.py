"""Loading a quantized checkpoint beside loading the original and quantizing it: the work, and the time in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cogx_fast
import quant
from cogx_fast.config import PRESETS
from cogx_fast.weights.quantized import inner_tensors, is_quantized
from tests.clock import Work
from tests.support import small
from tests.weights.support import WEIGHTS

SMALL = small("5b", num_attention_heads=16, num_layers=4, time_embed_dim=512)
LARGE = dataclasses.replace(PRESETS["5b"], num_layers=8)


def make(config: Any, directory: Path, recipe: str) -> tuple[Path, Path]:
    """The same weights in bf16 and quantized."""
    original, quantized = directory / "original", directory / "quantized"
    with torch.device("meta"):
        model = cogx_fast.runtime.for_diffusers.upstream.model_class()(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float32).remainder_(251 + number).div_(99)
            parameter.copy_(values.view(parameter.shape))
    model.save_pretrained(original)
    quant.quantize(model, recipe)
    model.save_pretrained(quantized)
    return original, quantized


def read_all(model: Any) -> None:
    """Every byte once, as the first forward will."""
    for tensor in model.state_dict().values():
        for part in inner_tensors(tensor) if is_quantized(tensor) else [tensor]:
            part.detach().view(-1).view(torch.uint8).max()


def seconds(load: Callable[[], Any]) -> float:
    start = time.perf_counter()
    read_all(load())
    return time.perf_counter() - start


def ratio(original: Path, quantized: Path, recipe: str, rounds: int) -> float:
    """Of medians, until every weight was read: the stored model's to that of the one that is quantized anew."""
    loads = {
        "stored": lambda: cogx_fast.load(quantized),
        "quantized anew": lambda: cogx_fast.load(original, quant=recipe),
    }
    times: dict[str, list[float]] = {name: [] for name in loads}
    for number in range(rounds + 1):
        for name in sorted(loads, reverse=number % 2 == 0):
            taken = seconds(loads[name])
            if number:  # the first round warms up
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = medians["stored"] / medians["quantized anew"]
    print(f"stored {medians['stored']:.3f} s, quantized anew {medians['quantized anew']:.3f} s, ratio {found:.2f}")
    return found


def test_loading_is_less_work_than_quantizing_anew(tmp_path):
    original, quantized = make(SMALL, tmp_path, "int8-weight-only")
    with Work() as stored:
        read_all(cogx_fast.load(quantized))
    with Work() as anew:
        read_all(cogx_fast.load(original, quant="int8-weight-only"))
    assert 0 < stored.bytes <= 0.3 * anew.bytes  # 0.18; quantizing is all of the rest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", ["int8-weight-only", "fp8-weight-only"])
def test_loading_is_faster_than_quantizing_anew_at_real_size(recipe, tmp_path):
    original, quantized = make(LARGE, tmp_path, recipe)
    assert (quantized / WEIGHTS).stat().st_size > 1e9
    assert ratio(original, quantized, recipe, rounds=2) <= 0.6
