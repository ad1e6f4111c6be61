"""What does not go together: one table of refusals, checked before anything is loaded, and whenever a model is changed.

A feature is something that can be asked for. ``load`` says which it is asked for, and a model's slots which they are;
every pair that stands in the table is refused, by one sentence. What is not in the table is tested
(``tests/runtime/test_composition.py``); the docs' table is made of it (``python -m benchmarks.composition``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch.nn.attention.flex_attention import BlockMask

from cogx_fast.attention.backends import BACKENDS
from cogx_fast.attention.plan import PlanError

if TYPE_CHECKING:
    from cogx_fast.runtime.compiling.compile import CompileConfig
    from cogx_fast.runtime.runner import Slots


class OffloadError(ValueError):
    """Streamed blocks do not go together with something else; the message says what, and what to use instead."""


class ShardError(ValueError):
    """Sharded weights do not go together with something else; the message says what, and what to use instead."""


class Feature(Enum):
    """What may be asked for, as users write it."""

    STREAMED = "offload='blocks'"
    PARALLEL = "parallel=..."
    SHARDED = "shard_weights=True"
    QUANTIZED = "quant=..."
    WHOLE_GRAPH = "CompileConfig(scope='model')"
    CUDA_GRAPHS = "CUDA graphs"
    OTHER_COMPILER = "a compile backend other than 'inductor'"
    FIRST_BLOCK = "step_cache='first-block:…'"
    HALVES = "a step schedule that takes the halves of a guided batch apart"
    PLAN = "an attention plan"
    NO_BLOCK_MASKS = "an attention backend such as 'sdpa'"
    OWN_SLOT = "a slot's value that is not traceable"


Features = Mapping[Feature, str]
"""What is asked for, and how it is called in messages."""


@dataclass(frozen=True)
class Refusal:
    """Two features that do not go together: ``one`` does not go with ``other``, ``why``: ``instead``."""

    one: Feature
    other: Feature
    why: str
    instead: str
    error: type[ValueError] = ValueError


REFUSALS = (
    Refusal(
        Feature.STREAMED, Feature.PARALLEL, "whose GPUs have room for a model", "leave one out", OffloadError
    ),
    Refusal(
        Feature.STREAMED, Feature.CUDA_GRAPHS, "which replay work on fixed weights",
        "use CompileConfig(), whose graph is one block's", OffloadError,
    ),
    Refusal(
        Feature.STREAMED, Feature.WHOLE_GRAPH, "whose one graph of all blocks needs all their weights",
        "use scope='block'", OffloadError,
    ),
    Refusal(
        Feature.PARALLEL, Feature.WHOLE_GRAPH, "in whose one graph the ranks cannot wait for each other",
        "use CompileConfig(scope='block')",
    ),
    Refusal(
        Feature.SHARDED, Feature.QUANTIZED, "whose tensors FSDP2 cannot divide",
        "use one or the other (weights in 8 bits take half of the memory whole)", ShardError,
    ),
    Refusal(
        Feature.FIRST_BLOCK, Feature.WHOLE_GRAPH, "whose one graph cannot decide anew in each step",
        "use CompileConfig(scope='block'), or a schedule ('balanced', 'teacache:0.2', …)",
    ),
    Refusal(
        Feature.FIRST_BLOCK, Feature.PARALLEL, "whose ranks would each decide by values of their own",
        "use a schedule ('balanced', 'teacache:0.2', …)",
    ),
    Refusal(
        Feature.HALVES, Feature.PARALLEL, "which shares them out among the ranks",
        "use a schedule without 'unconditional'",
    ),
    Refusal(
        Feature.PLAN, Feature.NO_BLOCK_MASKS, "which takes no block masks", "use 'flex', or leave the plan out",
        PlanError,
    ),
    Refusal(
        Feature.PLAN, Feature.OTHER_COMPILER, "which ignores plans and computes everything",
        "use 'inductor', or leave the plan out", PlanError,
    ),
    Refusal(
        Feature.OWN_SLOT, Feature.WHOLE_GRAPH, "whose one graph it cannot be part of",
        "use CompileConfig(scope='block')",
    ),
)  # fmt: skip
"""Every pair that is refused. Where several apply, the first is reported."""


def check(features: Features) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: both of a pair in the table are asked for; the message says why not, and what to do instead.
    """
    for refusal in REFUSALS:
        if refusal.one in features and refusal.other in features:
            one, other = features[refusal.one], features[refusal.other]
            raise refusal.error(f"{one} does not go with {other}, {refusal.why}: {refusal.instead}")


def named(*features: Feature | None) -> Features:
    """Features by their own names; None is none."""
    return {feature: feature.value for feature in features if feature is not None}


def of_compile(config: CompileConfig | None) -> Features:
    """The features of a way to compile; None: eager."""
    if config is None:
        return {}
    found = dict(named(Feature.WHOLE_GRAPH if config.scope == "model" else None))
    if config.cuda_graphs:
        found[Feature.CUDA_GRAPHS] = f"CUDA graphs (mode {config.mode!r})"
    if config.backend != "inductor":
        found[Feature.OTHER_COMPILER] = f"compile backend {config.backend!r}"
    return found


def of_attention(names: Iterable[str], *, has_plan: bool) -> Features:
    """The features of attention by backends of these names."""
    plain = [name for name in names if name in BACKENDS and BACKENDS[name].masks is not BlockMask]
    found = {Feature.NO_BLOCK_MASKS: f"attention backend {plain[0]!r}"} if plain else {}
    return {**found, **named(Feature.PLAN if has_plan else None)}


def of_slots(slots: Slots) -> Features:
    """The features of a runner's slots: what each value says of itself (``feature``)."""
    found: dict[Feature, str] = {}
    for slot in fields(slots):
        value = getattr(slots, slot.name)
        feature = feature_of(value)
        if feature is not None:
            found[feature] = feature.value
        elif not getattr(value, "is_traceable", True):
            found[Feature.OWN_SLOT] = f"the value of the slot {slot.name!r}"
    return found


def feature_of(value: Any) -> Feature | None:
    """What a value of a slot, or a step cache's strategy, says that it is."""
    found: Feature | None = getattr(value, "feature", None)
    return found


__all__ = [
    "REFUSALS", "Feature", "Features", "OffloadError", "Refusal", "ShardError", "check", "feature_of", "named",
    "of_attention", "of_compile", "of_slots",
]  # fmt: skip
