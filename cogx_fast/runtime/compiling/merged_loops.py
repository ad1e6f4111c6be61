"""A repair of Inductor's fusion for graphs of the whole model, where the rows of a product are a sum of sizes."""

from __future__ import annotations

from typing import Any

from torch._inductor.custom_graph_pass import CustomSchedulerPass


class KeepSplitLoops(CustomSchedulerPass):
    """Keep torch 2.13 from merging loops that it then cannot split again (``CantSplit``).

    It fuses a pass over elements, with loops (rows, columns), into a reduction of each row; then it merges the loops of
    each into one of rows · columns, where that is the same order in memory; then, writing the kernel, it splits that by
    rows. With rows = B · T + B · V, as the whole model has (text and video in one stream), it does not see that
    columns · B · T + columns · B · V can be divided by them. So loops that could not be split again are not merged.
    What is computed once for a row, a scale, is not split by rows.
    """

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """After fusion, before the merging."""
        from torch._inductor.codegen.simd import SIMDKernel
        from torch._inductor.scheduler import FusedSchedulerNode

        for fused in nodes:
            if not isinstance(fused, FusedSchedulerNode) or not fused.is_reduction() or not fused.is_gpu():
                continue
            groups = fused.group[1]
            node: Any
            for node in fused.get_nodes():
                if node.is_reduction() or node.group[1][0] == groups[0]:
                    continue
                if not SIMDKernel.is_compatible(groups, node._body.merge_loops().sizes):
                    node.merge_loops = lambda: None
        return nodes

    def uuid(self) -> Any:
        """What generated code depends on, for torch's cache of it."""
        return "cogx_fast KeepSplitLoops 2"


__all__ = ["KeepSplitLoops"]
