"""A model whose weights are taken is compared with a fresh one: nothing on it may be lost without a word."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.runtime.attached import (
    AFTERWARDS,
    NOT_HERE,
    Attached,
    is_from,
    is_original,
    name_of,
    on_module,
    refuse,
    without_adapter,
)

_STATE_HOOKS = {
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}


def check_source(source: nn.Module, config: TransformerConfig) -> None:
    """Refuse to take a model's weights where something on it would be lost: it is compared with a fresh one.

    Args:
        source: diffusers' model or one of ours, maybe in torch.compile's wrapper.
        config: its configuration.

    Raises:
        AttachedError: (a ValueError) hooks, patches, processors, other modules, settings; the message names them.
    """
    model = getattr(source, "_orig_mod", source)
    with torch.device("meta"):
        if isinstance(model, CogVideoXTransformer):
            fresh: nn.Module = type(model)(config)
        else:
            from diffusers import CogVideoXTransformer3DModel

            fresh = CogVideoXTransformer3DModel(**config)
    found = [*_patched_classes(fresh), *_differences("", source, fresh)]
    refuse(found, f"the given {type(model).__name__} would lose what is on it beside its weights")


def _differences(where: str, module: nn.Module, fresh: nn.Module) -> Iterator[Attached]:
    while (inside := module._modules.get("_orig_mod")) is not None:  # torch.compile's wrapper
        yield from on_module(module, where)
        module = inside
    module = without_adapter(module)
    changed = _changed_class(type(module), type(fresh))
    if changed is not None:
        yield Attached(where, changed, f"put {name_of(type(fresh))} back, or {NOT_HERE}", "module", module)
        return
    yield from on_module(module, where)
    for attribute, kind in _STATE_HOOKS.items():
        ours = set(map(name_of, getattr(fresh, attribute, {}).values()))
        for hook in getattr(module, attribute, {}).values():
            if name_of(hook) not in ours:
                yield Attached(where, f"{kind} {name_of(hook)}", AFTERWARDS, "hook", hook)
    for name, parameter in module.named_parameters(recurse=False):
        for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)):
            for hook in (hooks or {}).values():
                yield Attached(f"{where}.{name}".strip("."), f"gradient hook {name_of(hook)}", AFTERWARDS, "hook", hook)
    yield from _changed_attributes(where, module, fresh)
    for name, child in fresh.named_children():
        if isinstance(inner := module._modules.get(name), nn.Module):
            yield from _differences(f"{where}.{name}".strip("."), inner, child)
        else:
            yield Attached(f"{where}.{name}".strip("."), "no module", f"put {name_of(type(child))} back", "module")
    for name in module._modules.keys() - fresh._modules.keys() - {"to_qkv"}:  # what unfusing leaves behind
        yield Attached(where, f"an added module {name}", f"take it away, or {NOT_HERE}", "module")


_ANY_CLASS_HAS = {"__init__", "__init_subclass__", "__new__", "__repr__", "extra_repr"}


def _changed_class(kind: type[nn.Module], fresh: type[nn.Module]) -> str | None:
    """What a module of another class is called; None where the class is the same or changes nothing that runs."""
    if kind is fresh:
        return None
    if not issubclass(kind, fresh):
        return f"a module of {name_of(kind)}"
    derived = kind.__mro__[: kind.__mro__.index(fresh)]
    changed = [
        name for each in derived for name, value in vars(each).items()
        if callable(value) and hasattr(fresh, name) and name not in _ANY_CLASS_HAS
    ]  # fmt: skip
    return f"a class {name_of(kind)} with its own {', '.join(changed)}" if changed else None


_HARMLESS = {
    "training", "gradient_checkpointing", "forward", "extra_repr",
    "fused_projections",  # says that fused copies are there
    "backend", "attention_choice", "runner", "merged",  # of ours: load's to choose
}  # fmt: skip
_OF_ACCELERATE = {"to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"}  # warn, once it placed the model
_PLAIN = (bool, int, float, str, tuple, types.NoneType)


def _changed_attributes(where: str, module: nn.Module, fresh: nn.Module) -> Iterator[Attached]:
    """Attributes that a fresh module has otherwise, and functions put in place of its class's."""
    expected = vars(fresh)
    for name, value in vars(module).items():
        if name in _HARMLESS or name in ("_compiled_call_impl", "_hf_hook", "_diffusers_hook", "_old_forward"):
            continue
        if name not in expected:
            if callable(value) and hasattr(type(module), name) and name not in _OF_ACCELERATE:
                yield Attached(where, f"a {name} of its own ({name_of(value)})", AFTERWARDS, "patch", value)
        elif name.startswith("_"):
            continue
        elif name == "processor":
            if type(value) is not type(expected[name]):
                remedy = f"choose a kernel with attention=..., or {NOT_HERE}"
                yield Attached(where, f"attention processor {name_of(type(value))}", remedy, "module", value)
        elif isinstance(expected[name], _PLAIN):
            if type(value) is not type(expected[name]) or value != expected[name]:
                what = f"{name} = {value!r} (its configuration gives {expected[name]!r})"
                yield Attached(where, what, "set it back", "module")
        elif type(value) is not type(expected[name]) or (inspect.isfunction(value) and value is not expected[name]):
            yield Attached(where, f"{name} = {name_of(value)}", "set it back", "module", value)


# -- on classes --------------------------------------------------------------------------------------------------------


def _patched_classes(fresh: nn.Module) -> Iterator[Attached]:
    """Methods of the model's classes that somebody replaced: judged by where their code was written."""
    kinds = dict.fromkeys(type(module) for module in fresh.modules())
    processors = (vars(module).get("processor") for module in fresh.modules())
    kinds |= dict.fromkeys(type(processor) for processor in processors if processor is not None)
    packages = ("torch", type(fresh).__mro__[0].__module__.partition(".")[0])
    bases = [base for kind in kinds for base in kind.__mro__ if base.__module__.partition(".")[0] in packages]
    for kind in dict.fromkeys(base for base in bases if base is not nn.Module):
        everything = kind in kinds and not kind.__module__.startswith("torch.") and kind is not type(fresh)
        for name, value in vars(kind).items():
            checked = name in ("forward", "__call__") or (everything and inspect.isfunction(value))
            if checked and not is_original(kind, name, value):
                what = f"a {name} that is not its own ({name_of(value)})"
                yield Attached(f"the class {kind.__name__}", what, f"undo it, or {NOT_HERE}", "patch", value)
    yield from _patched_functions(kinds)


def _patched_functions(kinds: Iterable[type]) -> Iterator[Attached]:
    """Functions of diffusers' modules that somebody replaced, among those that the classes' methods call by name."""
    methods = [inspect.unwrap(each) for kind in kinds for each in vars(kind).values() if inspect.isfunction(each)]
    called = {name for method in methods for name in method.__code__.co_names}
    homes = {kind.__module__ for kind in kinds} | {"diffusers.models.embeddings"}  # processors import what is there
    for home in sorted(each for each in homes if each.startswith("diffusers.") and each in sys.modules):
        for name, value in vars(sys.modules[home]).items():
            own = is_from(value, "diffusers") or is_from(value, "torch") if inspect.isfunction(value) else True
            if name in called and not own:
                what = f"a {name} that is not its own ({name_of(value)})"
                yield Attached(home, what, f"undo it, or {NOT_HERE}", "patch", value)


__all__ = ["check_source"]
