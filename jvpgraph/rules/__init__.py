"""Forward-mode derivatives of ops: the table by subject, PyTorch's own formulas for the rest.

========================= ==========================================================
pointwise                 one line of calculus each
reduce                    sums, means, extrema, softmax, cumulative sums
shape                     views, indexing, padding, joining: the op on the tangent
matmul                    products, convolutions
norm                      layer, group, RMS and batch norm
attention                 ours, and ATen's fused kernels
collective                collectives of torch.distributed
========================= ==========================================================
"""

from jvpgraph.rules import attention, collective, matmul, norm, pointwise, reduce, shape
from jvpgraph.rules.apply import NoRule, tangents_of
from jvpgraph.rules.registry import TABLE, Rule, bilinear, jvp, jvp_by_name, linear, no_tangent

__all__ = [
    "TABLE",
    "NoRule",
    "Rule",
    "attention",
    "bilinear",
    "collective",
    "jvp",
    "jvp_by_name",
    "linear",
    "matmul",
    "no_tangent",
    "norm",
    "pointwise",
    "reduce",
    "shape",
    "tangents_of",
]
