"""An image to video: the transformer is loaded on its own and handed to the pipeline.

python examples/image_to_video.py --model THUDM/CogVideoX-5b-I2V --image panda.png --prompt "It waves" --device cuda
"""

import argparse

import torch
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

import cogx_fast
from cogx_fast.video.files import write_video

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", required=True)
arguments.add_argument("--image", required=True)
arguments.add_argument("--prompt", required=True)
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
arguments.add_argument("--steps", type=int, default=50)
arguments.add_argument("--frames", type=int)
arguments.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
arguments.add_argument("--out", default="video.mp4")
given = arguments.parse_args()

dtype = getattr(torch, given.dtype)
model = cogx_fast.load(given.model, dtype=dtype, device=given.device, compile=True)
pipe = CogVideoXImageToVideoPipeline.from_pretrained(given.model, transformer=model, torch_dtype=dtype)
pipe = pipe.to(given.device)
size = {} if given.size is None else {"height": given.size[0], "width": given.size[1]}
if given.frames is not None:
    size["num_frames"] = given.frames
frames = pipe(
    Image.open(given.image).convert("RGB"), given.prompt, num_inference_steps=given.steps, output_type="np", **size
).frames[0]
write_video(given.out, (frames * 255).round().astype("uint8"), fps=8)
print(f"wrote {given.out}: {len(frames)} frames")
