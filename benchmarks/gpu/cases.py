"""What the battery runs, most informative first."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cogx_fast import costs
from cogx_fast.config import PRESETS, TransformerConfig
from cogx_fast.costs import Tokens
from cogx_fast.runtime.plan import BUILT_IN

OURS, DIFFUSERS = "ours", "diffusers"
MODELS = ("5b", "2b", "1.5-5b")
QUICK_MODEL = "tiny"
FEW_LAYERS = (1, 3)
"""A step of more layers is extrapolated from these: t(L) = t(1) + (L − 1) · (t(3) − t(1)) / 2, for layers are alike."""
FLEX_OPTIONS: dict[str, dict[str, int | bool]] = {
    "default": {},
    "128x64-4w3s": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "128x64-8w3s": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "64x64-4w3s": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "128x128-8w3s": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
}
"""Of flex-attention's template, those that do not spill (NOTES.md)."""
LAST = "sdpa-math"
"""A reference that holds every score in memory: at the real sizes it may not fit."""
PLANTS = ("failing", "hanging", "wrong")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process's work."""

    name: str
    kind: Literal["ceiling", "attention", "step"]
    limit: float
    """Seconds after which it is ended."""
    model: str = ""
    layers: tuple[int, ...] = ()
    """Numbers of layers to time: all of the model's, or two fewer to extrapolate from."""
    owner: str = OURS
    """``ours``, ``diffusers``, or ``sage`` (diffusers with SageAttention in the place of SDPA)."""
    attention: str = ""
    """Of ours: a backend. Of the kind "attention": the same, or "flex" and a name from ``FLEX_OPTIONS``."""
    quant: str = ""
    """Of ours: a recipe. Of a peer: "fp8-row" or "int8-dynamic", torchao's own."""
    attention_plan: str = ""
    """Of ours: a built-in sparse plan."""
    scope: Literal["eager", "block", "model"] = "eager"
    """What is compiled."""
    quick: bool = False
    """Toy sizes and a compiler backend that generates no code: every line runs, the times mean nothing."""
    plant: str = ""
    """One of ``PLANTS``: a defect, for the battery's own test."""

    @property
    def config(self) -> TransformerConfig:
        """The model's configuration, with all its layers."""
        return PRESETS[self.model]

    @property
    def tokens(self) -> Tokens:
        """Of one video of the model's default size."""
        return costs.count_tokens(self.config, costs.default_video(self.config))

    @property
    def extrapolated(self) -> bool:
        """Whether the step is told from fewer layers."""
        return self.config.num_layers not in self.layers


def plan(*, models: Sequence[str], quick: bool, full: bool = False, plants: Sequence[str] = ()) -> list[Case]:
    """The cases in the order in which they run.

    Args:
        models: presets, the most important first.
        quick: toy sizes.
        full: all layers for the compiled peers, too, which takes them minutes to compile.
        plants: defects to plant, in a case each.
    """
    found = [_ceiling(name, quick) for name in ("bf16", "fp8", "int8", "copy")]
    found += [Case(name=f"planted/{plant}", kind="step", limit=3 if plant == "hanging" else 60, model=QUICK_MODEL,
                   layers=(1, 2), attention="sdpa", quick=True, plant=plant) for plant in plants]  # fmt: skip
    for place, model in enumerate(models):
        found += _steps(model, headline=place == 0, quick=quick, full=full)
        found += _attention(model, quick)
    return found


def _ceiling(name: str, quick: bool) -> Case:
    return Case(name=f"ceiling/{name}", kind="ceiling", limit=60, attention=name, quick=quick)


def _attention(model: str, quick: bool) -> Iterator[Case]:
    for kernel in (*attention_backends(), *(f"flex {name}" for name in FLEX_OPTIONS)):
        yield Case(
            name=f"attention/{model}/{kernel.replace(' ', '-')}", kind="attention", limit=90, model=model,
            attention=kernel, quick=quick,
        )  # fmt: skip


def _steps(model: str, *, headline: bool, quick: bool, full: bool) -> list[Case]:
    """A model's steps: ours and the peers that they are compared with first, then the rest."""
    every = (PRESETS[model].num_layers,)
    ours, few = (every if headline else FEW_LAYERS), FEW_LAYERS
    if quick:
        ours, few = every, (1, 4)
    compiled = every if full else few

    def case(owner: str, layers: tuple[int, ...], suffix: str = "", **options: str) -> Case:
        words = [model, owner, *options.values()]
        return Case(
            name="/".join(word for word in words if word) + suffix,
            kind="step", limit=60 if quick else 240, model=model, layers=layers, owner=owner, quick=quick, **options,
        )  # fmt: skip

    recipes, first = recipe_names(), "sdpa"
    by_backend = {name: case(OURS, ours if name in ("sdpa", "flex") else few, attention=name, scope="block")
                  for name in attention_backends()}  # fmt: skip
    main = [by_backend.pop(name) for name in (first, "flex")]
    slowest = by_backend.pop(LAST)
    dynamic = [name for name in ("fp8-dynamic", "int8-dynamic") if name in recipes]
    plans = [] if quick else list(BUILT_IN)  # what skips no blocks has no sparse plan
    rest = [] if quick else [name for name in recipes if name not in dynamic]
    found = [
        *main,
        case(DIFFUSERS, ours, scope="eager"),
        case(DIFFUSERS, compiled, scope="model"),
        *(case(OURS, ours, attention=first, scope="block", quant=name) for name in dynamic),
        *(case(DIFFUSERS, compiled, scope="model", quant=name) for name in ("fp8-row", "int8-dynamic")),
        *by_backend.values(),
        case(OURS, few, attention=first, scope="model"),
        dataclasses.replace(main[0], name=f"{main[0].name}/again"),
        case(OURS, ours, attention=first, scope="eager"),
        *(case(OURS, ours, attention="flex", attention_plan=name, scope="block") for name in plans),
        *(case(OURS, few, attention=first, scope="block", quant=name) for name in rest),
        slowest,
    ]
    if importlib.util.find_spec("sageattention") is not None:
        found.append(case("sage", ours, scope="eager"))
    return found


def attention_backends() -> list[str]:
    """The names of every attention backend that ours has."""
    from cogx_fast.model.backends import BACKENDS

    return list(BACKENDS)


def recipe_names() -> list[str]:
    """The names of every recipe that is shipped, or none where quantization is not there."""
    import quant
    from cogx_fast.generation import takes_quant

    return list(quant.recipe_names()) if takes_quant() and hasattr(quant, "recipe_names") else []
