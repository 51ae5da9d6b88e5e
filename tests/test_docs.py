"""The documentation says what is so: its code runs and prints what it shows, its figures are those that were measured."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from jvpgraph.rules import TABLE

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Code runs in a folder of its own, on graphs of its own, and its rules leave the table again."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    with mock.patch.dict(TABLE):
        yield tmp_path
    torch._dynamo.reset()


def run(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run the blocks of Python one after the other; what is shown after a block (```text), and what it printed."""
    module = ModuleType(f"documentation_{path.stem.lower()}")  # where Dynamo looks for what the code names
    monkeypatch.setitem(sys.modules, module.__name__, module)
    blocks = list(re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", path.read_text(), re.DOTALL))
    program = Path(f"{path.stem.lower()}.py")
    program.write_text("\n".join(block[1] for block in blocks))  # where errors and dumps find the lines
    pairs, line = [], 0
    for block in blocks:
        capsys.readouterr()
        exec(compile("\n" * line + block[1], str(program.absolute()), "exec"), vars(module))
        pairs.append((block[2] or "", capsys.readouterr().out))
        line += block[1].count("\n") + 1
    return pairs


def as_shown(shown: str, printed: str) -> bool:
    """Equal but for blanks and what ``...`` stands for."""
    return doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def test_the_readme_runs(capsys, monkeypatch):
    printed = "".join(out for _, out in run(ROOT / "README.md", capsys, monkeypatch))
    assert "inductor, against forward AD in float64: right" in printed
    assert "1 swapped, 1 fused with the tangent, 0 left" in printed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_tutorial_prints_what_it_shows(capsys, monkeypatch):
    pairs = run(ROOT / "docs" / "tutorial.md", capsys, monkeypatch)
    assert sum(bool(shown) for shown, _ in pairs) > 8
    for shown, printed in pairs:
        assert as_shown(shown, printed), printed


def test_other_output_than_what_is_shown_is_seen():
    assert as_shown("a\n...\nb", "a\n1\n2\nb")
    assert not as_shown("a\n...\nb", "a\n1\n2\nc")
    assert not as_shown("", "a")
