"""Calibration inputs: what a model was called with during real runs, kept as a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from quant.errors import QuantError

Sample: TypeAlias = "dict[str, Tensor]"
"""The tensors of one call, by argument name."""

INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "ofs")
"""Arguments of a CogVideoX transformer that are kept; rotary tables it makes itself."""

_ABOUT, _COUNT = "about", "samples"


@contextmanager
def recording(model: nn.Module, *, every: int = 1, names: Sequence[str] = INPUTS) -> Iterator[list[Sample]]:
    """Keep what ``model`` is called with by name inside the ``with`` block, on the CPU.

    Args:
        model: called by others, e.g. by a pipeline.
        every: keep the first call and then one in so many.
        names: arguments to keep, where they are given and not None.
    """
    if every < 1:
        raise QuantError(f"every is {every}, expected 1 or more")
    samples: list[Sample] = []
    calls = 0

    def keep(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal calls
        if calls % every == 0:
            found = {name: torch.as_tensor(given[name]) for name in names if given.get(name) is not None}
            samples.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()})
        calls += 1

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield samples
    finally:
        handle.remove()


def save_calibration(path: str | os.PathLike[str], samples: Sequence[Sample], about: Mapping[str, Any]) -> None:
    """Write calibration inputs, whole or not at all.

    Args:
        path: a ``.safetensors`` file, replaced if it is there.
        samples: what ``recording`` kept.
        about: where they come from: prompts, steps, seed; plain data.

    Raises:
        QuantError: there are no samples.
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    if not samples:
        raise QuantError("there are no calibration inputs to save: run the model inside of recording()")
    named = [(f"{index}.{name}", value) for index, each in enumerate(samples) for name, value in each.items()]
    tensors = {name: value.contiguous() for name, value in named}
    target = Path(path)
    hidden = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, hidden, metadata={_ABOUT: json.dumps(dict(about)), _COUNT: str(len(samples))})
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)


def load_calibration(path: str | os.PathLike[str]) -> tuple[list[Sample], dict[str, Any]]:
    """The samples of a file that ``save_calibration`` wrote, and where they come from.

    Raises:
        QuantError: it is no such file, or damaged.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there are no calibration inputs")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            samples: list[Sample] = [{} for _ in range(int(metadata[_COUNT]))]
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                index, _, name = key.partition(".")
                samples[int(index)][name] = file.get_tensor(key)
            about = json.loads(metadata[_ABOUT])
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise QuantError(f"{path}: holds no calibration inputs, or is damaged ({error}): record them again") from None
    if not samples or not all(samples):
        raise QuantError(f"{path}: some of its {len(samples)} calibration inputs are empty: record them again")
    return samples, about


__all__ = ["INPUTS", "Sample", "load_calibration", "recording", "save_calibration"]
