"""Train the tiny pipeline from nothing: ``python -m benchmarks.tiny.train``. Killed, it goes on where it was."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.tiny.assemble import assemble, quiet, text_side
from benchmarks.tiny.transformer import (
    LATENTS,
    Task,
    TransformerPlan,
    cached_latents,
    text_embeddings,
    train_transformer,
)
from benchmarks.tiny.vae import VaePlan, reconstruction_psnr, train_vae


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="checkpoints and latents [build/tiny]")
    parser.add_argument("--out", type=Path, help="the finished pipeline [<work>/pipeline]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="to train on [a GPU where there is one: %(default)s]")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes that share a batch [2 on the CPU; 1 on a GPU]")
    parser.add_argument("--steps", type=int, default=TransformerPlan.steps, help="of the transformer [%(default)s]")
    parser.add_argument("--vae-steps", type=int, nargs=2, default=(VaePlan.crop_steps, VaePlan.whole_steps),
                        metavar=("CROPS", "WHOLE"), help="of the VAE [%(default)s]")  # fmt: skip
    parser.add_argument("--clips", type=int, default=TransformerPlan.clips, help="encoded to draw from [%(default)s]")
    parser.add_argument("--eager", action="store_true", help="do not compile the transformer")
    options = parser.parse_args(arguments)
    options.workers = options.workers or (2 if options.device == "cpu" else 1)
    if options.device != "cpu" and options.workers > 1:
        parser.error(f"--workers {options.workers} with --device {options.device}: one keeps a GPU busy, leave it out")
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_work, (options, f"{meeting}/store"), nprocs=options.workers)


def _work(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One worker; all do the same, each on its part of every batch."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.workers)
    crops, whole = options.vae_steps
    vae = train_vae(VaePlan(crop_steps=crops, whole_steps=whole), options.work, options.device)
    if rank == 0 and not (options.work / LATENTS).exists():  # once, not after every kill
        frame, inside = reconstruction_psnr(vae)
        print(
            f"VAE on held-out clips: {frame:.2f} dB over the frame, {inside:.2f} dB in the digit's square", flush=True
        )
    plan = TransformerPlan(steps=options.steps, clips=options.clips, compile=not options.eager)
    latents, prompts = cached_latents(vae, plan, options.work)
    task = Task(latents, prompts, text_embeddings(text_side()), plan)
    run = train_transformer(task, plan, options.work, options.device)
    if rank == 0:
        out = options.out or options.work / "pipeline"
        assemble(vae.cpu(), run.model.cpu(), out)
        print(f"wrote {out}", flush=True)
    dist.destroy_process_group()


def _end_with_parent() -> None:
    """A worker does not train on when the process that started it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


if __name__ == "__main__":
    main()
