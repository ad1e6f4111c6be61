"""How a model is asked to run, as one object: what goes together is seen of it, and models are set to it."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from cogx_fast.attention.plan_file import choose_plan
from cogx_fast.runtime import composition
from cogx_fast.runtime.composition import Feature
from cogx_fast.runtime.distributed.sharded import is_asked_for
from cogx_fast.runtime.step_caching.step_schedule_file import choose_strategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cogx_fast.attention.plan import AttentionPlan
    from cogx_fast.runtime.compiling.compile import CompileConfig
    from cogx_fast.runtime.distributed.parallel import ParallelConfig
    from cogx_fast.runtime.module import CogVideoXModel
    from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
    from quant import Recipe


@dataclasses.dataclass(kw_only=True)
class Options:
    """Options of ``load``, under its names, that decide how the model runs."""

    attention: str
    plan: AttentionPlan | str | os.PathLike[str] | None
    step_cache: StepSchedule | str | os.PathLike[str] | None
    parallel: ParallelConfig | DeviceMesh | None
    compile: bool | CompileConfig
    offload: str | None
    quant: str | os.PathLike[str] | Recipe | None
    _split: Any = dataclasses.field(default=None, init=False)
    """What ``parallel`` came to: made once, since the ranks' groups are."""

    def features(self) -> composition.Features:
        """What is asked for, as far as it decides what goes together; told without a model."""
        strategy = None if self.step_cache is None else choose_strategy(self.step_cache)
        return {
            **composition.named(
                None if self.offload is None else Feature.STREAMED,
                None if self.parallel is None else Feature.PARALLEL,
                Feature.SHARDED if is_asked_for(self.parallel) else None,
                composition.feature_of(strategy),
            ),
            **({} if self.quant is None else {Feature.QUANTIZED: f"quant={self.quant!r}"}),
            **composition.of_compile(None if isinstance(self.compile, bool) else self.compile),
            **composition.of_attention([self.attention], has_plan=self.plan is not None),
        }

    def check(self, model: CogVideoXModel) -> None:
        """See on a model without weights that it can run so: nothing is read, or given up, if not."""
        runner = model.runner
        if self.plan is not None:
            model.set_attention_plan(dataclasses.replace(choose_plan(self.plan, model.config), weights_hash=None))
        self._set(model)
        model.set_attention_plan(None)
        model.runner = runner

    def set_on(self, model: CogVideoXModel) -> None:
        """Have the model run so."""
        if self.plan is not None:
            model.set_attention_plan(choose_plan(self.plan, model.config))
        self._set(model)

    def _set(self, model: CogVideoXModel) -> None:
        if self.step_cache is not None:
            model.set_step_cache(self.step_cache)
        if self._split is not None:
            model.runner.use(dataclasses.replace(model.runner.slots, split=self._split))
            if is_asked_for(self.parallel):
                self._split.shard_weights(model)
        elif self.parallel is not None:
            model.set_parallel(self.parallel)
            self._split = model.runner.slots.split
        if self.compile:
            from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model

            compile_model(model, CompileConfig() if self.compile is True else self.compile)


__all__ = ["Options"]
