"""The attention ops' names, arguments and results, as the dispatcher knows them."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch

from jvpgraph.kernels.call import How

__all__ = ["AUTOCAST_KEYS", "DEFAULTS", "LIBRARY", "OPS", "SCHEMAS", "arguments", "how_of"]

LIBRARY = torch.library.Library("jvpgraph", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
OPS = torch.ops.jvpgraph

QKV = "Tensor q, Tensor k, Tensor v"
DOTS = "Tensor? q_dot, Tensor? k_dot, Tensor? v_dot"
HOW = (
    "bool is_causal=False, float? scale=None, int[]? window=None, Tensor? cu_seqlens_q=None,"
    " Tensor? cu_seqlens_kv=None, Tensor? block_map=None, Tensor? partial_blocks=None"
)
SCHEMAS = {
    "attention": f"({QKV}, Tensor? bias=None, {HOW}) -> (Tensor o, Tensor lse)",
    "attention_jvp": f"({QKV}, {DOTS}, Tensor? bias=None, Tensor? bias_dot=None, {HOW},"
    " bool differentiable_tangent=False) -> (Tensor o, Tensor lse, Tensor o_dot, Tensor lse_dot)",
    "attention_jvps": f"({QKV}, {DOTS}, Tensor? bias=None, Tensor? bias_dot=None, {HOW})"
    " -> (Tensor o, Tensor lse, Tensor o_dots, Tensor lse_dots)",
    "attention_backward": f"(Tensor o_grad, Tensor? lse_grad, {QKV}, Tensor? bias, Tensor o, Tensor lse, {HOW},"
    " bool bias_needs_grad=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    "attention_jvp_backward": "(Tensor? o_grad, Tensor? lse_grad, Tensor? o_dot_grad, Tensor? lse_dot_grad,"
    f" {QKV}, {DOTS}, Tensor? bias, Tensor? bias_dot, Tensor o, Tensor lse, Tensor o_dot, Tensor lse_dot, {HOW},"
    " bool bias_needs_grad=False, bool bias_dot_needs_grad=False) -> (Tensor dq, Tensor dk, Tensor dv,"
    " Tensor dq_dot, Tensor dk_dot, Tensor dv_dot, Tensor dbias, Tensor dbias_dot)",
}
MASKS = {
    "block_map": "(Tensor count, Tensor index, Tensor? full_count, Tensor? full_index, SymInt batch, SymInt heads,"
    " SymInt rows, SymInt columns, bool all_whole=False) -> (Tensor block_map, Tensor places)",
    "interval_mask": "(Tensor first, Tensor last, SymInt length_kv) -> (Tensor block_map, Tensor partial_blocks)",
    "grid_mask": "(SymInt[] space, SymInt[] kernel, SymInt[] stride, SymInt[] dilation, bool[] causal, SymInt others,"
    " Device device) -> (Tensor block_map, Tensor partial_blocks)",
}
for _name, _schema in (SCHEMAS | MASKS).items():
    LIBRARY.define(_name + _schema, tags=TAGS)

DEFAULTS = {
    op: {argument.name: argument.default_value for argument in getattr(OPS, op).default._schema.arguments}
    for op in SCHEMAS
}

AUTOCAST_KEYS = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        for name in ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS", "AutocastHPU", "AutocastPrivateUse1")
        if hasattr(torch._C.DispatchKey, name)
    ),
)


def arguments(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a call of an op by name, with the defaults that the dispatcher leaves out."""
    return DEFAULTS[op] | dict(zip(DEFAULTS[op], args))


def how_of(given: dict[str, Any]) -> How:
    """What all ops share after their tensors."""
    return How(*(given[name] for name in How._fields))
