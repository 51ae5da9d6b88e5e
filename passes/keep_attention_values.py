"""Keep the values of attention what they are, where its tangent is computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.recorder import Recorder, value_of
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context
from jvpgraph.precision import HALF
from jvpgraph.rules.apply import bind

__all__ = ["keep_attention_values"]

CAST = torch.ops.aten._to_copy.default
TANGENTS = ("q_dot", "k_dot", "v_dot", "bias_dot")


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
        own = {name: _before_cast(x) for name, x in given.items() if name not in TANGENTS}
        dtype = value_of(own["q"]).dtype
        if own["q"] is given["q"] or dtype not in HALF:
            continue
        with recorder.behind(wide):
            dots = {name: _as(recorder.stand_ins(given[name]), dtype) for name in TANGENTS}
            OPS.attention_jvp(**{name: dots[name] if name in dots else recorder.stand_ins(own[name]) for name in given})


def _before_cast(x: Any) -> Any:
    return x.args[0] if isinstance(x, fx.Node) and x.target is CAST else x


def _as(dot: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if dot is None else dot.to(dtype)
