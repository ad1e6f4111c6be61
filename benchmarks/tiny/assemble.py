"""From trained parts to the pipeline directory that ships."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from cogx_fast.assets import CHECKSUMS
from cogx_fast.assets.recipe import SCHEDULER_CONFIG, make_text_side
from cogx_fast.runtime.module import CogVideoXModel

DTYPE = torch.bfloat16
"""Of every weight in the files."""


def text_side() -> Any:
    """A pipeline of the final tokenizer, text encoder (its weights as the files will round them) and scheduler."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    tokenizer, text_encoder = make_text_side()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(DTYPE).float(),
        vae=None,
        transformer=None,
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER_CONFIG),
    )


def assemble(vae: Any, transformer: CogVideoXModel, out: Path) -> None:
    """Write the pipeline, in ``DTYPE``, with checksums of its files; a model card that is there stays.

    The text encoder's file is in fp32 (a megabyte), its values those of ``DTYPE``: transformers loads a model in the
    files' dtype, while diffusers loads everything else in fp32, and the two must meet.
    """
    from diffusers import CogVideoXTransformer3DModel

    pipe = text_side()
    stand_in = CogVideoXTransformer3DModel(**transformer.config)  # so that the index names diffusers' class
    pipe.register_modules(vae=vae.to(DTYPE), transformer=stand_in)
    pipe.save_pretrained(out)
    transformer.to(DTYPE).save_pretrained(out / "transformer")
    write_checksums(out)


def quiet() -> None:
    """No bars and notes from the libraries: what is left is this package's own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def write_checksums(directory: Path) -> None:
    """``SHA256SUMS`` over every file but itself and the card, as ``sha256sum -c`` reads it."""
    lines = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (CHECKSUMS, "README.md"):
            lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n")
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


__all__ = ["DTYPE", "assemble", "quiet", "text_side", "write_checksums"]
