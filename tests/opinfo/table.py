"""docs/opinfo.md: counts per phase, what is refused and why. A refusal that is not in the committed table fails."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.opinfo.database import OPS
from tests.opinfo.phases import PHASES, VERDICTS

__all__ = ["FAILURES", "TABLE", "known", "write_table"]

TABLE = Path(__file__).parent.parent.parent / "docs" / "opinfo.md"
FAILURES = ("crash", "wrong", "raw")
LISTED = {"refused": "Refused", "torch": "torch.compile itself fails, or is wrong"}
HEAD = """# PyTorch's operators, one by one

`make opinfo` runs the samples of PyTorch's own operator database (`torch.testing._internal`, {ops} ops with the
`_foreach_` ones) through the backends. Value and tangent are compared with forward AD in float64 that central
differences confirm, and gradients with PyTorch's plain backward. Each op runs in a process of its own.
`make opinfo-table` writes this table; the sweep fails on a crash, on a wrong number, on an error that is not the
package's own (raw), and on a refusal that is not listed here.

Unknown: there is no oracle (no forward AD, and central differences do not settle, as at a jump). Raises: the op
itself raises. Torch: plain `torch.compile` of the call fails or is wrong as well. Where the column of ops says "all",
the numbers are complete; of the other phases that many ops have run, spread over the database, and what the remaining
ops refuse is not listed.
"""


def known(path: Path = TABLE) -> set[tuple[str, str, str]]:
    """(verdict, op, phase) of all that the table lists."""
    found: set[tuple[str, str, str]] = set()
    verdict = ""
    titles = {title: name for name, title in LISTED.items()}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("## "):
            verdict = titles.get(line.removeprefix("## "), "")
        elif verdict and line.startswith("| ") and "`" in line:
            _why, phases, ops = (cell.strip() for cell in line.strip("|").rsplit("|", 2))
            found |= {(verdict, op, phase) for op in re.findall(r"`([^`]+)`", ops) for phase in phases.split(", ")}
    return found


def write_table(records: Sequence[dict[str, Any]], path: Path = TABLE) -> int:
    """Write the table of these records; 1 if there are failures among them, else 0."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record["phase"]].update(record["counts"])
    ran = Counter(record["phase"] for record in records)
    order = ("right", "refused", *FAILURES, "torch", "unknown", "raises")
    assert set(order) == set(VERDICTS)
    lines = [HEAD.format(ops=len(OPS))]
    lines += [f"| phase | ops | {' | '.join(order)} |", f"|---|---|{'---|' * len(order)}"]
    for phase in (name for name in PHASES if name in counts):
        share = "all" if ran[phase] >= len(OPS) else ran[phase]
        lines.append(f"| {phase} | {share} | {' | '.join(str(counts[phase][v]) for v in order)} |")
    total: Counter[str] = sum(counts.values(), Counter())
    lines.append(f"| all | | {' | '.join(str(total[v]) for v in order)} |")
    for verdict, title in LISTED.items():
        lines += ["", f"## {title}", "", "| why | phases | ops |", "|---|---|---|", *_rows(records, verdict)]
    failures = _rows(records, *FAILURES)
    if failures:
        lines += ["", "## Open", "", "| what | phases | ops |", "|---|---|---|", *failures]
    path.write_text("\n".join(lines) + "\n")
    return int(bool(failures))


def _rows(records: Sequence[dict[str, Any]], *verdicts: str) -> list[str]:
    """One row for all ops that are refused for the same reason in the same phases."""
    phases: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        for found in record["found"]:
            if found["verdict"] in verdicts:
                phases[_why(found), record["op"]].add(record["phase"])
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (why, op), where in phases.items():
        rows[why, ", ".join(name for name in PHASES if name in where)].append(f"`{op}`")
    return [f"| {why} | {where} | {' '.join(sorted(ops))} |" for (why, where), ops in sorted(rows.items())]


def _why(found: dict[str, Any]) -> str:
    """The reason, without what differs from case to case."""
    why = re.sub(r"aten\.(\w+)\.\w+: ", "", found["why"])
    why = re.sub(r" is off by [\d.e+-]+|is off by inf", "", why)
    why = re.sub(r"0x[0-9a-f]+|\b[su]\d+\b|\d{2,}", "N", why).replace("|", "/").replace("`", "'")
    return (f"{found['verdict']}: " if found["verdict"] in FAILURES else "") + why[:160].strip()
