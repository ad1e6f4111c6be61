"""What every module of the transformer is, and which of diffusers' hooks it takes."""

from __future__ import annotations

from typing import Any

from torch import nn

PLACING = (
    "group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "layerwise_casting",
    "peft_autocast_disable",
)  # fmt: skip
"""diffusers' hooks that move or cast weights and leave what is computed alone: they work on any module."""


class AttachedError(ValueError):
    """Something is attached to a model that cannot work there; the message names it and says what to do."""


def does_not_work(hook: Any, name: str) -> bool:
    """Whether it is one of diffusers' hooks into its own blocks (caches, layer skipping, parallel attention).

    They take two streams, of text and of video, and the order of arguments of diffusers' modules. A caller's own hooks
    are the caller's to write.
    """
    return name not in PLACING and type(hook).__module__.startswith("diffusers.")


class Part(nn.Module):
    """A module on which diffusers' functions (``apply_pyramid_attention_broadcast``, …) register no hook in vain."""

    @property
    def _diffusers_hook(self) -> Any:
        try:
            return vars(self)["_diffusers_hook"]
        except KeyError:
            raise AttributeError("_diffusers_hook") from None

    @_diffusers_hook.setter
    def _diffusers_hook(self, registry: Any) -> None:
        kind = type(registry)

        class Registry(kind):  # type: ignore[misc,valid-type]  # diffusers' own, which is not imported here
            """diffusers' registry of this module's hooks; refuses those that would not do what they are for."""

            def register_hook(self, hook: Any, name: str) -> None:
                if does_not_work(hook, name):
                    raise AttachedError(
                        f"{name} ({type(hook).__name__}) hooks into the separate text and video streams of diffusers' "
                        "blocks, which this model does not have: use diffusers' own transformer with it"
                    )
                super().register_hook(hook, name)

        registry.__class__ = Registry
        vars(self)["_diffusers_hook"] = registry


__all__ = ["PLACING", "AttachedError", "Part", "does_not_work"]
