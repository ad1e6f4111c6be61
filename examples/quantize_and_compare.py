"""Quantize the transformer, and see what that does to a video.

    python examples/quantize_and_compare.py --model THUDM/CogVideoX-5b --recipe fp8-dynamic --device cuda

The same prompt and seed, once with plain weights and once quantized; the quantized transformer is saved, and can be
loaded by this package and by diffusers.
"""

import argparse

import numpy as np
import torch
from diffusers import CogVideoXPipeline

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", default=str(tiny_pipeline_dir()))
arguments.add_argument("--prompt", default="the digit seven moving left")
arguments.add_argument("--recipe", default="int8-weight-only")
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
arguments.add_argument("--steps", type=int, default=25)
arguments.add_argument("--out", default="quantized")
given = arguments.parse_args()

dtype = getattr(torch, given.dtype)
pipe = CogVideoXPipeline.from_pretrained(given.model, torch_dtype=dtype).to(given.device)


def video() -> np.ndarray:
    """The prompt's frames, values 0 to 1."""
    noise = torch.Generator().manual_seed(0)
    return pipe(given.prompt, num_inference_steps=given.steps, generator=noise, output_type="np").frames[0]


pipe = cogx_fast.accelerate(pipe)
plain = video()
pipe.transformer = cogx_fast.load(given.model, dtype=dtype, device=given.device, quant=given.recipe, compile=True)
quantized = video()

error = float(np.mean((plain - quantized) ** 2))
psnr = 10 * np.log10(1 / error) if error else float("inf")
pipe.transformer.save_pretrained(given.out)
print(f"{given.recipe}: {psnr:.1f} dB PSNR to the plain video; saved in {given.out}")
