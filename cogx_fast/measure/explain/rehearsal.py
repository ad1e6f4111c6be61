"""A step cache whose every call is a step of one kind: so each kind of step can be compiled without a generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogx_fast.runtime.step_caching.step_cache import Generation, Pattern, Step, StepCache

if TYPE_CHECKING:
    from cogx_fast.model.transformer import CogVideoXTransformer
    from cogx_fast.runtime.runner import Inputs


class Rehearsal(StepCache):
    """Has each step computed by one pattern, with what is filled in unset, and keeps nothing.

    Args:
        cache: whose pattern it is.
        pattern: one of ``cache.patterns``.
    """

    def __init__(self, cache: StepCache, pattern: Pattern) -> None:
        super().__init__(cache.strategy)
        self._pattern = pattern

    def begin(self, model: CogVideoXTransformer, inputs: Inputs) -> Step:
        """As ``StepCache.begin``."""
        latents_BFCHW, text_BTE = inputs.latents_BFCHW, inputs.text_BTE
        batch, frames, _, height, width = latents_BFCHW.shape
        patch = model.patch_embed.patch_size**2 * (model.patch_embed.patch_size_t or 1)
        tokens, dim = text_BTE.shape[1] + frames * height * width // patch, model.norm_final.normalized_shape[0]
        is_whole, is_alone = self._pattern.blocks == len(model.transformer_blocks), self._pattern.conditional
        filled_in, difference = (latents_BFCHW.new_empty(batch // (1 + is_alone), tokens, dim) for _ in range(2))
        size = latents_BFCHW.shape, text_BTE.shape
        return Step(
            self._pattern,
            None if is_whole else filled_in,
            difference if is_alone else None,
            Generation(inputs.timestep_B, 0, size, None),
        )


__all__ = ["Rehearsal"]
