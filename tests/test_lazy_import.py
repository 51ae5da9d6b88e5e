"""Importing the package, or asking the command for help, imports no torch; the first use of anything registers all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jvpgraph
from jvpgraph.trainer import cli
from jvpgraph.trainer.commands import export, prepare
from jvpgraph.trainer.export import FORMATS
from jvpgraph.trainer.prepare.plan import Options

ROOT = Path(__file__).parents[1]

RULES = "from jvpgraph.rules import TABLE; import json; print(json.dumps(sorted(map(str, TABLE))))"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_says_what_it_is_without_torch():
    """And what each of them takes: with a sentence, the arguments, an example, and where to read on."""
    told = python(
        "import sys\nfrom jvpgraph.trainer import cli\n"
        "for argv in (['--help'], ['--version'], *([name, '--help'] for name in cli.COMMANDS)):\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "    print('----')\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'triton', 'diffusers'}))"
    )
    every, version, *each, modules = told.split("----\n")
    assert modules == "[]\n"
    assert all(name in every for name in cli.COMMANDS)
    assert jvpgraph.__version__ in version
    for said, (name, command) in zip(each, cli.COMMANDS.items(), strict=True):
        assert command.text in said
        assert f"example:\n  jvpgraph {name} {command.example}" in said
        assert (ROOT / re.search(r"more: (docs/\w+\.md)", said)[1]).is_file()


def test_examples_of_the_help_can_be_typed():
    for name, command in cli.COMMANDS.items():
        assert cli.parse([name, *command.example.split()]).command == name


@pytest.mark.long
def test_the_help_says_what_the_code_says():
    """What it cannot ask, as that imports torch. In a process of its own: tests have objectives of their own."""
    told = python("from jvpgraph.trainer.commands import train; print(train.TABLE.read_text('utf-8') == train.table())")
    assert told == "True\n", (
        "the settings have changed: python -m jvpgraph.trainer.commands.train writes the table anew"
    )
    assert tuple(FORMATS) == export.FORMATS
    usual = Options()
    assert (usual.max_enlarge, usual.shard_size) == (prepare.MAX_ENLARGE, prepare.SHARD_SIZE)


@pytest.fixture(scope="module")
def rules() -> list[str]:
    return json.loads(python(f"import torch, jvpgraph.api; {RULES}"))


@pytest.mark.long
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
