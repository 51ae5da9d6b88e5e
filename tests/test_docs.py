"""The documentation says what is so: its code runs and prints what it shows, and its figures were measured."""

from __future__ import annotations

import doctest
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import finite_difference, quality
from jvpgraph.rules import TABLE
from jvpgraph.trainer.evaluation.distances import Quality

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


@pytest.mark.long
def test_the_readme_runs(capsys, monkeypatch):
    printed = "".join(out for _, out in run(ROOT / "README.md", capsys, monkeypatch))
    assert "inductor, against forward AD in float64: right" in printed
    assert "1 swapped, 1 fused with the tangent, 0 left" in printed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(("page", "shows"), [("tutorial.md", 9), ("diagnose.md", 2)])
def test_a_page_prints_what_it_shows(page, shows, capsys, monkeypatch):
    pairs = run(ROOT / "docs" / page, capsys, monkeypatch)
    assert sum(bool(shown) for shown, _ in pairs) >= shows
    for shown, printed in pairs:
        assert as_shown(shown, printed), printed


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_the_files_that_are_named_exist(page):
    named = re.findall(
        r"`((?:jvpgraph|passes|kernels|trainer|tests|benchmarks|examples)/[\w/.]+)`", (ROOT / page).read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_other_output_than_what_is_shown_is_seen():
    assert as_shown("a\n...\nb", "a\n1\n2\nb")
    assert not as_shown("a\n...\nb", "a\n1\n2\nc")
    assert not as_shown("", "a")


# ----------------------------------------------------------------------------- figures


def table(path: str, head: str) -> list[list[str]]:
    """The cells of a table by its first line, without the line under it; nothing in bold."""
    lines = (ROOT / path).read_text().replace("**", "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("|---")]


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


STEPS = {
    "jvpgraph": "jvpgraph",
    "`torch.func.jvp` in one pass, compiled": "compiled one pass",
    "`torch.func.jvp` in one pass, eager": "one pass",
    "`torch.func.jvp`, then a second forward, compiled": "compiled two passes",
    "`torch.func.jvp`, then a second forward, eager": "two passes",
    "central differences and a forward, compiled": "differences",
}


@pytest.mark.parametrize("path", ["README.md", "docs/results.md"])
def test_figures_of_the_step(path):
    head, *rows = table(path, "| time / the model's own")
    runs = [measured(f"dit_cpu_float32_{column.split()[0].replace(',', '')}.json") for column in head[1:-1]]
    assert len(runs) == len(list((ROOT / "benchmarks" / "results").glob("dit_cpu_float32_*.json")))
    assert {row[0] for row in rows} == set(STEPS)
    for what, *ratios, error in rows:
        assert ratios == [f"{run['ratio'][STEPS[what]]:.2f}" for run in runs]
        assert error == f"{max(run['tangent_error'][STEPS[what]] for run in runs):.0e}".replace("e-0", "e-")


def test_figures_of_attention():
    cases = measured("attention_nvidia_h100_80gb_hbm3.json")["stages"]["attention"]["cases"]

    def peers(head_dim: int, n: int) -> dict[str, Any]:
        """All that were run for one size, with as many keys as queries that are all active."""
        same = [c for c in cases if (c["head_dim"], c["n"], c["kind"]) == (head_dim, n, "self")]
        return {name: peer for case in reversed(same) for name, peer in case["peers"].items()}

    def shown(peer: dict[str, Any]) -> str:
        if "skipped" in peer:
            return "needs " + re.findall(r"about (\d+) GB", peer["skipped"])[0] + " GB"
        return f"wrong by {peer['error']['o_dot']:.0%}" if "wrong" in peer else f"{peer['tflops']:.0f}"

    sizes = [(d, n) for d in (128, 64) for n in (4096, 32760, 75600)]
    rows = {row[0]: row[1:] for row in table("docs/results.md", "| | D = 128, N = 4,096")}
    for name, row in {
        "jvpgraph": ["jvpgraph"],
        "`torch.func.jvp`, compiled": ["compiled func.jvp"],
        "the jvp_flash_attention package": ["jvp_flash_attention, pointers", "jvp_flash_attention"],
        "for comparison: cuDNN's forward, two matmuls": ["SDPA cuDNN"],
    }.items():
        found = [next(peers(*size)[peer] for peer in row if peer in peers(*size)) for size in sizes]
        assert [cell.replace(",", "").replace(" %", "%") for cell in rows[name]] == [shown(peer) for peer in found]


def test_figures_of_the_backward():
    cases = measured("attention_backward_nvidia_h100_80gb_hbm3.json")["stages"]["backward"]["cases"]
    _, *rows = table("docs/results.md", "| | 12 heads of 128 columns")
    for what, *cells in rows:
        of, way = re.fullmatch(r"backward of the (value|tangent), (ATen|Triton|blocks).*", what).groups()
        key = f"{of}, " + {"ATen": "flash", "Triton": "triton", "blocks": "blocked"}[way]
        assert cells == [f"{1000 * case['ways'][key]['seconds']:.1f}" for case in cases]


def test_figures_of_the_recipes():
    found = measured("quality_digits.json")
    figures: dict[str, quality.Figures] = {}
    for row, runs in found["figures"].items():
        name, sampler = row.rsplit(", ", 1)
        figures.setdefault(name, {})[sampler] = [Quality(**run) for run in runs]
    _, _, *lines = quality.page(figures, found["seconds_per_update"]).splitlines()
    _, *rows = table("docs/results.md", "| recipe | 1 step")
    assert rows == [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_of_finite_differences():
    found = measured("finite_difference.json")["figures"]
    _, *rows = table("docs/results.md", "| objective, student | derivative")
    _, _, *lines = finite_difference.table(found).splitlines()
    assert rows == [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_of_compile_time():
    runs = measured("compile_time_inductor.json")
    _, *rows = table("docs/results.md", "| | 4 equal blocks")
    for key, (_, *cells) in zip(("regions", "one graph"), rows, strict=True):
        seconds = [f"{runs[key]['seconds'][n]:.1f}" for n in ("4", "40")]
        assert cells == [*seconds, f"{runs[key]['ratio']:.2f}"]
