"""The main job: ``load(…, compile=True)`` on every card, and the first call, all defaults but attention."""

from __future__ import annotations

import pytest

from cogx_fast.runtime.watch import watch_compilation
from tests.cuda_standin.device import call, model

EVERY_CARD = ("t4", "a100", "rtx3060", "rtx4060", "rtx4090", "h100", "b200")


@pytest.mark.cards(*EVERY_CARD)
@pytest.mark.parametrize("attention", ["sdpa"])
def test_a_compiled_model_runs_and_batches_share_a_graph(attention):
    compiled = model("5b", compile=True, attention=attention)
    with watch_compilation() as stats:
        first = call(compiled, batch=2)
        others = [call(compiled, batch=batch) for batch in (1, 4)]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1, 0, 0)
    assert first.triton, "no generated kernel ran"
    assert all(set(other.triton) == set(first.triton) for other in others)
