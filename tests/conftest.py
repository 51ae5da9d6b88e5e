"""What every test starts from: a hypothesis profile, a seed, its threads; and no graph outlives its file."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.testing._internal.common_utils  # loads a hypothesis profile of its own: before ours
from hypothesis import HealthCheck, Phase, settings

from jvpgraph import functions

# A random model is drawn and compiled within one example: it may take long without anything being wrong.
SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
# A random model that fails is made smaller for up to five minutes, which is done where somebody waits for it: SHRINK=1.
settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=SLOW_IS_FINE,
    phases=tuple(Phase) if "SHRINK" in os.environ else (Phase.explicit, Phase.generate),
)
settings.register_profile("fuzz", max_examples=500, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# There Inductor refuses an op that it has a decomposition for, instead of calling PyTorch's kernel: what our last pass
# should have expanded is found on every machine.
os.environ["CI"] = "1"

# Inductor writes other code for one thread than for several, which users have.
torch._inductor.config.cpp.threads = 2
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # `make test` runs one process a core

# pytest listens to every logger that does not propagate. To torch's structured trace that costs the text of every graph
# and every stack, and hundreds of empty lines below a failure; without a listener, torch writes none of it.
if "TORCH_TRACE" not in os.environ:
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()
    trace.propagate = True


def _last_words_unsaid() -> None:
    """What triton's bindings find alive when the interpreter is taken down is of no interest, and is long."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


atexit.register(_last_words_unsaid)


# Files that take minutes, the longest first: what is begun last should be short.
LONG = (
    "test_zoo",
    "test_kernel_gate",
    "test_properties",
    "test_transform",
    "test_regions",
    "test_derived",
    "test_differentiable_tangent",
    "test_sizes",
    "test_train",
    "test_door",
    "test_wan_run",
    "test_attention_triton",
    "test_backward_triton",
)


# Of so many slow cases of a test, `make test` runs one.
SLOW_CASES = 2

# Seconds of a core from which a test should have a marker: three times those of docs/testing.md, as machines differ.
SECONDS = {"slow": 3.0, "long": 9.0}


def pytest_collection_finish() -> None:
    """An eighth of the time of the fast tests went into looking for garbage among modules and tests, which stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Markers that a test need not carry itself; and the long files first."""
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.ranks)
        if _is_compiled(item) or item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
    _take_samples(items)
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def _take_samples(items: list[pytest.Item]) -> None:
    """``sampled(n)``: of the cases of a test, `make test` runs the first of every n, and `make test-all` the others.

    Those on the default backend come first. Slow cases are sampled(2) where a test does not say otherwise: most cross
    dtypes, backends and sizes, and each of these is met in other tests.
    """
    number: Counter[tuple[Path, str]] = Counter()
    for item in sorted(items, key=lambda item: not _is_compiled(item)):
        sampled = item.get_closest_marker("sampled")
        if not _cases(item) or (sampled is None and item.get_closest_marker("slow") is None):
            continue
        test = item.path, item.nodeid.partition("[")[0]
        if number[test] % (sampled.args[0] if sampled else SLOW_CASES):
            item.add_marker(pytest.mark.matrix)
        number[test] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    before = os.times()
    try:
        return (yield)
    finally:
        item.user_properties.append(("seconds of a core", sum(os.times()[:4]) - sum(before[:4])))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names tests that lack a marker. They do not fail: their time is that of this machine."""
    for report in terminalreporter.getreports("passed"):
        seconds = dict(report.user_properties).get("seconds of a core", 0.0)
        for marker in [name for name, limit in SECONDS.items() if seconds > limit and name not in report.keywords][-1:]:
            terminalreporter.write_line(f"{report.nodeid} took {seconds:.0f} s of a core and is not marked {marker}")


def _is_compiled(item: pytest.Item) -> bool:
    """Whether it is the case of a test on the default backend."""
    return any(isinstance(value, str) and value == "inductor" for value in _cases(item).values())


def _cases(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a case."""
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_how_often_lines_were_compiled() -> None:
    """The parameters of a test share its lines."""
    functions._graphs_of.clear()


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with tiny.yaml, whose modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    tiny = importlib.import_module("tests.tiny_runs").TINY  # a copy of this file is used without the other tests
    Path("tiny.yaml").write_text(json.dumps(tiny))
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small networks: a second thread would spend its time waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
