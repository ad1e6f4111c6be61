"""What is on a model beside its weights: hooks, patches, other modules. The one place that looks.

Weights are taken from a model, so behaviour has to be looked at: what somebody attached to it goes on working, or is
refused with its name.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cogx_fast.attention.backends import BACKENDS, Backend
from cogx_fast.model.part import PLACING, AttachedError, does_not_work
from cogx_fast.model.transformer import Attention

_HERE = Path(__file__).resolve().parent.parent
_TORCH = Path(torch.__file__).resolve().parent
_TORCH_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
AFTERWARDS = "undo it, and attach it to the model that is returned (its blocks see one stream of text and video)"
NOT_HERE = "use diffusers' own transformer with it"
ADAPTERS = (
    "PEFT's adapters cannot stand in this model, whose projections are fused: to train one, model.add_adapter(config) "
    "takes them apart; to use one, pipe.load_lora_weights(file), or load(..., loras=[file]), merges it into the weights"
)
_CHOOSE = f"choose a kernel with set_attention_backend, one of {', '.join(BACKENDS)}"
_PROCESSORS = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
_BEFORE = "call accelerate before enabling caching, layerwise casting or group offloading"


@dataclass(frozen=True)
class Attached:
    """Something on a module that is not among its weights."""

    where: str
    """The module's name; empty is the model itself."""
    what: str
    remedy: str
    kind: str
    """``hook`` or ``patch``: the caller's own code; ``placing``: moves or casts weights; ``caching``: diffusers' hooks
    that skip work; ``module``: another module, class or setting."""
    object: Any = None
    """What is called, where something is."""


def refuse(found: list[Attached], sentence: str) -> None:
    """Raise ``AttachedError`` if there is any: the sentence, the first few by name, and what to do about them."""
    if found:
        remedies = "; ".join(dict.fromkeys(each.remedy for each in found[:3]))
        raise AttachedError(f"{sentence}: {named(found)}. What to do: {remedies}")


def named(found: list[Attached]) -> str:
    """What is attached, in words: each thing with the first place where it is."""
    places: dict[str, list[str]] = {}
    for each in found:
        places.setdefault(each.what, []).append(each.where or "the model")
    words = [
        f"{what} on {where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")
        for what, where in places.items()
    ]
    return ", ".join(words[:3]) + (f", and {len(words) - 3} more" if len(words) > 3 else "")


# -- on a module, of any library ---------------------------------------------------------------------------------------


def on_module(module: nn.Module, where: str = "") -> Iterator[Attached]:
    """What changes how this module runs, without what is on the modules in it."""
    for attribute, kind in _TORCH_HOOKS.items():
        for hook in getattr(module, attribute, {}).values():
            yield Attached(where, f"{kind} {name_of(hook)}", AFTERWARDS, "hook", hook)
    own = vars(module)
    if (placed := own.get("_hf_hook")) is not None:
        remedy = "call cogx_fast.accelerate(pipe), which keeps them on the pipeline, or pipe.remove_all_hooks() first"
        yield Attached(where, f"accelerate's {_hook_names(placed)}", remedy, "placing", placed)
    registered = getattr(own.get("_diffusers_hook"), "hooks", {})
    for name, hook in registered.items():
        if name in PLACING:
            yield Attached(where, f"diffusers' hooks for {name}", _BEFORE, "placing", hook)
        elif does_not_work(hook, name):
            remedy = f"{NOT_HERE}, or take it away (remove_hook({name!r}))"
            yield Attached(where, f"diffusers' hooks for {name} ({type(hook).__name__})", remedy, "caching", hook)
        else:
            yield Attached(where, f"hook {name} ({name_of(type(hook))})", AFTERWARDS, "hook", hook)
    patch = patched_forward(module)
    if patch is not None and placed is None and not registered:
        yield Attached(where, f"a forward of its own ({name_of(patch)})", AFTERWARDS, "patch", patch)


def on_modules(module: nn.Module, where: str = "", *, itself: bool = True) -> list[Attached]:
    """The same for a module and all in it; ``itself=False`` leaves out the module itself."""
    return [
        found
        for name, part in module.named_modules()
        if name or itself
        for found in on_module(part, f"{where}.{name}".strip("."))
    ]


def patched_forward(module: nn.Module) -> Any:
    """The ``forward`` that somebody gave this very module, or its class where that is ours or torch's; None for what
    its class was written with, compiled or not."""
    forward = vars(module).get("forward")
    if forward is None:
        return _patched_class(type(module))
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if getattr(forward, "__func__", None) is type(module).forward:
        return None
    inside = module._modules.get("_orig_mod")  # torch.compile's wrapper calls what is in it
    if inside is not None and inside in (getattr(forward, "__self__", None), getattr(forward, "__wrapped__", None)):
        return None if _is_torchs(forward) else forward
    return forward


def _patched_class(kind: type[nn.Module]) -> Any:
    """The ``forward`` that somebody gave a class of ours or of torch's; None for what it was written with."""
    if not kind.__module__.startswith(("cogx_fast.", "torch.nn.")):
        return None
    home = _home(kind.forward)
    return None if home is not None and (home.is_relative_to(_HERE) or home.is_relative_to(_TORCH)) else kind.forward


def _home(function: Any) -> Path | None:
    """The file in which a function, or the class of a callable, was written, whatever it says of itself."""
    code = getattr(inspect.unwrap(function, stop=lambda wrapper: not _is_torchs(wrapper)), "__code__", None)
    try:
        return _resolved(code.co_filename if code is not None else inspect.getfile(type(function)))
    except (TypeError, OSError):  # of a class built in
        return None


def _is_torchs(function: Any) -> bool:
    """Whether it is a wrapper of torch's (``no_grad``, a region to compile) around another function."""
    code = getattr(function, "__code__", None)
    return code is not None and _resolved(code.co_filename).is_relative_to(_TORCH)


@functools.cache
def _resolved(path: str) -> Path:
    return Path(path).resolve()


def is_original(kind: type, name: str, value: Any) -> bool:
    """Whether a method of a class is the one it was written with: judged by where its code is."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    owner: str = getattr(inspect.unwrap(value), "__qualname__", "")
    return is_from(value, kind.__module__) and owner.rpartition(".")[0] == kind.__qualname__


def is_from(function: Any, module: str) -> bool:
    """Whether the function's code was written in the package that the module belongs to."""
    package = sys.modules.get(module.partition(".")[0])
    home = _home(function)
    return home is not None and package is not None and home.is_relative_to(_resolved(str(package.__file__)).parent)


def name_of(thing: Any) -> str:
    """The full name of a function, of a class or of an object's class."""
    thing = getattr(thing, "func", thing)
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}"


def _hook_names(hook: Any) -> str:
    return " and ".join(type(each).__name__ for each in getattr(hook, "hooks", (hook,)))


def without_adapter(module: nn.Module) -> nn.Module:
    """The module itself, or that in PEFT's adapters around it (``weights.live`` sees to it that they are merged)."""
    while hasattr(module, "base_layer") and hasattr(module, "merged_adapters"):
        module = module.base_layer  # type: ignore[assignment]  # a module
    return module


# -- on our own model, while it is used --------------------------------------------------------------------------------


def check_own(model: nn.Module) -> None:
    """Refuse what would do nothing, or half of it, on a model of ours.

    Raises:
        AttachedError: (a ValueError) diffusers' caches, PEFT's adapters, processors; the message names them.
    """
    found = [each for each in on_modules(model) if each.kind == "caching"]
    is_split = any(isinstance(module, Attention) and module.is_split for module in model.modules())
    for name, module in model.named_modules():
        if without_adapter(module) is not module and not is_split:
            found.append(Attached(name, f"an adapter ({name_of(type(module))})", ADAPTERS, "module"))
        elif isinstance(module, Attention):
            processor = vars(module).get("processor", module._modules.get("processor"))
            if processor is not None and not _is_upstreams(processor):
                found.append(Attached(name, f"attention processor {name_of(type(processor))}", _CHOOSE, "module"))
    refuse(found, "this model cannot use what was attached to it")


def check_processor(processor: Any) -> None:
    """Refuse an attention processor that computes anything else than this model does.

    Raises:
        AttachedError: (a ValueError) it is neither diffusers' own for CogVideoX nor one of our backends.
    """
    if not isinstance(processor, Backend) and not _is_upstreams(processor):
        name = name_of(type(processor))
        raise AttachedError(f"attention processor {name} cannot run in this model: {_CHOOSE}")


def _is_upstreams(processor: Any) -> bool:
    """Whether it is diffusers' own for CogVideoX, untouched: what it computes is what is computed here."""
    kind = type(processor)
    if kind.__name__ not in _PROCESSORS or not kind.__module__.startswith("diffusers."):
        return False
    return is_original(kind, "__call__", kind.__call__)


def take_off_adapters(model: nn.Module) -> None:
    """Put the modules back around which PEFT put adapters."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            setattr(part, name, without_adapter(child))


def refuse_inside_package(model: nn.Module) -> None:
    """Refuse what is attached inside the blocks of a package, whose code is compiled already and calls nothing of it.

    Raises:
        AttachedError: (a ValueError) there is something.
    """
    blocks = model.get_submodule("transformer_blocks").named_children()
    found = [each for name, block in blocks for each in on_modules(block, f"transformer_blocks.{name}", itself=False)]
    remedy = "attach it to a whole block or the model, or use load(..., compile=True) in the package's place"
    refuse([replace(each, remedy=remedy) for each in found], "a package runs its blocks without what is inside them")


class Watch:
    """Says at every call whether anything may have been attached or taken away since the last look.

    That costs some tens of microseconds, so modules are only walked when it says yes: every module's number of
    attributes is compared, the modules in it, and torch's count of all hooks ever registered.
    """

    def __init__(self) -> None:
        self._noted: list[Any] | None = None

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()  # a copy of the model has other modules

    def has_changed(self) -> bool:
        """True until ``note``, and when the model is not as it was then."""
        return self._noted is None or self._now() != self._noted

    def note(self, model: nn.Module) -> None:
        """Take the model as it is now for looked at."""
        modules = list(model.modules())
        registries = (getattr(vars(module).get("_diffusers_hook"), "hooks", None) for module in modules)
        hooks = (getattr(module, attribute, None) for module in modules for attribute in _TORCH_HOOKS)
        self._sized = [*map(vars, modules), *filter(None, registries), *filter(None, hooks)]
        self._children = [module._modules for module in modules if module._modules]
        self._forwards = [vars(module) for module in modules if "forward" in vars(module)]
        self._classes: list[Any] = list(dict.fromkeys(map(type, modules)))
        self._noted = self._now()

    def _now(self) -> list[Any]:
        children = chain.from_iterable(map(dict.values, self._children))
        forwards = (own.get("forward") for own in self._forwards)
        classes = (kind.forward for kind in self._classes)
        return [RemovableHandle.next_id, *map(len, self._sized), *children, *forwards, *classes]


__all__ = [
    "ADAPTERS",
    "AFTERWARDS",
    "NOT_HERE",
    "Attached",
    "AttachedError",
    "Watch",
    "check_own",
    "check_processor",
    "is_from",
    "is_original",
    "name_of",
    "named",
    "on_module",
    "on_modules",
    "refuse",
    "refuse_inside_package",
    "take_off_adapters",
    "without_adapter",
]
