"""One step of full fine-tuning (v-prediction), with gradient checkpointing; what is saved unmodified diffusers loads.

python examples/finetune_step.py --model THUDM/CogVideoX-2b --device cuda --out finetuned
"""

import argparse

import torch
from diffusers import CogVideoXPipeline

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", default=str(tiny_pipeline_dir()))
arguments.add_argument("--prompt", default="the digit seven moving left")
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--rate", type=float, default=1e-4)
arguments.add_argument("--out", default="finetuned")
given = arguments.parse_args()

pipe = cogx_fast.accelerate(CogVideoXPipeline.from_pretrained(given.model)).to(given.device)
model = pipe.transformer.train()
model.enable_gradient_checkpointing()
optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate)

config = model.config
frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
latents = torch.randn(1, frames, config.out_channels, config.sample_height, config.sample_width, device=given.device)
with torch.no_grad():
    text, _ = pipe.encode_prompt(given.prompt, do_classifier_free_guidance=False)


def loss() -> torch.Tensor:
    """v-prediction at one timestep and one noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timestep = torch.tensor([500], device=given.device)
    noisy = pipe.scheduler.add_noise(latents, noise, timestep)
    wanted = pipe.scheduler.get_velocity(latents, noise, timestep)
    return (model(noisy, text.to(noisy), timestep).sample - wanted).square().mean()


before = loss()
before.backward()
optimizer.step()
optimizer.zero_grad()
with torch.no_grad():
    after = loss()
model.eval().save_pretrained(given.out)
print(f"loss {before.item():.4f}, after one step {after.item():.4f}; saved in {given.out}")
