"""Importing the package, or asking the command for help, imports no torch; the first use of anything registers all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import jvpgraph
from jvpgraph.trainer import cli

RULES = "from jvpgraph.rules import TABLE; import json; print(json.dumps(sorted(map(str, TABLE))))"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_the_command_says_what_it_is_without_torch(argv):
    told = python(
        "import sys\nfrom jvpgraph.trainer import cli\n"
        f"try: cli.main({argv})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'triton', 'diffusers'}))"
    )
    assert told.endswith("\n[]\n")
    assert jvpgraph.__version__ in told or all(name in told for name in cli.COMMANDS)


@pytest.fixture(scope="module")
def rules() -> list[str]:
    return json.loads(python(f"import torch, jvpgraph.api; {RULES}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["from jvpgraph import *", "import jvpgraph; jvpgraph.kernels", "import jvpgraph.rules"]
)
def test_all_rules_are_registered_whatever_is_used_first(first, rules):
    assert json.loads(python(f"{first}; {RULES}")) == rules


def test_names_of_the_package():
    assert {*jvpgraph.__all__} <= {*dir(jvpgraph)}
    assert {name for names in jvpgraph.DEFINED_IN.values() for name in names} == {*jvpgraph.__all__}
    assert jvpgraph.backend() is not None  # a function, and no module of that name
    assert jvpgraph.rules.registry.TABLE is jvpgraph.rules.TABLE
    with pytest.raises(AttributeError, match=r"module 'jvpgraph' has no attribute 'trasnform'"):
        _ = jvpgraph.trasnform
