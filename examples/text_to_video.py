"""Text to video with a pipeline that you have, accelerated.

    python examples/text_to_video.py --model THUDM/CogVideoX-5b --device cuda --dtype bfloat16 --prompt "A panda"

Without arguments it takes the tiny pipeline that comes with the package.
"""

import argparse

import torch
from diffusers import CogVideoXPipeline

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.video.files import write_video

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", default=str(tiny_pipeline_dir()))
arguments.add_argument("--prompt", default="the digit seven moving left")
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
arguments.add_argument("--steps", type=int, default=25)
arguments.add_argument("--out", default="video.mp4")
given = arguments.parse_args()

pipe = CogVideoXPipeline.from_pretrained(given.model, torch_dtype=getattr(torch, given.dtype)).to(given.device)
pipe = cogx_fast.accelerate(pipe, compile=True)
frames = pipe(given.prompt, num_inference_steps=given.steps, output_type="np").frames[0]
write_video(given.out, (frames * 255).round().astype("uint8"), fps=8)
print(f"wrote {given.out}: {len(frames)} frames")
