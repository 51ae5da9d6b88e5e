"""Note on the output node which outputs share memory, for keep_outputs_apart."""

from __future__ import annotations

from torch import fx

from jvpgraph.graph.meta import OUTPUTS_META
from jvpgraph.graph.outputs import owners_of_outputs
from jvpgraph.passes.context import Context

__all__ = ["note_outputs"]


def note_outputs(gm: fx.GraphModule, context: Context) -> None:
    """Leaves the graph as it is; bodies of loops may have a single output."""
    output = gm.graph.output_node()
    if isinstance(output.args[0], (list, tuple)):
        output.meta[OUTPUTS_META] = owners_of_outputs(output)
