"""All that happens to a graph, in order, and the one function that runs it."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._ops import OpOverload

from jvpgraph.config import Config
from jvpgraph.dump import Dump, readable
from jvpgraph.graph.torch_level import graphs_in
from jvpgraph.markers import TANGENT_OF
from jvpgraph.passes.batch_tangents import batch_tangents
from jvpgraph.passes.call_own_jvps import call_own_jvps
from jvpgraph.passes.check_gradients import check_gradients
from jvpgraph.passes.context import Context, StepReport
from jvpgraph.passes.copy_overlapping_outputs import copy_overlapping_outputs
from jvpgraph.passes.count import count
from jvpgraph.passes.decompose import decompose
from jvpgraph.passes.detach_outputs import detach_outputs
from jvpgraph.passes.differentiate_attention import differentiate_attention
from jvpgraph.passes.drop_dead_tangents import drop_dead_tangents
from jvpgraph.passes.fuse_aten_attention import fuse_aten_attention
from jvpgraph.passes.fuse_attention import fuse_attention
from jvpgraph.passes.inline_repeated_bodies import inline_repeated_bodies
from jvpgraph.passes.keep_attention_values import keep_attention_values
from jvpgraph.passes.keep_outputs_apart import keep_outputs_apart
from jvpgraph.passes.linearize import linearize
from jvpgraph.passes.lower import lower
from jvpgraph.passes.mark_stop_gradients import mark_stop_gradients
from jvpgraph.passes.note_outputs import note_outputs
from jvpgraph.passes.pair_collectives import pair_collectives
from jvpgraph.passes.recognize_attention import recognize_attention
from jvpgraph.passes.round_products import round_products
from jvpgraph.passes.swap_attention import swap_attention
from jvpgraph.passes.swap_flex_attention import swap_flex_attention
from jvpgraph.passes.write_out_copies import write_out_copies
from jvpgraph.rules import TABLE
from jvpgraph.verify import ATEN, LOWERED, TORCH_LEVEL, Invariant, verify

__all__ = [
    "AFTER_AUTOGRAD",
    "AFTER_COMPILER",
    "BEFORE_AUTOGRAD",
    "ON_ATEN_GRAPH",
    "ON_TORCH_GRAPH",
    "OPTIONAL",
    "JointPasses",
    "Pipeline",
    "Stage",
    "Step",
    "check_config",
]

Step = Callable[[fx.GraphModule, Context], fx.GraphModule | None]
"""Changes a graph in place, with the bodies of its higher-order ops, or returns another one to go on with. The runner
recompiles it, so that no step has to."""


@dataclass(frozen=True)
class Stage:
    """Where a graph is on its way, what is done to it there, in this order, and what is legal after each step.

    ``arrival`` says how it got there, if not by a step.
    """

    name: str
    steps: tuple[Step, ...]
    invariants: tuple[Invariant, ...]
    arrival: str = ""


# As Dynamo gives it out, before AOTAutograd.
ON_TORCH_GRAPH = Stage(
    "torch",
    (
        inline_repeated_bodies,
        swap_attention,
        swap_flex_attention,
        recognize_attention,
        mark_stop_gradients,
        call_own_jvps,
        detach_outputs,
        copy_overlapping_outputs,
    ),
    TORCH_LEVEL,
    arrival="captured",
)
# AOTAutograd's, whose backward, if there is one, was derived from the primal alone.
ON_ATEN_GRAPH = Stage(
    "ATen",
    (
        linearize,
        drop_dead_tangents,
        keep_attention_values,
        round_products,
        fuse_attention,
        fuse_aten_attention,
        batch_tangents,
        pair_collectives,
        count,
        decompose,
        note_outputs,
    ),
    ATEN,
    arrival="traced",
)
# The same, for a graph that is linearized first and given to AOTAutograd then.
BEFORE_AUTOGRAD = Stage(
    "before autograd",
    (
        lower,
        linearize,
        drop_dead_tangents,
        keep_attention_values,
        round_products,
        fuse_attention,
        fuse_aten_attention,
        differentiate_attention,
        batch_tangents,
        write_out_copies,
        check_gradients,
    ),
    LOWERED,
)
AFTER_AUTOGRAD = Stage("after autograd", (count, decompose, note_outputs), ATEN, "traced")
# What the compiler's own passes on that graph have left.
AFTER_COMPILER = Stage("after the compiler's passes", (keep_outputs_apart,), (), "optimized")

# Steps that look at one graph only: the runner calls them for each body of a higher-order op, too.
IN_EACH_BODY = (
    drop_dead_tangents,
    keep_attention_values,
    round_products,
    fuse_attention,
    fuse_aten_attention,
    decompose,
)

OPTIONAL = frozenset(
    {
        *("swap_attention", "swap_flex_attention", "recognize_attention"),
        *("drop_dead_tangents", "round_products", "fuse_attention", "fuse_aten_attention", "pair_collectives"),
    }
)
OWN_NAMESPACES = ("aten", "prims", "jvpgraph", "_c10d_functional", "_dtensor")  # whose ops the package has rules for
OWN_RULES = ("jvpgraph.rules.", "jvpgraph.foreign.")
PROCESS = uuid.uuid4().hex


def check_config(config: Config) -> None:
    """Raise ValueError for steps that cannot be skipped, or that there are not."""
    unknown = set(config.skip_passes) - OPTIONAL
    if unknown:
        raise ValueError(f"cannot skip {', '.join(sorted(unknown))}: optional passes are {sorted(OPTIONAL)}")


class Pipeline:
    """Runs stages on one captured graph: each step is timed, verified, reported and dumped."""

    def __init__(self, context: Context):
        self.context = context
        self._dump = Dump(context.config.dump)
        self._ops: Counter[str] = Counter()

    def __call__(self, stage: Stage, gm: fx.GraphModule) -> fx.GraphModule:
        config = self.context.config
        self._ops.clear()
        if stage.arrival:
            self._note(stage, stage.arrival, gm, 0.0)
        for step in stage.steps:
            name = step.__name__
            if name in config.skip_passes:
                continue
            start = time.perf_counter()
            if step in IN_EACH_BODY:
                for part in graphs_in(gm):
                    step(part, self.context)
            else:
                gm = step(gm, self.context) or gm
            milliseconds = 1e3 * (time.perf_counter() - start)
            if config.verify:
                verify(gm, stage.invariants, after=name)
            self._note(stage, name, gm, milliseconds)
        for graph in graphs_in(gm):
            graph.recompile()
        return gm

    def _note(self, stage: Stage, name: str, gm: fx.GraphModule, milliseconds: float) -> None:
        ops = Counter(_op(node) for graph in graphs_in(gm) for node in graph.graph.nodes)
        changes = {op: ops[op] - self._ops[op] for op in {**self._ops, **ops} if ops[op] != self._ops[op]}
        head = StepReport(stage.name, name, milliseconds, ops.total(), changes if self._ops else {})
        self._ops = ops
        text = self._dump.write(name, lambda: readable(gm, str(head)), keep=self.context.config.keep_graphs)
        self.context.report.graphs.append(replace(head, text=text))


def _op(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    return str(node.target) if isinstance(node.target, (str, OpOverload)) else getattr(node.target, "__name__", "?")


class JointPasses(CustomGraphPass):
    """A stage as one custom pass of Inductor's, on joint and on inference graphs."""

    def __init__(
        self,
        pipeline: Pipeline,
        stage: Stage,
        users: Callable[[fx.Graph], None] | None = None,
        marked: bool = False,
    ):
        """
        Args:
            users: a pass that the user's own settings of Inductor name for this place. It runs first.
            marked: the graph has markers, which its bodies have not: these wait until it has been linearized.
        """
        self.pipeline, self.stage, self.users, self.marked = pipeline, stage, users, marked

    def wait(self, gm: fx.GraphModule) -> bool:
        """Whether gm is a body that waits, or a graph that has been dealt with."""
        return self.marked and not gm.graph.find_nodes(op="call_function", target=TANGENT_OF)

    def __call__(self, graph: fx.Graph) -> None:
        if self.users is not None:
            self.users(graph)
        gm = graph.owning_module
        assert gm is not None
        if self.wait(gm):
            return
        self.pipeline(self.stage, gm)
        self.pipeline.context.report.passes_ran = True

    def uuid(self) -> Any:
        """Identifies the code and the settings that decide what graph comes out, for Inductor's cache: None, and it
        keeps nothing, where a pass of the user's does not say what it is."""
        users = self.users.uuid() if isinstance(self.users, CustomGraphPass) else None
        if self.users is not None and users is None:
            return None
        config = self.pipeline.context.config
        settings = f"{sorted(config.skip_passes)}-{config.tangent_precision}-{self.pipeline.context.precisions}"
        own = f"{_code_hash()}-{_rules()}-{self.stage.name}-{settings}-{torch.__version__}"
        return own if users is None else (own, users)


def _rules() -> list[Any]:
    """The table as far as the code hash does not cover it: a rule from elsewhere is only good for this process."""
    foreign: list[Any] = []
    for op, rule in TABLE.items():
        functions = [term.fn for term in rule.terms] + ([rule.when] if rule.when is not None else [])
        if any(not getattr(fn, "__module__", "").startswith(OWN_RULES) for fn in functions):
            foreign.append((str(op), rule.wrt, PROCESS, [id(fn) for fn in functions]))
        elif op.namespace not in OWN_NAMESPACES:
            foreign.append((str(op), rule.wrt))
    return foreign


@functools.cache
def _code_hash() -> str:
    """Of everything that decides what graph comes out, however it is installed; rglob does not follow links."""
    packages = ("jvpgraph", "jvpgraph.passes", "jvpgraph.kernels")
    folders = (Path(folder) for name in packages for folder in sys.modules[name].__path__)
    digest = hashlib.sha256()
    for path in sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()
