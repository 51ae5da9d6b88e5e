"""Ops by what they do to errors."""

from __future__ import annotations

from torch._ops import OpOverload

from jvpgraph.rules.wide import MOVES, PRODUCTS, is_attention, name_of

__all__ = ["KINDS", "kind_of", "moves"]

KINDS = ("product", "attention", "norm", "sum", "cast", "reduction", "pointwise", "move", "collective", "other")

NAMES = {
    "product": " ".join([*PRODUCTS, "mm_float32"]),
    "norm": "native_layer_norm native_group_norm _fused_rms_norm native_batch_norm cudnn_batch_norm "
    "miopen_batch_norm _native_batch_norm_legit_functional rms_norm linalg_vector_norm",
    "sum": "add sub rsub lerp addcmul addcdiv _foreach_add _foreach_sub",
    "cast": "_to_copy convert_element_type",
    "reduction": "sum mean var var_mean std std_mean amax amin max min prod logsumexp cumsum _softmax _log_softmax "
    "nansum norm",
    "move": f"{' '.join(MOVES)} copy reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "replication_pad3d upsample_nearest1d upsample_nearest2d slice_backward split_with_sizes_copy",
}
KIND = {name: kind for kind, names in NAMES.items() for name in names.split()}


def moves(op: OpOverload) -> bool:
    """Whether each element of the result is one of an argument's, or a constant."""
    return op.is_view or kind_of(op) == "move"


def kind_of(op: OpOverload) -> str:
    """One of KINDS."""
    if is_attention(op):
        return "attention"
    if op.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return "collective"
    if op.namespace not in ("aten", "prims", "jvpgraph"):
        return "other"
    name = name_of(op)
    return KIND.get(name) or KIND.get(name.removesuffix("_")) or "pointwise"
