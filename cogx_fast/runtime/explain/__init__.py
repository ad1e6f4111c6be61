"""What a model becomes when it is compiled: the graphs, the kernels, and what each reads, writes and computes."""

from cogx_fast.runtime.explain.report import Explanation
from cogx_fast.runtime.explain.run import empty_model, explain

__all__ = ["Explanation", "empty_model", "explain"]
