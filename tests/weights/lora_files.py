"""LoRA files, what is in them, and diffusers' model with the same merged: shared by the tests of LoRAs."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

import cogx_fast
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.weights.layout import slots
from tests.support import inputs, small

RANK, ALPHA = 4, 8.0
TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
EVERYWHERE = (*TARGETS, "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear")
CONFIG = small("5b", num_layers=2)
FINETRAINERS = json.dumps({"r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q"]})


def halves(targets: tuple[str, ...] = TARGETS, seed: int = 0, config: Any = CONFIG) -> dict[str, tuple[Tensor, Tensor]]:
    """down and up by diffusers' module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: slot.shape for name, slot in slots(config).items()}
    found = {}
    for layer in range(config.num_layers):
        for target in targets:
            name = f"transformer_blocks.{layer}.{target}"
            rows, columns = shapes[f"{name}.weight"]
            down = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            found[name] = down, torch.randn(rows, RANK, generator=generator) * 0.1
    return found


def merged(source: Any, scale: float, pairs: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """diffusers' model with the products added to its weights."""
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            source.get_submodule(name).weight += scale * (up @ down)
    return source


def run(model: Any) -> Tensor:
    """diffusers' own model runs in ours, which takes the tables from its pipelines."""
    if not isinstance(model, CogVideoXModel):
        model = cogx_fast.load(model)
    with torch.no_grad():
        sample: Tensor = model(**inputs(CONFIG)).sample
        return sample


def by_their_names(model: Any) -> dict[str, Tensor]:
    """Copies of our model's weights under diffusers' names."""
    state = model.state_dict()
    return {name: slot.view(state[slot.our_name]).clone() for name, slot in slots(CONFIG).items()}


def as_diffusers(prefix: str = "transformer.", name: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{module}.lora_{half}{name}.weight": tensor
        for module, pair in halves().items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def as_kohya(
    prefix: str = "lora_unet__", targets: tuple[str, ...] = EVERYWHERE, alpha: bool = True
) -> dict[str, Tensor]:
    found = {}
    for module, (down, up) in halves(targets).items():
        flat = "lora_unet__" + module.replace(".", "_")
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha:
            found[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return found
