"""Compile once, start warm in every process after it.

    python examples/warm_start.py --bundle 5b.bundle --model THUDM/CogVideoX-5b --device cuda --dtype bfloat16

The first run writes the bundle, later ones start from it. A bundle is code: take it only from where you would take a
program from.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", default=str(tiny_pipeline_dir()))
arguments.add_argument("--prompt", default="the digit seven moving left")
arguments.add_argument("--bundle", default="cogx.bundle")
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
arguments.add_argument("--steps", type=int, default=2)
given = arguments.parse_args()

dtype = getattr(torch, given.dtype)
bundle = Path(given.bundle)
is_warm = bundle.is_file()
model = cogx_fast.load(
    given.model, dtype=dtype, device=given.device, compile=True, compile_cache=bundle if is_warm else None
)
pipe = CogVideoXPipeline.from_pretrained(given.model, transformer=model, torch_dtype=dtype).to(given.device)
start = time.perf_counter()
pipe(given.prompt, num_inference_steps=given.steps, output_type="latent")
seconds = time.perf_counter() - start
if not is_warm:
    model.save_compile_cache(bundle)
print(f"{'warm' if is_warm else 'cold'} start: {seconds:.1f} s for the first {given.steps} steps")
