"""The structure that the folders promise, checked on the source."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jvpgraph
import jvpgraph.rules
from jvpgraph.passes import pipeline

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "jvpgraph": "jvpgraph",
    "passes": "jvpgraph.passes",
    "kernels": "jvpgraph.kernels",
    "trainer": "jvpgraph.trainer",
}
SOURCES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for folder, package in FOLDERS.items()
    for path in (ROOT / folder).rglob("*.py")
}

BESIDE = {  # what is no part of the package, by the name under which it is imported
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
}
EVERYTHING = SOURCES | BESIDE
OWN = ("jvpgraph", "benchmarks", "tests")

# Who may import whom: a layer imports from itself and from those further down.
LAYERS = (
    ("jvpgraph.trainer",),
    ("jvpgraph", "jvpgraph.testing"),
    ("jvpgraph.diagnosis",),
    ("jvpgraph.api",),
    ("jvpgraph.explain",),
    ("jvpgraph.dual",),
    ("jvpgraph.strategies", "jvpgraph.finite"),
    ("jvpgraph.settings",),
    ("jvpgraph.regions",),
    ("jvpgraph.dynamo_backend", "jvpgraph.op_by_op", "jvpgraph.tangents", "jvpgraph.vmapped"),
    ("jvpgraph.passes",),
    ("jvpgraph.dump", "jvpgraph.verify", "jvpgraph.sharding"),
    ("jvpgraph.graph", "jvpgraph.inductor"),
    ("jvpgraph.dual_forward", "jvpgraph.autograd_function", "jvpgraph.foreign"),
    (
        "jvpgraph.diffusers_parallel",
        "jvpgraph.context_parallel",
        "jvpgraph.escapes",
        "jvpgraph.functions",
        "jvpgraph.unguarded",
        "jvpgraph.markers",
        "jvpgraph.open_checkpoints",
        "jvpgraph.dynamo",
        "jvpgraph.tracing",
        "jvpgraph.sizes_in_tensors",
        "jvpgraph.storages",
        "jvpgraph.tree",
        "jvpgraph.config",
    ),
    ("jvpgraph.rules",),
    ("jvpgraph.kernels",),
    ("jvpgraph.errors", "jvpgraph.precision"),
)


def layer_of(module: str) -> int:
    """Index of the layer with the longest matching prefix."""
    matches = [
        (len(prefix), i)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or (prefix != "jvpgraph" and module.startswith(prefix + "."))
    ]
    assert matches, f"{module} is in no layer: add it to LAYERS"
    return max(matches)[1]


def own_imports(path: Path) -> list[tuple[str, ast.AST]]:
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in EVERYTHING else node.module, node) for name in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names if alias.name.split(".")[0] in OWN]
    return found


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_one_way_and_stand_at_the_top(module):
    tree = ast.parse(SOURCES[module].read_text())
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    assert not any(isinstance(n, (ast.Import, ast.ImportFrom)) and id(n) in inner for n in ast.walk(tree)), (
        f"{module} imports inside a function"
    )
    for target, _ in own_imports(SOURCES[module]):
        assert layer_of(target) >= layer_of(module), f"{module} imports {target}, which is above it"


@pytest.mark.long
def test_no_import_cycles():
    """Of modules, imports inside functions included; and tests may import benchmarks, not the other way round."""
    edges = {module: {t for t, _ in own_imports(path) if t != module} for module, path in EVERYTHING.items()}
    upward = {
        (module, target)
        for module, targets in edges.items()
        for target in targets
        if OWN.index(module.split(".")[0]) < OWN.index(target.split(".")[0])
    }
    assert not upward
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in EVERYTHING:
        visit(module, ())


@pytest.mark.long
def test_top_level_folders_are_not_imported_by_their_own_names():
    """``kernels`` is a package of Hugging Face's that diffusers looks for."""
    for path in [*SOURCES.values(), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.module if isinstance(node, ast.ImportFrom) else None
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [name or ""]
            assert not any(n.split(".")[0] in ("kernels", "passes", "trainer") for n in names), path


def test_one_file_and_one_documented_function_per_pass():
    stages = [stage for stage in vars(pipeline).values() if isinstance(stage, pipeline.Stage)]
    steps = {step for stage in stages for step in stage.steps}
    for step in steps:
        assert step.__doc__, f"{step.__name__} has no docstring"
        assert step.__module__ == f"jvpgraph.passes.{step.__name__}"
        assert importlib.import_module(step.__module__).__all__ == [step.__name__]
        assert list(inspect.signature(step).parameters) == ["gm", "context"]
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__", "context", "pipeline"}
    assert files == {step.__name__ for step in steps}


def test_public_names_are_documented():
    for name in jvpgraph.__all__:
        assert inspect.getdoc(getattr(jvpgraph, name)), name


def test_files_fit_in_a_head():
    lengths = {module: len(path.read_text().splitlines()) for module, path in EVERYTHING.items()}
    long = {module: n for module, n in lengths.items() if n > 500 and not module.startswith("tests.")}
    assert not long, f"split these by meaning: {long}"


@pytest.mark.parametrize("module", sorted(x for x in SOURCES if x.startswith("jvpgraph.kernels.")))
def test_argument_lists_of_the_kernels_are_short(module):
    """Outside of device code, which the compilers of Triton 3.6 and 3.9 let group only so far."""
    for function in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(function, ast.FunctionDef) and not any("jit" in ast.unparse(x) for x in function.decorator_list):
            given = function.args
            listed = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            assert len(listed) <= 14, f"{module}.{function.name} has {len(listed)} arguments"


def test_the_wheel_has_every_package():
    """pyproject.toml lists them: what is missing there is missing for everybody but us."""
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    packages = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    assert packages <= set(re.findall(r'"(.*?)"', listed[1]))


@pytest.mark.slow
def test_types_are_seen_across_folders(tmp_path):
    """The links in jvpgraph/ show the other folders to a type checker; of a wheel they are no part."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from jvpgraph.kernels.window import Window\n"
        "from jvpgraph.passes.context import Context\n"
        "from jvpgraph.trainer.batch import Batch\n"
        "Context('x', 'y', 3, 4, 5)\n"
        "Window(left='1', right=None)\n"
        "Batch(no_such_field=1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(planted)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert {line.split(":")[1] for line in told.splitlines() if "error:" in line} >= {"4", "5", "6"}, told
