"""The passes, in order, and the one function that runs them."""

from __future__ import annotations

import functools
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import jvpgraph.linearize
from jvpgraph import kernels, passes
from jvpgraph.config import Config
from jvpgraph.dump import Dump
from jvpgraph.passes.context import Context
from jvpgraph.passes.count import count
from jvpgraph.passes.decompose import decompose
from jvpgraph.passes.drop_dead_tangents import drop_dead_tangents
from jvpgraph.passes.fuse_aten_attention import fuse_aten_attention
from jvpgraph.passes.fuse_attention import differentiate_attention, fuse_attention
from jvpgraph.passes.keep_outputs_apart import keep_outputs_apart, note_outputs
from jvpgraph.passes.lower import check_gradients, write_out_copies
from jvpgraph.passes.pair_collectives import pair_collectives
from jvpgraph.rules import TABLE
from jvpgraph.verify import verify

__all__ = ["AFTER_AUTOGRAD", "BEFORE_AUTOGRAD", "OPTIONAL", "PIPELINE", "OutputsApart", "Pipeline", "check_config"]


def linearize(graph: fx.Graph, context: Context) -> None:
    """Insert the tangents, erase the markers: see :mod:`jvpgraph.linearize`."""
    context.report.linearization = jvpgraph.linearize.linearize(graph)


Step = Callable[[fx.Graph, Context], None]

PIPELINE: tuple[Step, ...] = (
    linearize,
    drop_dead_tangents,
    fuse_attention,
    fuse_aten_attention,
    pair_collectives,
    count,
    decompose,
)
# The same, for a graph that is linearized first and given to AOTAutograd then.
BEFORE_AUTOGRAD: tuple[Step, ...] = (
    linearize,
    drop_dead_tangents,
    fuse_attention,
    fuse_aten_attention,
    differentiate_attention,
    write_out_copies,
    check_gradients,
)
AFTER_AUTOGRAD: tuple[Step, ...] = (count, decompose)
OWN_NAMESPACES = ("aten", "prims", "jvpgraph", "_c10d_functional", "_dtensor")  # whose ops the package has rules for
PROCESS = uuid.uuid4().hex
OPTIONAL = frozenset({"drop_dead_tangents", "fuse_attention", "fuse_aten_attention", "pair_collectives"})


def check_config(config: Config) -> None:
    """Raise ValueError for passes that cannot be skipped, or that there are not."""
    unknown = set(config.skip_passes) - OPTIONAL
    if unknown:
        raise ValueError(f"cannot skip {', '.join(sorted(unknown))}: optional passes are {sorted(OPTIONAL)}")


class Pipeline(CustomGraphPass):
    """All passes as one custom pass of Inductor's, on joint and on inference graphs."""

    def __init__(self, context: Context, steps: tuple[Step, ...] = PIPELINE):
        self.context, self.steps = context, steps

    def __call__(self, graph: fx.Graph) -> None:
        config = self.context.config
        dump = Dump(config.dump)
        dump.write(graph, "captured")
        for step in self.steps:
            name = step.__name__
            if name in config.skip_passes:
                continue
            step(graph, self.context)
            if config.verify:
                verify(graph, after=name)
            dump.write(graph, name)
        note_outputs(graph)  # for OutputsApart, later

    def uuid(self) -> Any:
        """Identifies the code and the settings that decide what graph comes out, for Inductor's cache."""
        return f"{_code_hash()}-{_rules()}-{sorted(self.context.config.skip_passes)}-{torch.__version__}"


class OutputsApart(CustomGraphPass):
    """What comes after the compiler's own passes on a graph that :class:`Pipeline` has seen."""

    def __call__(self, graph: fx.Graph) -> None:
        keep_outputs_apart(graph)

    def uuid(self) -> Any:
        return _code_hash()


def _rules() -> list[Any]:
    """The table as far as the code hash does not cover it: a rule from elsewhere is only good for this process."""
    foreign: list[Any] = []
    for op, rule in TABLE.items():
        functions = [term.fn for term in rule.terms] + ([rule.when] if rule.when is not None else [])
        if any(not getattr(fn, "__module__", "").startswith("jvpgraph.rules.") for fn in functions):
            foreign.append((str(op), rule.wrt, PROCESS, [id(fn) for fn in functions]))
        elif op.namespace not in OWN_NAMESPACES:
            foreign.append((str(op), rule.wrt))
    return foreign


@functools.cache
def _code_hash() -> str:
    """Of everything that decides what graph comes out, however it is installed; rglob does not follow links."""
    folders = (Path(folder) for module in (jvpgraph, passes, kernels) for folder in module.__path__)
    digest = hashlib.sha256()
    for path in sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()
