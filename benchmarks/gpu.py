"""All that needs a CUDA GPU, in one call of less than nine minutes.

    python -m benchmarks.gpu [--out benchmarks/results] [--minutes 8.7] [--stages NAME ...] [--dry-run]

Stages, each a process of its own, so that none takes the others down:
  install      this package and its peers, from benchmarks/.wheels, where they are missing; without network
  environment  device, versions, commit; the matmul ceiling and the bandwidth that the figures are held against
  tests        the attention tests on the device
  memcheck     one small case under compute-sanitizer
  sweep        tiles near those of the block table: benchmarks/tiles.py
  attention    attention and its JVP beside their peers: benchmarks/attention.py
  backward     the backward, and that of the tangent: benchmarks/attention_backward.py
  plot         of what `attention` found
  dit          a whole step: benchmarks/dit.py

Writes attention_<device>.json whenever something is known, attention_<device>.png and gpu.log. A stage that fails or
runs out of time is recorded and the next one goes on; the exit status is 1 then. Time that a stage leaves goes to the
later ones. --dry-run does it all on a CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """A python command, which may leave results in a JSON file while it runs."""

    name: str
    seconds: float  # of its own; what earlier stages left comes on top
    command: tuple[str, ...] = ()  # default: the function of this name in benchmarks/stages.py
    least: float = 0.0  # seconds without which it does not start
    patience: float = 600.0  # seconds without a new result after which it hangs
    restarts: int = 0  # times that it goes on from its results after its process died
    stops_itself: bool = False  # when its time is over


STAGES = (
    Stage("install", 15),
    Stage("environment", 20),
    Stage("tests", 175, stops_itself=True),
    Stage("memcheck", 30),
    Stage("sweep", 60, stops_itself=True),
    Stage("attention", 165, patience=75, restarts=4, stops_itself=True),
    Stage("backward", 20),
    Stage("plot", 10),
    Stage("dit", 15, least=40),
)


@dataclass
class Report:
    """attention_<device>.json, as far as it is known."""

    out: Path
    dry_run: bool
    begin: float = field(default_factory=time.monotonic)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        device = "dry run" if self.dry_run else self.stages.get("environment", {}).get("device", "unknown")
        return self.out / f"attention_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"

    def write(self) -> None:
        unknown = self.out / "attention_unknown.json"
        if self.path != unknown:
            unknown.unlink(missing_ok=True)
        content = {"dry_run": self.dry_run, "seconds": time.monotonic() - self.begin, "stages": self.stages}
        scratch = self.path.with_suffix(".json.new")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(self.path)


def perform(stage: Stage, report: Report, part: Path, deadline: float, log: TextIO) -> None:
    """Run a stage and record it, with its results as they come."""
    entry: dict[str, Any] = {"status": "running"}
    report.stages[stage.name] = entry
    begin = time.monotonic()
    if deadline - begin < stage.least and not report.dry_run:
        entry |= {"status": "skipped", "error": f"{deadline - begin:.0f} s were left: it wants {stage.least:.0f}"}
        report.write()
        return
    for _ in range(1 + stage.restarts):
        seconds = deadline - time.monotonic()
        command = stage.command or ("-m", "benchmarks.stages", stage.name)
        if not stage.command:
            command += ("--part", str(part), "--results", str(report.path), "--seconds", f"{seconds:.0f}")
            command += ("--dry-run",) if report.dry_run else ()
        status, error = attend(stage, command, report, entry, part, deadline, log)
        if status != "failed" or "running" not in entry:
            break
    entry |= {"status": status, "seconds": round(time.monotonic() - begin, 1)} | ({"error": error} if error else {})
    report.write()


def attend(
    stage: Stage,
    command: tuple[str, ...],
    report: Report,
    entry: dict[str, Any],
    part: Path,
    deadline: float,
    log: TextIO,
) -> tuple[str, str]:
    """One process of a stage: (status, what went wrong)."""
    log.write(f"\n=== {stage.name}: {' '.join(command)}\n")
    log.flush()
    at, known = log.tell(), 0
    # one that stops itself is given time to do so
    end = deadline + 10 * stage.stops_itself
    progress = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    problem = ""
    while True:
        code = child.poll()
        if part.exists() and part.stat().st_mtime_ns != known:
            known, progress = part.stat().st_mtime_ns, time.monotonic()
            entry.pop("running", None)
            entry |= json.loads(part.read_text())
            report.write()
        if code is not None:
            break
        now = time.monotonic()
        if now > end or now - progress > stage.patience:
            problem = "out of time" if now > end else f"hangs: nothing new for {stage.patience:.0f} s"
            break
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # also what it started and left behind
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if problem or code:
        with open(log.name, errors="replace") as written:
            written.seek(at)
            tail = written.read()[-2000:]
        return ("out of time" if problem == "out of time" else "failed"), f"{problem or f'exit status {code}'}\n{tail}"
    return "ok", ""


def run(stages: Sequence[Stage], out: Path, *, minutes: float = 8.7, dry_run: bool = False) -> Report:
    """Perform the stages one after the other, within so many minutes."""
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out.resolve(), dry_run)
    factor = 60 * minutes / sum(stage.seconds for stage in stages)
    deadline = report.begin
    with tempfile.TemporaryDirectory() as parts, open(out / "gpu.log", "w") as log:
        for stage in stages:
            deadline += factor * stage.seconds
            perform(stage, report, Path(parts) / f"{stage.name}.json", deadline, log)
            entry = report.stages[stage.name]
            print(f"{stage.name:12s}{entry['status']:>12s}{entry.get('seconds', 0):8.1f} s", flush=True)
            for line in entry.get("table", []):
                print(f"  {line}", flush=True)
            if "error" in entry:
                print("  " + entry["error"].strip().replace("\n", "\n  ")[-1500:], flush=True)
    print(f"written to {report.path}")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything together")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    o = parser.parse_args()
    report = run([s for s in STAGES if s.name in o.stages], o.out, minutes=o.minutes, dry_run=o.dry_run)
    return int(any(entry["status"] not in ("ok", "skipped") for entry in report.stages.values()))


if __name__ == "__main__":
    sys.exit(main())
