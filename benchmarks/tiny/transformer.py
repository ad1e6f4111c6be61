"""The tiny pipeline's transformer: this package's own model, trained through its own training path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.tiny.loop import Run, arithmetic, hold_then_linear, rank, share, train, world
from benchmarks.tiny.vae import encode
from cogx_fast.assets import digits
from cogx_fast.assets.recipe import SCHEDULER_CONFIG, SEED
from cogx_fast.config import TransformerConfig
from cogx_fast.runtime.module import CogVideoXModel

MAX_TEXT = 8
LATENTS = "latents.pt"
EMPTY = 10 * len(digits.MOTIONS)
"""Index of the empty prompt, behind those of all digits and motions."""


@dataclass(frozen=True, kw_only=True)
class TransformerPlan:
    steps: int = 3050
    batch: int = 64
    clips: int = 6000
    """Clips encoded once and drawn from."""
    still_share: float = 0.24
    """Part of the clips that stand still: the hardest motion, since each frame tells the same."""
    empty_share: float = 0.1
    """Part of the prompts that are left empty, for guidance."""
    matrix_rate: float = 0.02
    """Muon's, for the matrices of the blocks."""
    other_rate: float = 1e-3
    """AdamW's, for the rest."""
    warmup: int = 100
    ema: float = 0.999
    compile: bool = True


@torch.no_grad()
def text_embeddings(pipe: Any) -> Tensor:
    """What the transformer reads for every prompt and, last, for the empty one: ``(51, T, E)``."""
    prompts = [words for _, _, words in digits.all_prompts()]
    embeds, _ = pipe.encode_prompt(
        [*prompts, ""], do_classifier_free_guidance=False, max_sequence_length=MAX_TEXT, device=torch.device("cpu")
    )
    return embeds.float()


def cached_latents(vae: Any, plan: TransformerPlan, folder: Path) -> tuple[Tensor, Tensor]:
    """Latents ``(clips, F, C, H, W)`` of training clips, and the index of each one's prompt."""
    path = folder / LATENTS
    if not path.exists():
        pictures, labels = digits.load("train")
        generator = torch.Generator().manual_seed(SEED + 2)
        chosen = torch.randperm(plan.clips, generator=generator) % len(pictures)
        moving = (1 - plan.still_share) / (len(digits.MOTIONS) - 1)
        weights = torch.tensor([plan.still_share if name == "standing still" else moving for name in digits.MOTIONS])
        motions = weights.multinomial(plan.clips, replacement=True, generator=generator)
        clips = digits.draw_clips(chosen, motions, generator)
        # each worker encodes a part
        own = torch.arange(plan.clips).chunk(world())[rank()]
        torch.save(encode(vae, clips.part(own), pictures), folder / f"latents-{rank()}.tmp")
        _wait()
        if rank() == 0:
            files = [folder / f"latents-{worker}.tmp" for worker in range(world())]
            latents = torch.cat([torch.load(file, weights_only=True) for file in files])
            torch.save({"latents": latents, "prompts": labels[chosen] * len(digits.MOTIONS) + motions}, files[0])
            files[0].replace(path)
            for file in files[1:]:
                file.unlink()
        _wait()
    cached = torch.load(path, weights_only=True)
    return cached["latents"], cached["prompts"]


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def make_transformer() -> CogVideoXModel:
    """A new one: torch's own initialisation, but blocks that begin as the identity and a prediction of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CogVideoXModel(TransformerConfig.preset("tiny"))
    for zero in (model.modulation.linear, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(zero.weight)
        nn.init.zeros_(zero.bias)
    return model


def make_optimizers(model: CogVideoXModel, plan: TransformerPlan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer_blocks.parameters() if p.dim() == 2]
    held = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in held]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, momentum=0.95, nesterov=True),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]


class Task:
    """What a step learns from: noisy latents, the prompt's embedding, and the scheduler that ships."""

    def __init__(self, latents: Tensor, prompts: Tensor, text: Tensor, plan: TransformerPlan) -> None:
        from diffusers import CogVideoXDDIMScheduler

        self.latents, self.prompts, self.text, self.plan = latents, prompts, text, plan
        self.scheduler = CogVideoXDDIMScheduler(**SCHEDULER_CONFIG)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.float()

    def loss(self, model: CogVideoXModel, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted velocity; timesteps are spread evenly over the batch."""
        batch = share(self.plan.batch)
        chosen = torch.randint(len(self.latents), (batch,), generator=generator)
        clean = self.latents[chosen].to(model.device)
        is_empty = torch.rand(batch, generator=generator) < self.plan.empty_share
        text = self.text[torch.where(is_empty, EMPTY, self.prompts[chosen])].to(model.device)
        spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (spread * len(self.scheduler.alphas_cumprod)).long().to(model.device)
        noise = torch.randn(clean.shape, generator=generator).to(model.device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        wanted = self.scheduler.get_velocity(clean, noise, timesteps)
        with arithmetic(model.device):
            predicted = model(noisy, text, timesteps, return_dict=False)[0]
        return (predicted.float() - wanted).square().mean()


def train_transformer(
    task: Task, plan: TransformerPlan, folder: Path, device: str = "cpu", *, stop_at: int | None = None
) -> Run:
    """Train (from the checkpoint in ``folder`` where there is one); ``Run.model`` is the result, averaged."""
    model = make_transformer().to(device)
    if plan.compile:
        from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model

        compile_model(model, CompileConfig())
    run = Run(
        name="transformer",
        model=model,
        optimizers=make_optimizers(model, plan),
        loss=lambda step, generator: task.loss(model, generator),
        steps=plan.steps,
        warmup=plan.warmup,
        decay=hold_then_linear,
        ema=plan.ema,
        seed=SEED,
    )
    train(run, folder, stop_at=stop_at)
    return run


__all__ = [
    "EMPTY", "LATENTS", "MAX_TEXT", "Task", "TransformerPlan", "cached_latents", "make_optimizers", "make_transformer",
    "text_embeddings", "train_transformer",
]  # fmt: skip
