"""A recipe on a model: decided for every linear before any weight is touched, then carried out by torchao."""

from __future__ import annotations

import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quant.errors import QuantError
from quant.linear import Choice, LinearReport, Shape, quantize_linear
from quant.recipe import Recipe, load_recipe
from quant.schemes import SCHEMES, torchao_config

if TYPE_CHECKING:
    from torchao.quantization import FqnToConfig

OnUnsupported = Literal["error", "nearest"]

_UNNAMED = "no rule of the recipe names it"
_RECIPE = "_quant_recipe"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a model: an entry for each linear, in the model's order."""

    recipe: Recipe
    linears: tuple[LinearReport, ...]

    @property
    def bytes_before(self) -> int:
        """Of the weights of all linears."""
        return sum(linear.bytes_before for linear in self.linears)

    @property
    def bytes_after(self) -> int:
        """Of the weights of all linears."""
        return sum(linear.bytes_after for linear in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without infinities (null)."""
        linears = [
            asdict(linear) | {"sqnr_db": None if linear.sqnr_db in (None, math.inf) else linear.sqnr_db}
            for linear in self.linears
        ]
        return {
            "recipe": self.recipe.name,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "linears": linears,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's decision for every linear of a model."""

    recipe: Recipe
    choices: Mapping[str, Choice]
    """By the linears' names, in the model's order."""
    replaced: str | None = None
    """Under ``on_unsupported="nearest"``: what stands in for what and why, in words."""

    def to_torchao(self) -> FqnToConfig:
        """The same as torchao's own configuration, for ``quantize_(model, config, filter_fn=None)``."""
        from torchao.quantization import FqnToConfig

        configs = OrderedDict((name, torchao_config(c.scheme)) for name, c in self.choices.items() if c.scheme)
        return FqnToConfig(fqn_to_config=configs)

    @torch.no_grad()
    def apply(
        self, module: nn.Module, prefix: str = "", *, device: torch.device | None = None, measure: bool = True
    ) -> list[LinearReport]:
        """Quantize the linears of a model, or of a part of one.

        Args:
            module: the model, a part of it, or one of its linears; changed in place.
            prefix: its name in the model; "" for the model itself.
            device: where to bring each linear before it is quantized; None leaves it.
            measure: compute each weight's SQNR, which costs about as much as quantizing it.

        Returns:
            A report for each linear of ``module``.

        Raises:
            QuantError: a linear that was not planned, or weights that are elsewhere than the plan was made for.
        """
        reports = []
        for name, linear in linears(module):
            fqn = ".".join(filter(None, (prefix, name)))
            if fqn not in self.choices:
                raise QuantError(f"{fqn} is not in the plan for {self.recipe.name!r}: make the plan of this model")
            if device is not None:
                linear.to(device)
            reports.append(quantize_linear(fqn, linear, self.choices[fqn], measure=measure))
        return reports


def plan(
    target: nn.Module | Iterable[tuple[str, Shape]],
    recipe: str | os.PathLike[str] | Recipe,
    *,
    on_unsupported: OnUnsupported = "error",
    device: torch.device | str | None = None,
) -> Plan:
    """Decide what becomes of every linear of a model; no weight is read or changed.

    Args:
        target: a model (its weights may be on the meta device), or its linears' names and (outputs, inputs).
        recipe: a shipped recipe's name, a ``.toml`` file, or a recipe.
        on_unsupported: where a scheme cannot run: "error", or "nearest" for the nearest one that can, with one warning
            for all (fp8-dynamic and fp8-dynamic-tensor → int8-dynamic → int8-weight-only; int4-weight-only →
            int8-weight-only).
        device: where the model will run; None is where its weights are. What hardware there is stays unchecked where
            neither is known.

    Returns:
        The plan.

    Raises:
        QuantError: a pattern that matches no linear, a linear that two rules match, or what cannot run there; the
            message says which line of the recipe.
    """
    planned = _decide(target, recipe, on_unsupported, None if device is None else torch.device(device))
    if planned.replaced:
        warnings.warn(planned.replaced, stacklevel=2)
    return planned


def _decide(
    target: nn.Module | Iterable[tuple[str, Shape]],
    source: str | os.PathLike[str] | Recipe,
    on_unsupported: OnUnsupported,
    place: torch.device | None,
) -> Plan:
    if on_unsupported not in ("error", "nearest"):
        raise QuantError(f"on_unsupported is {on_unsupported!r}, expected 'error' or 'nearest'")
    recipe = load_recipe(source)
    if isinstance(target, nn.Module):
        _refuse_adapters(target)
        found = {name: _described(name, linear, place) for name, linear in linears(target)}
    else:
        found = {name: _Linear(shape=shape, dtype=None, device=place) for name, shape in target}
    if not found:
        raise QuantError("the model has no linear: there is nothing to quantize")
    owners = _match(recipe, list(found))
    replaced: dict[str, list[str]] = {}
    if place is None:
        place = next((linear.device for linear in found.values() if linear.device is not None), None)
    unmet = None if place is None else recipe.requires.unmet(place)
    if unmet and on_unsupported == "error":
        raise QuantError(f"{recipe.origin}: recipe {recipe.name!r} cannot run here: {unmet}. {_ADVICE}")
    choices = {}
    for name, linear in found.items():
        index = owners.get(name)
        rule = None if index is None else recipe.rules[index]
        if rule is None or rule.scheme is None:
            choices[name] = Choice(scheme=None, reason=_UNNAMED if rule is None else rule.skip)
            continue
        scheme, why = _runnable(rule.scheme, linear, nearest=on_unsupported == "nearest")
        if scheme is None:
            raise QuantError(f"{recipe.where(owners[name])}: {rule.scheme} cannot be used for {name}: {why}. {_ADVICE}")
        if scheme != rule.scheme:
            replaced.setdefault(f"{scheme} in place of {rule.scheme}, since {why}", []).append(name)
        choices[name] = Choice(scheme=scheme)
    words = "; ".join(f"{names[0]}{_others(names)}: {change}" for change, names in replaced.items())
    return Plan(recipe=recipe, choices=choices, replaced=f"recipe {recipe.name!r}: {words}" if words else None)


def quantize(
    model: nn.Module,
    recipe: str | os.PathLike[str] | Recipe,
    *,
    on_unsupported: OnUnsupported = "error",
    device: torch.device | str | None = None,
) -> Report:
    """Quantize a model's linears in place. A recipe with dynamic schemes is slow unless the model is then compiled.

    Args:
        model: any model whose linears the recipe names.
        recipe: a shipped recipe's name, a ``.toml`` file, or a recipe.
        on_unsupported: as for ``plan``.
        device: where the model goes, each linear just before it is quantized there; None leaves it where it is.

    Returns:
        What became of every linear.

    Raises:
        QuantError: as for ``plan``, before any weight is touched.
    """
    place = None if device is None else torch.device(device)
    planned = _decide(model, recipe, on_unsupported, place)
    absent = [name for name, linear in linears(model) if linear.weight.device.type == "meta"]
    if absent:
        raise QuantError(f"{absent[0]}{_others(absent)} hold no values (meta device): load the weights first")
    if planned.replaced:
        warnings.warn(planned.replaced, stacklevel=2)
    reports = planned.apply(model, device=place)
    if place is not None:
        model.to(place)
    remember(model, planned.recipe)
    return Report(recipe=planned.recipe, linears=tuple(reports))


def remember(model: nn.Module, recipe: Recipe) -> None:
    """Note in a model with which recipe it was quantized."""
    setattr(model, _RECIPE, recipe)


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe that a model was quantized with, or None."""
    return getattr(model, _RECIPE, None)


def linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of a module by name, in its order; of one that is a linear, itself under ""."""
    return [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear)]


_ADVICE = "Choose another scheme, skip it, or pass on_unsupported='nearest' to quantize()"


@dataclass(frozen=True, kw_only=True)
class _Linear:
    shape: Shape
    dtype: torch.dtype | None
    device: torch.device | None


def _described(name: str, linear: nn.Linear, place: torch.device | None) -> _Linear:
    if type(linear.weight) not in (Tensor, nn.Parameter):
        kind = type(linear.weight).__name__
        raise QuantError(f"{name}: its weight is a {kind}, quantized already or distributed: load the model anew")
    device = place or (None if linear.weight.device.type == "meta" else linear.weight.device)
    outputs, inputs = linear.weight.shape
    return _Linear(shape=(outputs, inputs), dtype=linear.weight.dtype, device=device)


def _refuse_adapters(model: nn.Module) -> None:
    adapters = [name for name, _ in model.named_modules() if ".base_layer" in name or "lora_A" in name]
    if adapters:
        raise QuantError(f"{adapters[0]}{_others(adapters)} belong to adapters (LoRA): fuse and unload them first")


def _match(recipe: Recipe, names: list[str]) -> dict[str, int]:
    """The rule of each linear that one names."""
    owners: dict[str, int] = {}
    for index, rule in enumerate(recipe.rules):
        for pattern in rule.match:
            if not rule.optional and not any(rule.matches(name, pattern) for name in names):
                raise QuantError(
                    f"{recipe.where(index)}: {pattern!r} matches none of the model's {len(names)} linears, such as "
                    f"{names[len(names) // 2]}: correct it, or write optional = true if only some models have it"
                )
        for name in filter(rule.matches, names):
            if name in owners:
                raise QuantError(
                    f"{recipe.where(index)}: it matches {name}, and so does the rule of "
                    f"{recipe.where(owners[name]).rpartition(', ')[2]}: make one of them narrower"
                )
            owners[name] = index
    return owners


def _runnable(scheme: str, linear: _Linear, *, nearest: bool) -> tuple[str | None, str]:
    """The scheme, or where allowed the nearest, that a linear can have; and why the one asked for cannot be."""
    first, name = "", scheme
    while True:
        why = SCHEMES[name].unmet(linear.shape, linear.dtype, linear.device)
        if why is None:
            return name, first
        first, following = first or why, SCHEMES[name].nearest
        if not nearest or following is None:
            return None, first
        name = following


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


__all__ = [
    "Choice", "LinearReport", "OnUnsupported", "Plan", "Report", "linears", "plan", "quantize", "recipe_of", "remember",
]  # fmt: skip
