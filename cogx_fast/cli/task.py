"""From what was asked for on the command line to what a pipeline is run with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import DTYPE_NAMES, count, read_size, seed
from cogx_fast.cli.output import quiet_bars

if TYPE_CHECKING:
    import torch

    from cogx_fast.pipelines.generation import Request, Setting
    from cogx_fast.pipelines.locate import Model

_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One video of one pipeline."""

    model: Model
    device: torch.device
    setting: Setting
    request: Request
    fps: int

    def facts(self, pipe: Any) -> dict[str, Any]:
        """What a setting can change, as it is with the pipeline that was opened."""
        from cogx_fast.pipelines import generation

        return {
            "transformer": self.setting.transformer,
            "dtype": name_dtype(pipe.transformer.dtype),
            "compiled": generation.is_compiled(pipe),
            "attention": self.setting.attention,
            "attention_plan": self.setting.attention_plan,
            "step_cache": self.setting.step_cache,
            "loras": [list(each) for each in self.setting.loras],
            "quant": self.setting.quant,
            "steps": self.request.steps,
            "guidance": self.request.guidance,
            "seed": self.request.seed,
        }

    def warnings(self, pipe: Any) -> list[str]:
        """What to tell before it runs."""
        from cogx_fast.pipelines import generation

        notes = [
            generation.dtype_warning(self.model, self.setting, self.device),
            generation.length_warning(self.model.config, self.request.size),
            generation.overflow_warning(self.model.config, pipe.transformer.dtype),
            generation.truncation_warning(pipe, self.request.prompt),
        ]
        return list(filter(None, notes))


def read_task(arguments: argparse.Namespace) -> Task:
    """The task of a command with ``--model``, ``--prompt`` and the options of ``add_video``.

    Raises:
        ValueError, OSError: there is no such model, or it cannot do what is asked for.
    """
    from cogx_fast.pipelines import generation
    from cogx_fast.pipelines.locate import locate_pipeline

    if arguments.model == "tiny":  # which may have to be made
        quiet_bars()
    model = locate_pipeline(arguments.model)
    generation.check_pipeline(model, with_image=arguments.image is not None)
    device = generation.choose_device(arguments.device)
    return Task(
        model=model,
        device=device,
        setting=generation.Setting(
            dtype=read_dtype(arguments),
            attention=arguments.attention,
            attention_plan=arguments.attention_plan,
            step_cache=arguments.step_cache,
            loras=tuple(_lora(text) for text in arguments.lora),
            compile=device.type == "cuda" if arguments.compile is None else arguments.compile,
            offload=arguments.offload,
            vae_tiling=arguments.vae_tiling,
        ),
        request=generation.Request(
            prompt=arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            size=model.video(**read_size(arguments)),
            steps=arguments.steps,
            seed=arguments.seed,
            guidance=arguments.guidance,
            image=None if arguments.image is None else generation.read_image(arguments.image),
        ),
        fps=arguments.fps or (8 if model.config.patch_size_t is None else 16),
    )


def change_task(task: Task, text: str, *, compile: bool | None = None) -> Task:
    """The task with some settings changed, written as "key=value,key=value".

    Args:
        task: what holds where nothing is changed. Its attention backend is for our transformer alone.
        text: the changes.
        compile: whether to compile diffusers' transformer where the text does not say; None is no.

    Raises:
        ValueError: it is not written so, or a key or value is unknown; the message says what there is.
    """
    from cogx_fast.pipelines import generation

    keys = _keys()
    settings: dict[str, Any] = {}
    requests: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in keys:
            raise ValueError(f"setting {text!r}: got {item!r}, expected key=value with a key of {', '.join(keys)}")
        changes = requests if key in ("steps", "guidance", "seed") else settings
        if key in changes:
            raise ValueError(f"setting {text!r}: {key} is given twice")
        try:
            changes[key] = keys[key](value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"setting {text!r}: {key}: {error}") from None
    if settings.get("transformer") == generation.UPSTREAM:
        ours = {"attention": "auto", "attention_plan": None, "step_cache": None, "loras": ()}
        settings = {"compile": bool(compile), **ours, **settings}
    try:
        setting = dataclasses.replace(task.setting, **settings)
    except ValueError as error:
        raise ValueError(f"setting {text!r}: {error}") from None
    return dataclasses.replace(task, setting=setting, request=dataclasses.replace(task.request, **requests))


def read_dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    """What ``--dtype`` asks for, if it is given."""
    from cogx_fast.pipelines.generation import DTYPES

    return None if arguments.dtype is None else DTYPES[arguments.dtype]


def _lora(text: str) -> tuple[str, float]:
    """A file, or file=weight."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ValueError(f"--lora {text!r}: got {weight!r} for its weight, expected FILE or FILE=0.8") from None


def name_dtype(dtype: torch.dtype) -> str:
    """A dtype as the command line calls it."""
    from cogx_fast.pipelines.generation import DTYPES

    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _keys() -> dict[str, Callable[[str], Any]]:
    """What a setting can change, and how each value is read."""
    from cogx_fast.pipelines import generation

    return {
        "transformer": lambda text: _one_of((generation.OURS, generation.UPSTREAM), text),
        "dtype": lambda text: generation.DTYPES[_one_of(DTYPE_NAMES, text)],
        "compile": lambda text: _SWITCH[_one_of(tuple(_SWITCH), text)],
        "attention": str,
        "attention_plan": str,
        "step_cache": str,
        "steps": count,
        "guidance": float,
        "seed": seed,
        "quant": str,
    }


def _one_of(known: tuple[str, ...], text: str) -> str:
    if text not in known:
        raise ValueError(f"got {text!r}, expected {' or '.join(known)}")
    return text


__all__ = ["Task", "change_task", "name_dtype", "read_dtype", "read_task"]
