"""A process that runs steps of whichever ``cogx_fast`` is on its path, when it is told to (``compare`` starts it).

    PYTHONPATH=REVISION python benchmarks/stepper.py CASE

It is run as a file and uses of this repository only what every revision offers: ``load`` and the presets. A JSON line
says that it is ready, and from which package; then each number read from standard input is answered with the seconds of
as many steps, until the input ends.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import torch

CASES = ("small/eager", "small/compiled", "5b-2-layers/eager", "5b-2-layers/compiled")
"""The last two for a GPU."""


def build(case: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments of a call."""
    from diffusers import CogVideoXTransformer3DModel

    import cogx_fast
    from cogx_fast.config import PRESETS

    size, _, how = case.partition("/")
    small: dict[str, Any] = {"num_attention_heads": 6, "text_embed_dim": 64, "max_text_seq_length": 16}
    config = dataclasses.replace(PRESETS["5b"], num_layers=2, **(small if size == "small" else {}))
    frames, height, width = (4, 16, 24) if size == "small" else (13, 60, 90)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        upstream = CogVideoXTransformer3DModel(**config).eval().requires_grad_(False)
        angles = torch.rand(frames * height * width // 4, 64, dtype=torch.float32)
        arguments = {
            "hidden_states": torch.randn(2, frames, config.in_channels, height, width),
            "encoder_hidden_states": torch.randn(2, config.max_text_seq_length, config.text_embed_dim),
            "timestep": torch.tensor([500, 500]),
            "image_rotary_emb": (angles.cos(), angles.sin()),
            "return_dict": False,
        }
    torch.set_default_dtype(torch.float32)
    return cogx_fast.load(upstream, compile=how == "compiled"), arguments


def main(case: str) -> None:
    import cogx_fast

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, arguments = build(case, device)

    def step() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            model(**arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    first = step()
    for _ in range(3):
        step()
    print(json.dumps({"package": cogx_fast.__file__, "first_call": first, "device": str(device)}), flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
