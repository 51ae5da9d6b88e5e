"""Keep the values of attention what they are, where its tangent is computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from jvpgraph.graph.meta import INSERTED_META
from jvpgraph.graph.recorder import Recorder
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context
from jvpgraph.rules.apply import bind
from jvpgraph.rules.wide import rounded

__all__ = ["keep_attention_values"]

CAST = torch.ops.aten._to_copy.default
PRIMALS = ("q", "k", "v", "bias")


def keep_attention_values(gm: fx.GraphModule, context: Context) -> None:
    """Let them come from the kernel that computes them wherever the tangent has the precision of the model.

    Before: ``o, lse = attention(q, k, v);  _, _, o_dot, lse_dot = attention_jvp(q.float(), k.float(), ...)``
    After:  the same, with ``attention_jvp(q, k, v, q_dot.half(), ...)`` behind it, with which fuse_attention, the next
            pass, does what it does for others

    Needs linearize. Nothing changes but for ``Config(tangent_precision="float32_matmul")``, or a policy that says so.
    """
    recorder = Recorder(gm.graph)
    for wide in gm.graph.find_nodes(op="call_function", target=OPS.attention_jvp.default):
        given = bind(OPS.attention_jvp.default, wide.args, wide.kwargs)
        own = {name: _before_cast(x) for name, x in given.items()}
        if own["q"] is given["q"]:
            continue
        with recorder.behind(wide):
            half = dict(recorder.stand_ins(own))
            dots = {primal: half[f"{primal}_dot"] for primal in PRIMALS if half[f"{primal}_dot"] is not None}
            half |= {f"{primal}_dot": dot for primal, dot in rounded(half, dots).items()}
            OPS.attention_jvp(**half)


def _before_cast(x: Any) -> Any:
    """Before a cast that the rule has made: a model may cast queries and keys itself, and attend in float32."""
    is_ours = isinstance(x, fx.Node) and x.target is CAST and INSERTED_META in x.meta
    return x.args[0] if is_ours else x
