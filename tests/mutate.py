"""Mutants of one file, and which of them its nearest tests let live: ``make mutants FILE=jvpgraph/verify.py``.

A mutant is the file with one thing changed: a statement deleted, a condition negated, a comparison or a boolean
operator swapped, an item dropped from a list, tuple, set or dictionary, a number one larger. Each runs in a process
that is forked from one which has imported torch, and only in memory: nothing on disk changes. (cosmic-ray starts Python
for each mutant, and so imports torch each time; mutmut runs copies under the name of their folder, passes.count instead
of jvpgraph.passes.count.)
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.machinery
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch._dynamo
import torch._functorch.aot_autograd
import torch._inductor.compile_fx
import torch.distributed.tensor
import torch.testing._internal.common_utils  # noqa: F401 - these once, for all

ROOT = Path(__file__).resolve().parents[1]
NEAREST = {  # the tests of a file that take seconds
    "jvpgraph/verify.py": ("verify",),
    "jvpgraph/graph/recorder.py": ("recorder", "linearize", "passes"),
    "jvpgraph/rules/apply.py": ("apply", "linearize", "rules"),
    "jvpgraph/op_by_op": (
        "shadows",
        "op_by_op",
        "memory_layout",
        "autograd_functions",
        "checkpointing",
        "python_numbers",
    ),
    "jvpgraph/regions/find.py": ("find_regions",),
    "jvpgraph/regions": ("region_parts", "regions"),
    "passes/linearize.py": ("linearize",),
    "passes/drop_dead_tangents.py": ("passes",),
    "passes/keep_attention_values.py": ("policy",),
    "passes/fuse_attention.py": ("passes",),
    "passes/differentiate_attention.py": ("passes",),
    "passes/fuse_aten_attention.py": ("passes",),
    "passes/pair_collectives.py": ("passes",),
    "passes/count.py": ("passes",),
    "passes/decompose.py": ("passes",),
    "passes/write_out_copies.py": ("passes",),
    "passes/check_gradients.py": ("passes",),
    "passes/mark_stop_gradients.py": ("torch_passes", "checkpointing"),
    "passes/note_outputs.py": ("passes",),
    "passes/keep_outputs_apart.py": ("passes",),
    "passes/lower.py": ("differentiable_tangent",),
    "passes/swap_flex_attention.py": ("swap_flex_attention",),
    "passes/call_own_jvps.py": ("torch_passes",),
    "passes/copy_overlapping_outputs.py": ("torch_passes",),
    "passes/detach_outputs.py": ("torch_passes",),
    "passes/swap_attention.py": ("torch_passes",),
    "passes/recognize_attention.py": ("torch_passes", "swap_attention"),
}
ONLY = {  # which of their tests, by pytest's -k
    "jvpgraph/op_by_op": "shadows or (op_by_op and not right_or_refused and not between_regions)",
    "jvpgraph/rules/apply.py": "not symbolic_sizes and not thousandth and not bfloat16",
}
SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not matrix", "-W", "ignore:Module already imported")
DELETED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Continue, ast.Break, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    line: int
    what: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a file. Imports, annotations, docstrings and ``__all__`` are left alone."""
    count = sum(1 for _ in _changes(ast.parse(source)))
    for i in range(count):
        tree = ast.parse(source)
        node, what, change = next(change for j, change in enumerate(_changes(tree)) if j == i)
        line = getattr(node, "lineno", 0)
        change()
        yield Mutant(line, what, ast.unparse(ast.fix_missing_locations(tree)))


Change = tuple[ast.AST, str, Callable[[], object]]


def _changes(tree: ast.Module) -> Iterator[Change]:
    for parent, field, node in _places(tree, ()):
        yield from _of_node(parent, field, node)


def _places(node: ast.AST, trail: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Each node that may change, in the order of the source, with what it stands in."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.arg)) or _names_exports(node):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_docstring(child):
                yield node, field, child
                yield from _places(child, (*trail, node))


def _names_exports(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _of_node(parent: ast.AST, field: str, node: ast.AST) -> Iterator[Change]:
    if isinstance(node, DELETED) and not _names_exports(node):
        yield node, f"deleted: {_short(node)}", lambda: _replace(parent, field, node, ast.Pass())
    if field == "test" or (isinstance(parent, ast.comprehension) and field == "ifs"):
        negated = ast.UnaryOp(ast.Not(), copy.deepcopy(node))
        yield node, f"negated: {_short(node)}", lambda: _replace(parent, field, node, negated)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        swapped = SWAPPED[type(node.ops[0])]
        yield node, f"{swapped.__name__}: {_short(node)}", lambda: node.ops.__setitem__(0, swapped())
    if isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield node, f"{type(other).__name__}: {_short(node)}", lambda: setattr(node, "op", other)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        for i, item in enumerate(node.elts if field != "slice" else ()):
            yield item, f"dropped {_short(item)} of {_short(node)}", lambda i=i: node.elts.pop(i)
    if isinstance(node, ast.Dict):
        for i, key in enumerate(node.keys):
            dropped = f"dropped {_short(key or node.values[i])} of {_short(node)}"
            yield node.values[i], dropped, lambda i=i: [x.pop(i) for x in (node.keys, node.values)]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        larger = not node.value if isinstance(node.value, bool) else node.value + 1
        yield node, f"{node.value} -> {larger}", lambda: setattr(node, "value", larger)


def _replace(parent: ast.AST, field: str, old: ast.AST, new: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[value.index(old)] = new
    else:
        setattr(parent, field, new)


def _short(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:60]


def outcome(file: Path, source: str | None, tests: list[str], timeout: float) -> str:
    """``lives``, or how the tests noticed, in a process of its own in which ``file`` reads ``source``."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            if source is not None:
                _read_instead(file, source)
            code = int(pytest.main([*PYTEST, *tests]))
        finally:
            os._exit(code)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "lives" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "ran too long"


def _read_instead(file: Path, source: str) -> None:
    loader, path = importlib.machinery.SourceFileLoader, file.resolve()
    get_code = loader.get_code

    def mutated(self: importlib.machinery.SourceFileLoader, name: str) -> object:
        same = Path(self.get_filename(name)).resolve() == path
        return compile(source, str(path), "exec") if same else get_code(self, name)

    loader.get_code = mutated  # type: ignore[method-assign, assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="such as jvpgraph/verify.py")
    parser.add_argument("--tests", nargs="+", help="test files, and what else pytest takes; default: those in NEAREST")
    parser.add_argument("--sample", type=int, default=0, help="at most so many mutants a file, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # keyed by what is on disk
    assert "jvpgraph" not in sys.modules, "a mutant is imported for the first time"
    lived = 0
    for name in arguments.files:
        lived += report(name, arguments.tests or nearest(name), arguments.sample, arguments.seed)
    return min(lived, 1)


def nearest(name: str) -> list[str]:
    """What pytest is given: the nearest tests of a file, or of its folder."""
    folder = os.path.dirname(name)
    stems, chosen = NEAREST.get(name) or NEAREST[folder], ONLY.get(name) or ONLY.get(folder)
    found = [test for test in (f"tests/test_{stem}.py" for stem in stems) if Path(test).exists()]
    return [*found, *(["-k", chosen] if chosen else [])]


def report(name: str, tests: list[str], sample: int, seed: int) -> int:
    file = ROOT / name
    begun = time.monotonic()
    if outcome(file, None, tests, 600) != "lives":
        raise SystemExit(f"{' '.join(tests)} fail without a mutant")
    timeout = 30 + 5 * (time.monotonic() - begun)
    found = list(mutants(file.read_text()))
    drawn = sorted(random.Random(seed).sample(range(len(found)), min(sample or len(found), len(found))))
    outcomes = []
    for i in drawn:
        outcomes.append(outcome(file, found[i].source, tests, timeout))
        if outcomes[-1] == "lives":
            print(f"  {name}:{found[i].line}: {found[i].what}", flush=True)
    lives = outcomes.count("lives")
    share = f"{lives} of {len(drawn)} live ({100 * lives / max(len(drawn), 1):.0f} %)"
    print(f"{name}: {share}; {len(found)} mutants in all; {' '.join(tests)}", flush=True)
    return lives


if __name__ == "__main__":
    sys.exit(main())
