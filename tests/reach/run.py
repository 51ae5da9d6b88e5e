"""Every network of tests/reach as one graph by default: ``python -m tests.reach.run [--table FILE] [names]``.

Each in float32, where the second size makes sizes symbolic, and in bfloat16 with ``dynamic=True``: value, tangent and
gradients of parameters and inputs, compared with the network in float64 as tests.zoo.sweep does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.reach import foreign, networks  # noqa: F401  which fill NETWORKS
from tests.reach.base import NETWORKS
from tests.zoo.sweep import examine, line

RUNS = (("float32", None), ("bfloat16", True))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: what each network stands for, and what became of it."""
    lines = [
        "# Networks of other repositories",
        "",
        "Small networks of our own (`tests/reach`) with the constructs that other repositories are full",
        "of. `make reach` runs each on the default backend in float32, at two sizes, and in bfloat16 with",
        "`dynamic=True`. Errors are the largest of value, tangent and gradients of parameters and inputs, compared",
        "with the network in float64.",
        "",
        "| networks like those of | with | as | float32 | bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        case = NETWORKS[name]
        kinds = dict.fromkeys(run.get("capture", "") if run["status"] == "right" else run["status"] for run in runs)
        errors = [f"{max(run['errors'].values()):.0e}" if run["errors"] else "" for run in runs]
        errors += ["not run"] * (len(RUNS) - len(runs))
        lines.append(f"| {case.of} | {case.construct} | {', '.join(kinds)} | {' | '.join(errors)} |")
    whole = sum(map(is_whole, results.values()))
    return (
        "\n".join(
            [
                *lines,
                "",
                f"{whole} of {len(results)} are right as one graph; {len(NETWORKS) - len(results)} have not been run.",
            ]
        )
        + "\n"
    )


def is_whole(runs: list[dict[str, Any]]) -> bool:
    return all(run["status"] == "right" and run["capture"] == "one graph" for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/reach"), help="folder of the JSON files: what is there stays"
    )
    parser.add_argument("--table", type=Path, help="write what is there into this file as Markdown, and run nothing")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long, to go on when called again")
    parser.add_argument("names", nargs="*", help="default: all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + 60 * options.minutes, {}
    for name in options.names or NETWORKS:
        file = options.out / f"{name}.json"
        runs = json.loads(file.read_text()) if file.exists() else []
        for dtype, dynamic in RUNS[len(runs) :] if options.table is None else ():
            if time.monotonic() > end:
                sys.exit(f"no time for {name} and those after it: run it again")
            with NETWORKS[name].installed():
                runs.append(examine(NETWORKS[name], dtype, dynamic))
            print(line(name, runs[-1]), flush=True)
            file.write_text(json.dumps(runs, indent=1) + "\n")
        if runs:
            results[name] = runs
    if options.table:
        options.table.write_text(table(results))
        return
    bad = [name for name, runs in results.items() if not is_whole(runs)]
    print(f"{len(results) - len(bad)} of {len(results)} are right as one graph; not so: {', '.join(bad) or 0}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
