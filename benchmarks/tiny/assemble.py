"""From trained parts to the pipeline directory that ships."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from cogx_fast.assets import CHECKSUMS
from cogx_fast.assets.recipe import make_tiny_pipeline
from cogx_fast.runtime.module import CogVideoXModel

DTYPE = torch.bfloat16
"""Of every weight in the files."""


def text_side(folder: Path) -> Any:
    """A pipeline with the final tokenizer, text encoder (its weights as the files will round them) and scheduler."""
    from diffusers import CogVideoXPipeline

    base = folder / "base"
    if not (base / "model_index.json").exists():
        make_tiny_pipeline(base)
    pipe = CogVideoXPipeline.from_pretrained(base)
    pipe.text_encoder.to(DTYPE).float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble(folder: Path, vae: Any, transformer: CogVideoXModel, out: Path) -> None:
    """Write the pipeline, in ``DTYPE``, with checksums of its files; a model card that is there stays.

    The text encoder's file is in fp32 (a megabyte), its values those of ``DTYPE``: transformers loads a model in the
    files' dtype, while diffusers loads everything else in fp32, and the two must meet.
    """
    pipe = text_side(folder)
    pipe.register_modules(vae=vae.to(DTYPE))
    pipe.save_pretrained(out)
    transformer.to(DTYPE).save_pretrained(out / "transformer")
    index = json.loads((out / "model_index.json").read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)  # where the parts lay on the machine that trained them
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
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
