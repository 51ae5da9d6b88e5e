"""`make gpu`, on a processor: a mistake in the script would cost the time of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import attention, attention_peers, gpu, stages
from benchmarks.gpu import Stage
from benchmarks.part import Part

ROOT = Path(__file__).parents[1]


def results(out: Path) -> dict:
    (found,) = out.glob("attention_*.json")
    return json.loads(found.read_text())


@pytest.mark.long
def test_dry_run_of_the_first_stage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path), "--stages", "environment"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"attention_dry_run.json", "gpu.log"}
    assert {name: entry["status"] for name, entry in results(tmp_path)["stages"].items()} == {"environment": "ok"}


@pytest.mark.matrix
def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout[-4000:] + (tmp_path / "gpu.log").read_text()[-4000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attention_dry_run.json",
        "attention_dry_run.png",
        "dit_cpu_float32_4.json",
        "gpu.log",
    ]
    assert (tmp_path / "attention_dry_run.png").stat().st_size > 10_000
    found = results(tmp_path)
    assert found["dry_run"] is True
    assert list(found["stages"]) == [stage.name for stage in gpu.STAGES]
    assert all(entry["status"] == "ok" for entry in found["stages"].values())

    where = found["stages"]["environment"]
    assert {"device", "torch", "triton", "numpy", "python", "commit", "nvidia_smi"} <= set(where)
    assert where["matmul_flops"] > 0
    assert where["copy_bytes_per_second"] > 0

    tests = found["stages"]["tests"]
    assert tests["counts"]["passed"] > 100
    assert tests["failures"] == []
    assert tests["skip_reasons"] == ["needs a CUDA GPU"]

    for entry in found["stages"]["sweep"]["sweep"]:
        assert entry["winner"] in entry["tried"]
        assert all(tried["seconds"] > 0 for tried in entry["tried"].values())

    for entry in found["stages"]["backward"]["cases"]:
        assert set(entry["ways"]) == {"value, blocked", "tangent, blocked"}
        assert all(way["seconds"] > 0 and way["error"] < 2e-2 for way in entry["ways"].values())

    entries = found["stages"]["attention"]["cases"]
    assert [entry["case"] for entry in entries] == [case.key for case in attention.cases(dry_run=True)]
    assert {entry["kind"] for entry in entries} == {"self", "cross"}
    assert {name for entry in entries for name in entry["peers"]} == set(attention_peers.PEERS)
    for entry in entries:
        product = 2 * entry["batch"] * entry["heads"] * entry["n"] * entry["n_kv"] * entry["head_dim"]
        assert entry["flop"] == {"self": 6, "cross": 4}[entry["kind"]] * product
        ours = entry["peers"]["jvpgraph"]
        assert set(ours["error"]) == {"o", "o_dot"}
        assert max(ours["error"].values()) < 1e-2
        assert ours["implementation"].startswith("blocks of torch ops")
        assert ours["tflops"] == pytest.approx(entry["flop"] / ours["seconds"] / 1e12)
        assert ours["of_ceiling"] == pytest.approx(1e12 * ours["tflops"] / where["matmul_flops"])
        for name in ("SDPA flash", "SDPA cuDNN", "jvpgraph triton"):
            assert entry["peers"].get(name, {"skipped": "needs a CUDA GPU"}) == {"skipped": "needs a CUDA GPU"}


@pytest.mark.slow
def test_a_stage_that_fails_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    broken = (
        Stage("raises", 5, command=("-c", "raise RuntimeError('planted')")),
        Stage("dies", 5, command=("-c", "import os; os.abort()")),
        Stage("hangs", 5, command=("-c", "import time; time.sleep(60)"), patience=0.5),
        Stage("goes_on", 5, command=("-c", "pass")),
    )
    monkeypatch.setattr(gpu, "STAGES", broken)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--dry-run", "--minutes", "0.3"])
    assert gpu.main() == 1
    found = results(tmp_path)["stages"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "failed",
        "goes_on": "ok",
    }
    assert "RuntimeError: planted" in found["raises"]["error"]
    assert "exit status -6" in found["dies"]["error"]
    assert "hangs: nothing new" in found["hangs"]["error"]
    assert "planted" in capsys.readouterr().out


def test_a_stage_out_of_time_keeps_what_it_found(tmp_path):
    script = "import json, os, time; part = os.environ['PART']; json.dump({'n': 1}, open(part, 'w')); time.sleep(60)"
    report = gpu.Report(tmp_path, dry_run=True)
    part = tmp_path / "part"
    with open(tmp_path / "log", "w") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PART", str(part))
        gpu.perform(Stage("slow", 1, command=("-c", script)), report, part, report.begin + 1.5, log)
    entry = report.stages["slow"]
    assert entry["status"] == "out of time"
    assert entry["n"] == 1
    assert json.loads(report.path.read_text())["stages"]["slow"]["n"] == 1


@pytest.fixture
def part(tmp_path) -> Part:
    return Part(tmp_path / "part.json", tmp_path / "results.json", 60, dry_run=True)


@pytest.fixture
def two_cases(monkeypatch):
    chosen = [attention_peers.Case(kind, 16, 1, 1, 32, 32, ("jvpgraph", "func.jvp")) for kind in ("self", "cross")]
    monkeypatch.setattr(attention, "cases", lambda dry_run: chosen)
    monkeypatch.setattr(attention, "compile_ahead", lambda part, what: None)
    return chosen


@pytest.mark.matrix
def test_no_figure_for_a_wrong_result(part, two_cases, monkeypatch):
    def wrong(case, x):
        return lambda: (x.q, x.q)

    monkeypatch.setitem(attention_peers.PEERS, "func.jvp", wrong)
    attention.measure(part)
    for entry in part.data["cases"]:
        assert set(entry["peers"]["func.jvp"]) == {"wrong", "error", "memory_bytes"}
        assert "tflops" in entry["peers"]["jvpgraph"]
    assert part.data["problems"] == []


@pytest.mark.long
def test_a_wrong_result_of_ours_fails_the_stage(part, two_cases, monkeypatch):
    def unwritten(case, x):
        return lambda: (x.q.new_full(x.q.shape, float("nan")), None)

    monkeypatch.setitem(attention_peers.PEERS, "jvpgraph", unwritten)
    with pytest.raises(SystemExit, match="jvpgraph"):
        attention.measure(part)
    assert len(part.data["cases"]) == 2
    assert len(part.data["problems"]) == 2


@pytest.mark.matrix
def test_a_process_that_died_goes_on_without_the_peer_that_killed_it(part, two_cases, monkeypatch):
    calls = []

    def deadly(case, x):
        calls.append(case.kind)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(attention_peers.PEERS, "func.jvp", deadly)
    with pytest.raises(SystemExit, match="illegal memory access"):
        attention.measure(part)
    assert part.data["running"] == ["self D=16 N=32 math", "func.jvp"]
    again = Part(part.path, part.results, 60, dry_run=True)
    attention.measure(again)
    assert calls == ["self"]
    assert [entry["case"] for entry in again.data["cases"]] == [case.key for case in two_cases]
    for entry in again.data["cases"]:
        assert entry["peers"]["func.jvp"] == {"crashed": "took the process down in self D=16 N=32 math"}
        assert "tflops" in entry["peers"]["jvpgraph"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tests/a.py::test_b[1-x y] PASSED                    [  3%]", ("tests/a.py::test_b[1-x y]", "passed")),
        ("tests/a.py::test_c SKIPPED (needs a CUDA GPU)       [ 50%]", ("tests/a.py::test_c", "skipped")),
        ("[gw11] [100%] FAILED tests/a.py::test_b[1-x y] ", ("tests/a.py::test_b[1-x y]", "failed")),
        ("[gw0] [  3%] ERROR tests/a.py::test_b", ("tests/a.py::test_b", "error")),
        ("FAILED tests/a.py::test_b - AssertionError", None),
        ("tests/a.py::test_b ", None),
        ("1 passed in 3s", None),
    ],
)
def test_what_pytest_says_is_understood(line, found):
    assert stages.outcome(line) == found


def test_cases_of_a_gpu():
    """The sizes that are promised, the most wanted first, and as many FLOP as fit the time."""
    cases = attention.cases(dry_run=False)
    assert (cases[0].kind, cases[0].head_dim, cases[0].n, cases[0].heads) == ("self", 128, 32760, 12)
    assert {(c.kind, c.head_dim, c.n) for c in cases} == {
        (kind, d, n) for kind in ("self", "cross") for d in (64, 72, 128) for n in (1024, 4096, 16384, 32760, 75600)
    }
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.n_kv == (case.n if case.kind == "self" else 512)
        assert case.matmuls("jvpgraph") * case.product < 50e12
        assert set(case.peers) <= set(attention_peers.PEERS)
