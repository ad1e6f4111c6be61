"""Train a LoRA (v-prediction, one clip) and write it as diffusers does; what is written unmodified diffusers loads.

python examples/train_lora.py --model THUDM/CogVideoX-5b --device cuda --steps 500 --out my-lora
"""

import argparse

import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig, get_peft_model_state_dict

import cogx_fast
from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.sizes import latent_frames

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", default=str(tiny_pipeline_dir()))
arguments.add_argument("--prompt", default="the digit seven moving left")
arguments.add_argument("--device", default="cpu")
arguments.add_argument("--rank", type=int, default=8)
arguments.add_argument("--steps", type=int, default=20)
arguments.add_argument("--rate", type=float, default=1e-3)
arguments.add_argument("--out", default="lora")
given = arguments.parse_args()

pipe = cogx_fast.accelerate(CogVideoXPipeline.from_pretrained(given.model)).to(given.device)
model = pipe.transformer.requires_grad_(False).train()
targets = ["to_q", "to_k", "to_v", "to_out.0"]
model.add_adapter(LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=targets))
model.enable_gradient_checkpointing()
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=given.rate)

config, generator = model.config, torch.Generator().manual_seed(0)
frames = latent_frames(config, config.sample_frames)
size = (1, frames, config.out_channels, config.sample_height, config.sample_width)
latents = torch.randn(size, generator=generator).to(given.device)  # your clip's, from pipe.vae
with torch.no_grad():
    text, _ = pipe.encode_prompt(given.prompt, do_classifier_free_guidance=False)

losses = []
for _ in range(given.steps):
    noise = torch.randn(size, generator=generator).to(latents)
    timestep = torch.randint(0, 1000, (1,), generator=generator).to(given.device)
    noisy = pipe.scheduler.add_noise(latents, noise, timestep)
    wanted = pipe.scheduler.get_velocity(latents, noise, timestep)
    loss = (model(noisy, text.to(noisy), timestep).sample - wanted).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

pipe.save_lora_weights(given.out, get_peft_model_state_dict(model))
model.unload_lora()
pipe.load_lora_weights(given.out)
print(f"loss {losses[0]:.4f}, after {given.steps} steps {losses[-1]:.4f}; saved in {given.out}, and loaded again")
