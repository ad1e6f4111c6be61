"""The tiny pipeline's VAE: first on small crops, then on whole clips, with latents of mean 0 and deviation 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tiny.loop import Run, arithmetic, cosine, device_of, share, train
from cogx_fast.assets import digits
from cogx_fast.assets.recipe import SEED, VAE_CONFIG

CROP, CROP_FRAMES = 32, 9
DIGIT_WEIGHT = 7.0
"""Weight of the loss on and around the strokes; the empty canvas is 80 % of the picture."""
KL_WEIGHT = 1e-4


@dataclass(frozen=True, kw_only=True)
class VaePlan:
    crop_steps: int = 1100
    crop_batch: int = 8
    crop_rate: float = 2e-3
    whole_steps: int = 250
    whole_batch: int = 2
    whole_rate: float = 8e-4
    ema: float = 0.998


def make_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return AutoencoderKLCogVideoX(**VAE_CONFIG)


def train_vae(plan: VaePlan, folder: Path, device: str = "cpu") -> Any:
    """The trained VAE (from the checkpoints in ``folder`` where they are there)."""
    vae = make_vae().to(device)
    train(_run(vae, "vae-crops", plan, whole=False), folder)
    fold_statistics(vae, *latent_statistics(vae))
    train(_run(vae, "vae-whole", plan, whole=True), folder)
    fold_statistics(vae, *latent_statistics(vae))
    return vae


def _run(vae: Any, name: str, plan: VaePlan, *, whole: bool) -> Run:
    pictures, _ = digits.load("train")
    rate, batch = (plan.whole_rate, plan.whole_batch) if whole else (plan.crop_rate, plan.crop_batch)
    return Run(
        name=name,
        model=vae,
        optimizers=[torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)],
        loss=lambda step, generator: vae_loss(
            vae, draw_batch(pictures, share(batch), generator, whole=whole), generator
        ),
        steps=plan.whole_steps if whole else plan.crop_steps,
        warmup=20,
        decay=cosine,
        ema=plan.ema,
        seed=SEED,
    )


def draw_batch(pictures: Tensor, batch: int, generator: torch.Generator, *, whole: bool) -> Tensor:
    """Clips as the VAE takes them, ``(B, 3, F, H, W)`` in -1…1; in crops the digit may lie across the edge."""
    chosen = torch.randint(len(pictures), (batch,), generator=generator)
    motions = torch.randint(len(digits.MOTIONS), (batch,), generator=generator)
    canvas, frames = (digits.CANVAS, digits.FRAMES) if whole else (CROP, CROP_FRAMES)
    clips = digits.draw_clips(chosen, motions, generator, canvas=canvas, frames=frames)
    if not whole:
        clips.start.add_(torch.empty(batch, 2).uniform_(-14, 14, generator=generator))
    return as_input(digits.render(clips, pictures, canvas=canvas, frames=frames))


def as_input(video_BFHW: Tensor) -> Tensor:
    return (video_BFHW * 2 - 1)[:, None].expand(-1, 3, -1, -1, -1)


def vae_loss(vae: Any, video: Tensor, generator: torch.Generator) -> Tensor:
    video = video.to(device_of(vae))
    with arithmetic(video.device):
        posterior = vae.encode(video).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        decoded = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float()
    strokes = F.max_pool3d(video[:, :1] + 1, (1, 5, 5), 1, (0, 2, 2)).clamp(0, 1)
    weight = 1 + (DIGIT_WEIGHT - 1) * strokes
    difference = decoded - video
    reconstruction = (weight * (difference.abs() + 0.5 * difference**2)).mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return reconstruction + KL_WEIGHT * divergence


@torch.no_grad()
def encode(vae: Any, clips: digits.Clips, pictures: Tensor, *, batch: int = 16) -> Tensor:
    """Latents ``(B, F, C, H, W)`` of clips, on the CPU, as the transformer takes them."""
    device, parts = device_of(vae), []
    for start in range(0, len(clips), batch):
        video = digits.render(clips.part(slice(start, start + batch)), pictures).to(device)
        with arithmetic(device):
            parts.append(vae.encode(as_input(video)).latent_dist.mean.float().transpose(1, 2).cpu())
    return torch.cat(parts)


def latent_statistics(vae: Any, *, count: int = 160) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over clips of the training split."""
    pictures, _ = digits.load("train")
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(len(pictures), (count,), generator=generator)
    motions = torch.arange(count) % len(digits.MOTIONS)
    latents = encode(vae, digits.draw_clips(chosen, motions, generator), pictures)
    return latents.mean(dim=(0, 1, 3, 4)), latents.std(dim=(0, 1, 3, 4))


@torch.no_grad()
def fold_statistics(vae: Any, mean: Tensor, deviation: Tensor) -> None:
    """Change the VAE's own weights so that its latents z become (z - mean) / deviation, per channel.

    Exact but for the mean at the edges of the canvas, where the decoder's first convolution pads with zeros: so it is
    done before the last training too, and what is left to fold after that is small.
    """
    channels, device = len(mean), device_of(vae)
    mean, deviation = mean.to(device), deviation.to(device)
    last = vae.encoder.conv_out.conv
    last.weight[:channels] /= deviation[:, None, None, None, None]
    last.bias[:channels] = (last.bias[:channels] - mean) / deviation
    last.bias[channels:] -= 2 * deviation.log()
    readers = [vae.decoder.conv_in.conv]
    for name, module in vae.decoder.named_modules():
        if name.endswith(("conv_y", "conv_b")):
            readers.append(module.conv)
    for reader in readers:
        reader.bias += torch.einsum("oithw,i->o", reader.weight, mean)
        reader.weight *= deviation[:, None, None, None]


@torch.no_grad()
def reconstruction_psnr(vae: Any, *, count: int = 100) -> tuple[float, float]:
    """PSNR in dB over the frames and within the digits' squares, of held-out clips in fp32, each digit once."""
    pictures, _ = digits.load("held-out")
    generator = torch.Generator().manual_seed(SEED + 1)
    clips = digits.draw_clips(torch.arange(count), torch.arange(count) % len(digits.MOTIONS), generator)
    squares: list[Tensor] = []
    inside: list[Tensor] = []
    for start in range(0, count, 10):
        part = clips.part(slice(start, start + 10))
        video = digits.render(part, pictures)
        decoded = vae.decode(vae.encode(as_input(video).to(device_of(vae))).latent_dist.mean).sample.cpu()
        error = ((decoded.clamp(-1, 1) + 1) / 2 - video[:, None]).square().mean(1)
        squares.append(error.flatten())
        inside.append(error[digits.boxes(part)])
    return tuple(-10 * torch.cat(part).mean().log10().item() for part in (squares, inside))  # type: ignore[return-value]


__all__ = [
    "VaePlan", "as_input", "draw_batch", "encode", "fold_statistics", "latent_statistics", "make_vae",
    "reconstruction_psnr", "train_vae", "vae_loss",
]  # fmt: skip
