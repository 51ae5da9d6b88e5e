"""Runs that are told to stop: by a signal at any moment, by a time limit; they save, and go on with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jvpgraph.trainer import cli, settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.run.stopping import TIME_LIMIT, Stop, Stopped, seconds_of
from jvpgraph.trainer.train import train
from tests.test_train import RCM, config_of, content, last_checkpoint, stage

pytestmark = pytest.mark.usefixtures("one_thread", "interruptible")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: a shell starts what is to run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(config: RunConfig, scratch: Path, *more: str) -> subprocess.Popen[str]:
    file = scratch / "config-to-run.yaml"
    settings.save(config, file)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "jvpgraph.trainer.cli", "train", str(file), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def await_step(process: subprocess.Popen[str], config: RunConfig, step: int) -> None:
    log, deadline = config.out / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and any(json.loads(x)["step"] >= step for x in log.read_text().splitlines(True)[:-1])):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)


def assert_same_end(found: Path, expected: Path, scratch: Path) -> None:
    """Every tensor of the last checkpoint, and every line of the log, to the bit."""
    got, want = (content(last_checkpoint(folder), scratch / "content.pt") for folder in (found, expected))
    assert got.keys() == want.keys()
    assert not [key for key in want if not torch.equal(got[key], want[key])]
    assert computed(found / "log.jsonl") == computed(expected / "log.jsonl")


@pytest.mark.long
def test_signals_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """To all of the run's processes, as a scheduler sends them: those that read the data get them too."""
    stages = [stage("dcm", 10), stage(RCM, 12, condition_dropout=0.2)]
    rare: dict[str, Any] = {"checkpoint": {"every": 1000}, "log": {"every": 4}}
    whole = train(config_of(tmp_path / "whole", stages, **rare))
    config = config_of(tmp_path / "stopped", stages, data={"workers": 1}, **rare)
    at_random = random.Random(os.environ.get("SEED", "3"))
    for number, step in ((signal.SIGTERM, 4), (signal.SIGINT, 12)):
        process = start(config, tmp_path)
        await_step(process, config, step)
        time.sleep(at_random.uniform(0, 0.1))
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number, said
        done = int(last_checkpoint(config.out).name[5:])
        assert f"stopped by {number.name} and saved after step {done}. The same command goes on" in said
        assert "Traceback" not in said
        assert step <= done < 22
    assert cli.main(["train", str(tmp_path / "config-to-run.yaml")]) == 0
    assert_same_end(config.out, whole, tmp_path)


@pytest.mark.long
def test_a_run_stops_itself_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    train(config_of(tmp_path / "short", [stage("scm", 2)]))
    limit = 2 * (time.monotonic() - begun) + 1  # machines differ
    config = config_of(tmp_path / "run", [stage("scm", 100_000)], checkpoint={"every": 100_000})
    begun = time.monotonic()
    with pytest.raises(Stopped) as stop:
        train(config, time_limit=limit)
    assert time.monotonic() - begun < limit
    assert stop.value.code == TIME_LIMIT
    assert int(last_checkpoint(config.out).name[5:]) == stop.value.step > 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == [
        signal.SIG_DFL,
        signal.default_int_handler,
    ]


def test_the_limit_leaves_time_for_a_step_and_a_save() -> None:
    stop, ranks = Stop(1000.0), Ranks()
    stop.calls = [stop.begun - 1, stop.begun - 100]  # a step of 100 s until now
    assert not stop.agreed(ranks)
    assert 100 <= stop.longest < 101
    stop.calls, stop.begun = [0.0, time.monotonic()], time.monotonic() - 800
    assert not stop.agreed(ranks, reserve=10)  # 800 + 1.5 (100 + 10) + 10
    assert stop.agreed(ranks, reserve=30)
    assert stop.code == TIME_LIMIT


def test_a_signal_while_the_processes_agree_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = dist.all_reduce
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        reduce(*args, **kwargs)

    try:
        ranks = Ranks()
        with Stop() as stop:
            with monkeypatch.context() as patch:
                patch.setattr(dist, "all_reduce", interrupted)
                assert not stop.agreed(ranks)  # what this process had to say was on its way already
            assert stop.agreed(ranks)
    finally:
        dist.destroy_process_group()
    assert str(stop.stopped(3)) == "stopped by SIGTERM and saved after step 3"


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun and the terminal both send one
        assert stop.agreed(Ranks())
        assert str(stop.stopped(7)) == "stopped by SIGINT and saved after step 7"
        stop.asked -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("3.5h", 12600),
        ("2d", 172800),
        ("5:30", 330),
        ("3:50:00", 13800),
        ("1-0:0:01", 86401),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "-3m", "1:2:3:4", "0m", "0:00", "4 hours"])
def test_what_is_no_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "run.yaml", f"--time-limit={text}"])
    assert stop.value.code == 2
    assert "is no time" in capsys.readouterr().err


# ---- the scripts in examples/

EXAMPLES = Path(__file__).parents[1] / "examples"
STUBS = {
    "jvpgraph": 'exec "$PYTHON" -W ignore -m jvpgraph.trainer.cli "$@"',
    "torchrun": 'exec "$PYTHON" -W ignore -m torch.distributed.run "$@"',
    "scontrol": 'echo "$@" >> scontrol.txt; [ "$1" = show ] && echo localhost; true',
    # As srun does: so many tasks, a signal for all of them, and the highest status.
    "srun": """
tasks=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
  wait "$task"; status=$?
  while kill -0 "$task" 2> /dev/null; do wait "$task"; status=$?; done
  ((status > highest)) && highest=$status
done
exit $highest
""",
}


def run_script(script: str, config: RunConfig, folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """With stand-ins for the commands that it calls, in a process group of its own."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in STUBS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    settings.save(config, folder / "run.yaml")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(EXAMPLES / script), "run.yaml", *more],
        env={
            **os.environ,
            "PATH": path,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(EXAMPLES.parent),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def slurm(tasks: int, seconds: float) -> dict[str, str]:
    end = int(time.time() + seconds)
    return {
        "SLURM_NTASKS": str(tasks),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_JOB_END_TIME": str(end),
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "tasks", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=[pytest.mark.slow, pytest.mark.matrix])]
)
def test_the_slurm_script_queues_a_run_again_until_it_is_done(tmp_path: Path, tasks: int) -> None:
    parallel = {"dp_shard": tasks}
    config = config_of(tmp_path / "run", [stage("scm", 100_000)], parallel=parallel, checkpoint={"every": 100_000})
    steps = [0]
    for _ in range(2 if tasks > 1 else 1):
        job = run_script("train.sbatch", config, tmp_path, **slurm(tasks, 8))
        said = job.communicate(timeout=120)[0]
        assert job.returncode == 75, said
        steps.append(int(last_checkpoint(config.out).name[5:]))
        assert f"stopped by the time limit and saved after step {steps[-1]}" in said
        assert steps[-1] > steps[-2]
    assert (tmp_path / "scontrol.txt").read_text().split("\n")[:2] == ["show hostnames node[1]", "requeue 77"]


@pytest.mark.long
@pytest.mark.ranks
def test_torchrun_passes_a_signal_on_and_all_processes_agree(tmp_path: Path) -> None:
    steps = 100_000  # no machine is through with them before the signal has gone from torchrun to its processes
    config = config_of(tmp_path / "run", [stage("scm", steps)], parallel={"dp_shard": 2}, checkpoint={"every": steps})
    job = run_script("torchrun.sh", config, tmp_path, PROCESSES="2")
    await_step(job, config, 3)
    os.kill(job.pid, signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    step = int(last_checkpoint(config.out).name[5:])
    assert 3 <= step < steps
    assert said.count(f"stopped by SIGTERM and saved after step {step}") == 2
    assert {str(json.loads(line)["step"]) for line in (config.out / "log.jsonl").read_text().splitlines()} == {
        str(i) for i in range(1, step + 1)
    }
