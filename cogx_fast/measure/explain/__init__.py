"""What a model becomes when it is compiled: the graphs, the kernels, and what each reads, writes and computes."""

from cogx_fast.measure.explain.report import Explanation
from cogx_fast.measure.explain.run import empty_model, explain

__all__ = ["Explanation", "empty_model", "explain"]
