"""Packed sequences one by one, for kernels that take no offsets: waits for the device, to know the lengths."""

from __future__ import annotations

from collections.abc import Callable

from jvpgraph.kernels.attention_blocked import blind_outputs
from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs
from jvpgraph.kernels.layout import empty_rows

__all__ = ["attend_each", "differentiate_each"]


def attend_each(call: Call, attend: Callable[[Call], Outputs]) -> Outputs:
    """The outputs of a packed call from those of its sequences."""
    outs = blind_outputs(call)
    for at_q, _, own in call.sequences():
        for out, part in zip(outs, attend(own)):
            if out is not None and part is not None:
                out[:, :, at_q] = part
    return outs


def differentiate_each(
    call: Call,
    outs: Outputs,
    grads: Cotangents,
    differentiate: Callable[[Call, Outputs, Cotangents], Gradients],
) -> Gradients:
    """The gradients of a packed call from those of its sequences."""
    inputs = (call.q, call.k, call.v, *call.dots)
    found = [None if x is None else empty_rows(x, x.shape[2], x.shape[3]).zero_() for x in inputs]
    for at_q, at_kv, own in call.sequences():
        o_dot, lse_dot = (None if x is None else x[:, :, at_q] for x in (outs.o_dot, outs.lse_dot))
        of_outs = Outputs(outs.o[:, :, at_q], outs.lse[:, :, at_q], o_dot, lse_dot)
        of_grads = Cotangents(*(None if x is None else x[:, :, at_q] for x in grads))
        parts = differentiate(own, of_outs, of_grads)
        for out, part, at in zip(found, parts, (at_q, at_kv, at_kv) * 2):
            if out is not None and part is not None:
                out[:, :, at] = part
    dq, dk, dv, dq_dot, dk_dot, dv_dot = found
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return Gradients(dq, dk, dv, dq_dot, dk_dot, dv_dot)
