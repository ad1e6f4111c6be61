"""Which attention a model's blocks use, and who chose it: the part of the model's class that says and changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cogx_fast.attention.backends import BACKENDS, UPSTREAM_NAMES, Backend, ready_backend
from cogx_fast.attention.plan import AttentionPlan
from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import Attention, Block
from cogx_fast.runtime import composition
from cogx_fast.runtime.attached import check_processor
from cogx_fast.runtime.auto_attention import AttentionFor, Choice, choose_attention
from cogx_fast.runtime.inputs import Preparation
from cogx_fast.runtime.runner import Runner


class AttentionMethods:
    """The methods of a model that say and change how it attends."""

    if TYPE_CHECKING:  # what the model has
        config: TransformerConfig
        device: torch.device
        dtype: torch.dtype
        inputs: Preparation
        runner: Runner
        transformer_blocks: nn.ModuleList
        attention_choice: Choice | None
        _attention_for: AttentionFor | None
        _attention_is_named: bool

    @property
    def attention_backends(self) -> dict[str, None]:
        """Names of the attention backends in use, usually one."""
        return dict.fromkeys(attention.backend for attention in self._attentions())

    def _attentions(self) -> Iterator[Attention]:
        return (cast(Block, block).attn1 for block in self.transformer_blocks)

    def _attend_on(self, device: torch.device) -> None:
        """``attention="auto"``: choose again for a call on another device, unless a backend was named since."""
        question = self._attention_for
        if question is not None and question.device != device and not self._attention_is_named:
            self._choose_attention(dataclasses.replace(question, device=device))

    @property
    def attn_processors(self) -> dict[str, Backend]:
        """The attention backend of each layer, under the names that diffusers gives its processors."""
        return {
            f"transformer_blocks.{index}.attn1.processor": BACKENDS[attention.backend]
            for index, attention in enumerate(self._attentions())
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Accept diffusers' own CogVideoX processors (what they compute is what is computed here) and our backends.

        Args:
            processor: one for all layers, or a dict of one for each name in ``attn_processors``.

        Raises:
            ValueError: another processor, which cannot run inside this model; or a dict of other names.
        """
        layers = self.attn_processors
        if isinstance(processor, Mapping) and len(processor) != len(layers):
            raise ValueError(
                f"a dict of {len(processor)} processors is given, but there are {len(layers)} attention layers: pass "
                f"{len(layers)}, by the names in attn_processors"
            )
        if isinstance(processor, Mapping) and processor.keys() != layers.keys():
            unknown = sorted(processor.keys() - layers.keys(), key=str)
            raise ValueError(f"processors {', '.join(map(str, unknown[:3]))} are of no layer: see attn_processors")
        processors = list(processor.values()) if isinstance(processor, Mapping) else [processor]
        for chosen in processors:
            check_processor(chosen)
        names = {chosen.name for chosen in processors if isinstance(chosen, Backend)}
        if len(names) > 1:
            raise ValueError(f"one attention backend for all layers, got {sorted(names)}")
        if names:
            self.set_attention_backend(names.pop())

    def set_attention_backend(self, backend: str) -> None:
        """Use another attention backend from the next call on (a compiled model compiles again).

        Args:
            backend: one of ``attention.backends.BACKENDS``, or diffusers' name for one of them ("native",
                "_native_cudnn", "flash", …).

        Raises:
            PlanError: (a ValueError) the model has an attention plan, and that backend takes no block masks.
            ValueError: there is no backend of that name, it cannot run here, or the model runs a package; the message
                says what to do.
        """
        self.runner.refuse_packaged(f"the attention backend cannot be set to {backend!r}")
        name = UPSTREAM_NAMES.get(backend.lower(), backend)
        composition.check(composition.of_attention([name], has_plan=self.attention_plan is not None))
        self._use_attention(name, self.device)
        self._attention_is_named = True

    def reset_attention_backend(self) -> None:
        """Go back to what ``load(attention="auto")`` chooses, else torch's own (with a plan, flex).

        Raises:
            ValueError: it cannot run where the model is now.
        """
        if self._attention_for is None:
            self.set_attention_backend("sdpa" if self.inputs.plan is None else "flex")
        else:
            self._choose_attention(dataclasses.replace(self._attention_for, device=self.device))

    def _use_attention(self, backend: str, device: torch.device) -> None:
        head_dim = self.config.attention_head_dim
        name = ready_backend(backend, device=device, dtype=self.dtype, head_dim=head_dim).name
        for attention in self._attentions():
            attention.backend, attention.masked_backend = name, None

    def _choose_attention(self, question: AttentionFor) -> None:
        """``attention="auto"``: use what is fastest there, which may be elsewhere than the weights are at load time."""
        choice = choose_attention(question.shape, self.dtype, question.device, compiled=question.compiled)
        self._use_attention(choice.name, question.device)
        for attention in self._attentions():  # the fastest may take no mask of the caller's, and no call is refused
            attention.masked_backend = "sdpa" if BACKENDS[choice.name].masks is not Tensor else None
        self.attention_choice, self._attention_for, self._attention_is_named = choice, question, False

    @property
    def attention_plan(self) -> AttentionPlan | None:
        """The sparse attention in use, or None."""
        return self.inputs.plan

    def set_attention_plan(self, plan: AttentionPlan | None) -> None:
        """Use another attention plan, or none, from the next call on (a compiled model compiles again).

        Raises:
            PlanError: (a ValueError) it is another model's, or the model's attention backend takes no block masks.
            ValueError: the model runs a package.
        """
        self.runner.refuse_packaged("the attention plan cannot be changed")
        if plan is not None:
            attention = composition.of_attention(self.attention_backends, has_plan=True)
            composition.check({**self.runner.features(), **attention})
            plan.check(self.config, cast(Any, self))
        self.inputs.plan = plan
        self.inputs.tables.clear()


__all__ = ["AttentionMethods"]
