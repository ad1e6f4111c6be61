"""accelerate's hooks on a model: lifted while its weights are taken, then put on the model that comes in its place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cogx_fast.runtime.attached import AttachedError


class Placement:
    """How accelerate placed a model: offloaded whole, module by module, or kept on a device.

    Args:
        model: looked at, not changed.

    Raises:
        AttachedError: (a ValueError) hooks that another model cannot be given; the message names them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._root = vars(model).get("_hf_hook")
        self._inner = {name: hook for name, part in model.named_modules() if name for hook in _hooks(part)}
        self._offloading = [hook for hook in self._inner.values() if getattr(hook, "offload", False)]
        reason = self._why_not()
        if reason is not None:
            raise AttachedError(
                f"the pipeline's transformer cannot be replaced as it is placed: {reason}. What to do: call "
                "accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True) first; or put it on one "
                "device, or offload it with pipe.enable_model_cpu_offload() or pipe.enable_sequential_cpu_offload()"
            )

    def _why_not(self) -> str | None:
        hooks = [*self._inner.items()]
        if self._offloading:
            hooks += [("the model", hook) for hook in _hooks(self._model)]
        odd = [f"{type(hook).__name__} on {name}" for name, hook in hooks if not _is_aligning(hook)]
        if odd:
            return f"accelerate's {odd[0]} does more than place it"
        devices = {str(hook.execution_device) for hook in self._inner.values()}
        if len(devices) > 1 or 0 < len(self._offloading) < len(self._inner):
            also = " and what is offloaded" if self._offloading else ""
            return f"accelerate spreads it over {', '.join(sorted(devices))}{also}"
        if not all(isinstance(_held(hook)[0], dict) for hook in self._offloading):
            return "accelerate offloads it to the disk"
        return None

    @property
    def has_hooks(self) -> bool:
        """Whether there are any."""
        return self._root is not None or bool(self._inner)

    def refuse_layers(self, why: str) -> None:
        """Refuse a model that is offloaded layer by layer.

        Raises:
            AttachedError: (a ValueError) it is.
        """
        if self._offloading:
            raise AttachedError(
                f"the pipeline is offloaded layer by layer (enable_sequential_cpu_offload), but {why}: call "
                "pipe.remove_all_hooks() first, and pipe.enable_model_cpu_offload() after accelerate for the rest"
            )

    def refuse_hooks(self, why: str) -> None:
        """Refuse a model that accelerate places or offloads.

        Raises:
            AttachedError: (a ValueError) it does.
        """
        if self.has_hooks:
            raise AttachedError(
                f"accelerate's hooks place the pipeline's transformer, but {why}: call pipe.remove_all_hooks() first"
            )

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without the hooks, and with the weights that they hold; afterwards the model is exactly as it was."""
        kept = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in self._model.modules()]
        taken: list[tuple[dict[str, Tensor], str, Tensor]] = []
        try:
            for part in self._model.modules():
                for hook in _hooks(part):
                    if getattr(hook, "offload", False):
                        taken += _put_back(part, hook)
                _take_off(part)
            yield
        finally:
            for part, own, parameters, buffers in kept:
                vars(part).clear()
                vars(part).update(own)
                part._parameters.update(parameters)
                part._buffers.update(buffers)
            for held, key, tensor in taken:
                held[key] = tensor.detach()  # by now it may be part of a larger one, which is shared

    def give(self, model: nn.Module) -> None:
        """Place another model as the first one is: on the same device, offloaded in the same way."""
        if self._offloading:
            from accelerate import cpu_offload

            hook = self._offloading[0]
            cpu_offload(model, hook.execution_device, offload_buffers=hook.offload_buffers)
        elif self._root is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(model, self._root)
        if hasattr(self._model, "hf_device_map"):
            model.hf_device_map = self._model.hf_device_map

    def hand_over(self, pipe: Any, model: nn.Module) -> None:
        """Have the pipeline's hooks that move the first model off its device move the other one."""
        parts = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
        before = (getattr(hook, "prev_module_hook", None) for part in parts for hook in _hooks(part))
        for hook in (*getattr(pipe, "_all_hooks", ()), *before):
            if getattr(hook, "model", None) is self._model:
                hook.model = model


def _hooks(part: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module."""
    hook = vars(part).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _is_aligning(hook: Any) -> bool:
    return type(hook).__name__ == "AlignDevicesHook"


def _held(hook: Any) -> tuple[Any, str]:
    """Where a hook has the weights of the module it offloads, and what is before their names there."""
    return getattr(hook.weights_map, "dataset", hook.weights_map), getattr(hook.weights_map, "prefix", "")


def _put_back(part: nn.Module, hook: Any) -> list[tuple[dict[str, Tensor], str, Tensor]]:
    """Take a module's weights out of what holds them, where nobody else then does; returns where they were."""
    held, prefix = _held(hook)
    taken: list[Any] = []
    for name in [name for name, _ in part.named_parameters(recurse=hook.place_submodules)]:
        owner, _, last = name.rpartition(".")
        parameters = part.get_submodule(owner)._parameters
        old = parameters[last]
        parameters[last] = nn.Parameter(held.pop(prefix + name), requires_grad=old is not None and old.requires_grad)
        taken.append((held, prefix + name, parameters[last]))
    for name in [name for name, _ in part.named_buffers(recurse=hook.place_submodules) if prefix + name in held]:
        owner, _, last = name.rpartition(".")
        part.get_submodule(owner)._buffers[last] = held.pop(prefix + name)
        taken.append((held, prefix + name, part.get_submodule(owner)._buffers[last]))
    return taken


def _take_off(part: nn.Module) -> None:
    """Leave a module with the forward that it had before accelerate's hook, if a hook is what was put last."""
    own = vars(part)
    if own.pop("_hf_hook", None) is None:
        return
    before = own.pop("_old_forward", None)
    forward = own.get("forward")
    put_by = getattr(getattr(forward, "func", None), "__qualname__", "")
    if isinstance(forward, functools.partial) and put_by.startswith("add_hook_to_module"):
        own["forward"] = before


__all__ = ["Placement"]
