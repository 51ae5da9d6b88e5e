"""``python -m tests.opinfo.run [--shard 0/4] [--phases op_by_op eager] [ops]``: the sweep, and its table.

Each op and phase runs in a process of its own that may die; what is done is kept in out/opinfo/*.jsonl, so that a
sweep goes on where it stopped. ``--table docs/opinfo.md`` makes the table of what is there.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import os
import select
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.opinfo.database import OPS
from tests.opinfo.phases import PHASES, VERDICTS, cases, examine
from tests.opinfo.table import FAILURES, known, write_table

PATIENCE = 180  # seconds without a word from a process
EXAMPLES = 3  # kept of each kind of failure of an op in a phase


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="default: all")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th op, from the i-th on")
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES), metavar="PHASE")
    parser.add_argument("--out", type=Path, default=Path("out/opinfo"))
    parser.add_argument("--table", type=Path, help="write the table of what is done, instead of running")
    parser.add_argument("--fresh", action="store_true", help="run again what is done")
    args = parser.parse_args()
    if args.table is not None:
        return write_table(records(args.out), args.table)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    i, n = map(int, args.shard.split("/"))
    names = args.ops or list(OPS)[i::n]
    done = set() if args.fresh else {(r["op"], r["phase"]) for r in records(args.out)}
    warm_up(args.phases)
    bad, listed = 0, known()
    with (args.out / f"shard-{i}-of-{n}.jsonl").open("a") as file:
        for phase in args.phases:
            for name in names:
                if (name, phase) in done:
                    continue
                record = sweep(name, phase)
                print(json.dumps(record), file=file, flush=True)
                failed = [f for f in record["found"] if unexpected(f["verdict"], name, phase, listed)]
                bad += bool(failed)
                for f in failed:
                    print(f"{phase}: {name}: {f['verdict']} x{f['count']}: {f['why']}  {f['case']}", flush=True)
    return min(bad, 1)


def unexpected(verdict: str, op: str, phase: str, listed: set[tuple[str, str, str]]) -> bool:
    """Whether a verdict fails the sweep: a failure, or a refusal that the committed table does not have."""
    return verdict in FAILURES or (verdict in ("refused", "torch") and (verdict, op, phase) not in listed)


def warm_up(phases: list[str]) -> None:
    """Import here what every process would import for itself."""
    for phase in {PHASES[name].backend: PHASES[name] for name in phases}.values():
        for case in itertools.islice(cases("sin", phase), 1):
            examine(case, phase)
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


def records(folder: Path) -> list[dict[str, Any]]:
    """The newest record of each op and phase."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = record["op"], record["phase"]
            if key not in newest or newest[key]["time"] <= record["time"]:
                newest[key] = record
    return list(newest.values())


def sweep(name: str, phase: str) -> dict[str, Any]:
    """Run an op in a phase: how many cases had which verdict, and examples of all but the right ones."""
    start = time.time()
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    first = 0
    while first is not None:
        first = _rest(name, phase, first, counts, found)
    return {
        "op": name,
        "phase": phase,
        "counts": dict(counts),
        "found": list(found.values()),
        "seconds": round(time.time() - start, 2),
        "time": time.time(),
    }


def _rest(name: str, phase: str, first: int, counts: Counter[str], found: Any) -> int | None:
    """Cases from the ``first`` on in a new process; the case to go on with if it died, None when all is done."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _in_child(name, phase, first, writer)
    os.close(writer)
    number, text, ended = first, "(no case)", False
    try:
        for message in _messages(reader, child):
            if "case" in message:
                number, text = message["number"], message["case"]
            elif "done" in message:
                ended = True
            else:
                _count(message["verdict"], message["why"], text, counts, found)
    finally:
        os.close(reader)
    status = os.waitpid(child, 0)[1]
    if ended:
        return None
    why = (
        signal.Signals(os.WTERMSIG(status)).name
        if os.WIFSIGNALED(status)
        else f"exit {os.waitstatus_to_exitcode(status)}"
    )
    _count("crash", "no answer" if why == "SIGKILL" else why, text, counts, found)
    return number + 1 if text != "(no case)" else None


def _count(verdict: str, why: str, case: str, counts: Counter[str], found: dict[Any, dict[str, Any]]) -> None:
    counts[verdict] += 1
    if verdict == "right":
        return
    kind = verdict, why.split(" is off by")[0] if verdict == "wrong" else why
    entry = found.setdefault(kind, {"verdict": verdict, "why": why, "case": case, "count": 0})
    entry["count"] += 1


def _messages(reader: int, child: int) -> Iterator[dict[str, Any]]:
    left = b""
    while True:
        if not select.select([reader], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
            return
        read = os.read(reader, 65536)
        if not read:
            return
        *lines, left = (left + read).split(b"\n")
        yield from map(json.loads, lines)


def _in_child(name: str, phase: str, first: int, writer: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the threads of the parent are not here
    faulthandler.disable()

    def tell(**message: Any) -> None:
        os.write(writer, json.dumps(message).encode() + b"\n")

    try:
        for number, case in enumerate(cases(name, PHASES[phase])):
            if number >= first:
                tell(number=number, case=str(case))
                verdict = examine(case, PHASES[phase])
                assert verdict.what in VERDICTS
                tell(verdict=verdict.what, why=verdict.why)
        tell(done=True)
    except BaseException as error:
        tell(verdict="crash", why=f"the sweep itself: {error!r}"[:300])
        tell(done=True)
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
