"""What is run, the most valuable first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from cogx_fast import sizes
from cogx_fast.attention.backends import BACKENDS
from cogx_fast.attention.plan import BUILT_IN
from cogx_fast.config import PRESETS, TransformerConfig
from cogx_fast.sizes import Tokens

MODELS = ("5b", "2b", "1.5-5b", "5b-i2v", "1.5-5b-i2v")
QUICK_MODEL = "tiny"
SPARSE = "radial"
RECIPES = ("bf16", "fp8-dynamic", "int8-dynamic", SPARSE)
CACHES = ("balanced", "fast")
"""Step caches, by their names."""
STEPS = 24
"""Of a loop with one."""
PEERS = ("eager", "fp8-row", "int8-dynamic")
"""diffusers in other ways than the one that everything is compared with: the two recipes are torchao's own."""
DECODES = ("whole", "tiled")
"""How the VAE decodes."""
LAYOUTS = ("none", "model", "blocks")
"""Of a pipeline, by their names (``pipelines.memory.OFFLOADS``); with streamed blocks the VAE decodes by tiles."""
BATCH = 2
FLEX_OPTIONS: dict[str, dict[str, int | bool]] = {
    "default": {},
    "128x64-4w3s": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "128x64-8w3s": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "64x64-4w3s": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "128x128-8w3s": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
}
"""Of flex-attention's template, those that do not spill (NOTES.md)."""


Part = Literal["block", "step", "attention", "loop", "decode", "call"]
HELD: tuple[Part, ...] = ("decode", "call")
"""Parts of which it is counted what they hold, and no peer is timed beside them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that is timed beside its peer."""

    model: str
    part: Part
    """A model of one layer, the whole model, attention alone, or the one layer in a loop of ``STEPS``; decoding a
    video, or a call of the whole pipeline."""
    owner: Literal["ours", "diffusers"] = "ours"
    recipe: str = "bf16"
    """One of ``RECIPES``, or of ``PEERS``; of attention alone a backend, or "flex" and one of ``FLEX_OPTIONS``; of a
    loop one of ``CACHES``, of decoding one of ``DECODES``, of a call one of ``LAYOUTS``."""
    scope: Literal["block", "model"] = "block"
    """What is compiled of ours."""

    def __str__(self) -> str:
        scope = ["model-scope"] if self.scope == "model" else []
        owner = [self.owner] if self.owner != "ours" else []
        return "/".join([self.model, self.part, *owner, self.recipe.replace(" ", "-"), *scope])

    @property
    def config(self) -> TransformerConfig:
        """The model's configuration, with one layer unless a whole step is run."""
        config = PRESETS[self.model]
        return config if self.part in ("step", *HELD) else dataclasses.replace(config, num_layers=1)

    @property
    def tokens(self) -> Tokens:
        """Of one video of the model's default size."""
        return sizes.count_tokens(self.config, sizes.default_video(self.config))

    @property
    def quant(self) -> str | None:
        """The recipe of ours, if it is a quantized one."""
        return self.recipe if self.recipe not in ("bf16", SPARSE, *CACHES, *DECODES, *LAYOUTS) else None

    @property
    def kept(self) -> float:
        """The part of the attention scores that is computed."""
        if self.recipe != SPARSE:
            return 1.0
        return float(BUILT_IN[SPARSE](self.config).kept(self.tokens.grid, self.tokens.text).mean())


def plan(*, quick: bool = False) -> list[Case]:
    """Every case: attention of the first model, which compiles least, its blocks, peaks and steps, then the others'."""
    models = (QUICK_MODEL,) if quick else MODELS
    first, *rest = models
    parts: list[Part] = ["attention", "block", "decode", "call", "loop", "step"]
    groups: list[tuple[str, Part]] = [(first, part) for part in parts]
    groups += [*((model, "block") for model in rest), *((model, "step") for model in rest)]
    groups += [("1.5-5b", part) for part in ("attention", *HELD) if "1.5-5b" in rest]
    return [case for model, part in groups for case in _group(model, part)]


def _group(model: str, part: Part) -> list[Case]:
    named: dict[Part, tuple[str, ...]] = {"loop": CACHES, "decode": DECODES, "call": LAYOUTS}
    if part in named:
        return [Case(model=model, part=part, recipe=recipe) for recipe in named[part]]
    if part == "attention":
        kernels = [*BACKENDS, *(f"flex {options}" for options in FLEX_OPTIONS)]
        kernels.sort(key=lambda name: name == "sdpa-math")  # holds every score in memory: last, where it may fail
        return [Case(model=model, part=part, recipe=kernel) for kernel in kernels]
    ours = [Case(model=model, part=part, recipe=recipe, scope=scope) for scope in ("block", "model") for recipe in
            RECIPES]  # fmt: skip
    peers = [Case(model=model, part=part, owner="diffusers", recipe=recipe) for recipe in PEERS]
    return [*ours[: len(RECIPES)], *(peers if model in (MODELS[0], QUICK_MODEL) else []), *ours[len(RECIPES) :]]
