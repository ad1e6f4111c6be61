"""Find a quantization recipe for a pipeline: calibrate, measure every linear, search for the fastest mix.

What was measured is kept beside the recipe after every linear, so that a search that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cogx_fast.attention.plan import hash_weights
from cogx_fast.measure.devices import Device
from cogx_fast.measure.roofline import SCHEMES, UNQUANTIZED, Part
from cogx_fast.whole_file import write_whole

if TYPE_CHECKING:
    from cogx_fast.pipelines.generation import Request
    from cogx_fast.runtime.module import CogVideoXModel
    from cogx_fast.sizes import Tokens
    from quant import Recipe
    from quant.calibration import Sample
    from quant.search import Found, Mix
    from quant.sensitivity import Errors

BASE = "int8-dynamic"
"""The recipe whose quantized linears are searched over, and whose reasons to skip the others are kept."""
_GUIDED = 2


class SearchError(ValueError):
    """A search that cannot be done or gone on with; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search gave."""

    recipe: Recipe
    found: Found
    errors: Mapping[tuple[str, str], Errors]
    searched: tuple[str, ...]
    unquantized_seconds: float
    """Estimated for the searched linears in bf16."""


@dataclass
class State:
    """What was measured so far, in a JSON file."""

    path: Path
    key: str
    errors: MutableMapping[tuple[str, str], Errors] = field(default_factory=dict)
    mixes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, key: str) -> State:
        """What is in the file, or a new state.

        Raises:
            SearchError: the file belongs to another search, or is damaged.
        """
        from quant.sensitivity import Errors

        if not path.exists():
            return cls(path, key)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            errors = {tuple(name.split("|")): Errors(**each) for name, each in held["errors"].items()}
            state = cls(path, held["key"], errors, dict(held["mixes"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SearchError(f"{path}: not what a search left behind ({error}): remove it to begin anew") from None
        if state.key != key:
            raise SearchError(
                f"{path}: left by a search with another model, other inputs or another base: remove it to begin anew, "
                "or choose another --out"
            )
        return state

    def save(self) -> None:
        """Write it, whole or not at all."""
        errors = {"|".join(pair): asdict(each) for pair, each in self.errors.items()}
        text = json.dumps({"key": self.key, "errors": errors, "mixes": self.mixes}, indent=1)
        write_whole(self.path, text)


def calibrate(
    pipe: Any, requests: Sequence[Request], *, samples: int, on_step: Callable[[int], None] | None = None
) -> list[Sample]:
    """Inputs of the transformer from real denoising, spread evenly over all steps of all requests.

    Args:
        pipe: a CogVideoX pipeline.
        requests: what to generate.
        samples: how many to keep, about.
        on_step: told the number of steps done.
    """
    from cogx_fast.pipelines.generation import count_steps, run_pipeline
    from quant.calibration import recording

    count, steps = count_steps(on_step), sum(request.steps for request in requests)
    with recording(pipe.transformer, every=max(1, round(steps / samples))) as kept:
        for request in requests:
            run_pipeline(pipe, request, decode=False, on_step=count)
    return kept


def find_recipe(
    model: CogVideoXModel,
    samples: Sequence[Sample],
    *,
    budget_db: float,
    name: str,
    model_name: str,
    tokens: Tokens,
    device: Device,
    state_path: Path,
    schemes: Sequence[str],
    by_kind: bool = False,
    on_measured: Callable[[int, int], None] | None = None,
    on_mix: Callable[[int], None] | None = None,
) -> Outcome:
    """The fastest mix of schemes with the predicted noise at ``budget_db`` SQNR or better.

    Args:
        model: the transformer, neither quantized nor compiled.
        samples: from ``calibrate``.
        budget_db: 10 · log10(‖noise‖² / ‖its error‖²), at least, over all samples.
        name: of the recipe.
        model_name: for its description.
        tokens: of one video, for the estimated times.
        device: whose stated ceilings give them.
        state_path: where what was measured is kept.
        schemes: to choose from; those that the device cannot run are left out.
        by_kind: give the same linear of all blocks the same scheme: fewer measurements, and a recipe that fits a model
            of any depth.
        on_measured: told (done, of all) after each linear and scheme.
        on_mix: told the number of mixes measured.

    Raises:
        SearchError: nothing can be searched, or ``state_path`` belongs to another search.
    """
    import quant
    from quant import search, sensitivity

    base_recipe = quant.load_recipe(BASE)
    planned = quant.plan(model, base_recipe)
    searched = tuple(fqn for fqn, choice in planned.choices.items() if choice.scheme is not None)
    groups = _groups(searched, by_kind=by_kind)
    candidates = _candidates(model, groups, schemes, device)
    state = State.open(state_path, _key(model, samples, base_recipe, [*schemes, str(by_kind)]))

    def measured(done: int, of_all: int) -> None:
        state.save()
        if on_measured is not None:
            on_measured(done, of_all)

    errors = sensitivity.measure(
        model, samples, candidates, base_recipe, members=groups, known=state.errors, on_measured=measured
    )
    expected = sensitivity.references(model, samples)

    def by_linear(mix: Mix) -> dict[str, str]:
        return {fqn: scheme for name, scheme in mix.items() for fqn in groups[name]}

    def evaluate(mix: Mix) -> float:
        key = json.dumps(sorted(mix.items()))
        if key not in state.mixes:
            state.mixes[key] = sensitivity.prediction_error(model, by_linear(mix), samples, expected, base_recipe)
            state.save()
        if on_mix is not None:
            on_mix(len(state.mixes))
        return state.mixes[key]

    of_linear = estimated_cost(model, tokens, device)

    def cost(name: str, scheme: str | None) -> float:
        return sum(of_linear(fqn, scheme) for fqn in groups[name])

    found = search.search(search.order_moves(errors, cost), cost, evaluate, budget=10 ** (-budget_db / 10))
    tried = tuple(replace(each, mix=by_linear(each.mix)) for each in found.tried)
    found = search.Found(best=replace(found.best, mix=by_linear(found.best.mix)), tried=tried)
    recipe = search.to_recipe(base_recipe, found.best, searched, name=name, model=model_name, budget_db=budget_db)
    quant.plan(model, recipe)  # it fits the model, line by line
    return Outcome(
        recipe=recipe,
        found=found,
        errors=errors,
        searched=searched,
        unquantized_seconds=sum(cost(name, None) for name in groups),
    )


def _groups(searched: Sequence[str], *, by_kind: bool) -> dict[str, list[str]]:
    """The linears that get a scheme together, by the name of the group: one, or the same of all blocks."""
    from quant.recipe import of_all_blocks

    groups: dict[str, list[str]] = {}
    for fqn in searched:
        groups.setdefault(of_all_blocks(fqn) if by_kind else fqn, []).append(fqn)
    return groups


def _candidates(
    model: nn.Module, groups: Mapping[str, Sequence[str]], schemes: Sequence[str], device: Device
) -> dict[str, list[str]]:
    """The schemes to try for each group."""
    from quant.sensitivity import is_measurable

    usable = [scheme for scheme in schemes if _runs_on(scheme, device)]
    candidates = {
        name: [scheme for scheme in usable if all(is_measurable(scheme, model, fqn) for fqn in members)]
        for name, members in groups.items()
    }
    if not any(candidates.values()):
        raise SearchError(f"none of {', '.join(schemes)} can be measured here and run on {device.name}")
    return candidates


def estimated_cost(model: nn.Module, tokens: Tokens, device: Device) -> Callable[[str, str | None], float]:
    """Seconds a step that a block's linear takes at a device's ceilings, by name and scheme, with guidance."""
    rows, shapes = _GUIDED * tokens.joint, _shapes(model)

    def seconds(fqn: str, scheme: str | None) -> float:
        used = SCHEMES[scheme or UNQUANTIZED]
        outputs, inputs = shapes[fqn]
        moved = outputs * inputs * used.weight_bytes + rows * (inputs * used.input_bytes + outputs * 2)
        part = Part(
            name=fqn, group="linears", flops=2 * rows * outputs * inputs, products=used.products, bytes=round(moved)
        )
        return part.seconds(device)

    return seconds


def stored_bytes(model: nn.Module, mix: Mix, searched: Sequence[str]) -> float:
    """Bytes of the searched linears' weights under a mix."""
    shapes = _shapes(model)
    return sum(math.prod(shapes[fqn]) * SCHEMES[mix.get(fqn, UNQUANTIZED)].weight_bytes for fqn in searched)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.weight.shape) for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def _runs_on(scheme: str, device: Device) -> bool:
    if scheme not in SCHEMES or scheme == UNQUANTIZED:
        raise SearchError(f"scheme is {scheme!r}, expected one of {', '.join(s for s in SCHEMES if s != UNQUANTIZED)}")
    try:
        return device.peak(SCHEMES[scheme].products) > 0
    except ValueError:
        return False


def _key(model: CogVideoXModel, samples: Sequence[Sample], base: Recipe, schemes: Sequence[str]) -> str:
    """What the measurements depend on."""
    digest = hashlib.sha256(base.to_toml().encode() + " ".join(schemes).encode())
    for sample in samples:
        for name, tensor in sorted(sample.items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(f"{hash_weights(model)} {model.dtype}".encode())
    return digest.hexdigest()[:24]


def finite_db(error: float) -> float | None:
    """SQNR in dB of a relative squared error; None where nothing is lost or everything is."""
    return -10 * math.log10(error) if 0 < error < math.inf else None


__all__ = ["Outcome", "SearchError", "calibrate", "find_recipe", "finite_db", "stored_bytes"]
