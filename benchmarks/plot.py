"""TFLOP/s over the number of tokens, from the JSON of benchmarks/gpu.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

TITLES = {"self": "self-attention, q, k and v move: 6 matmuls", "cross": "512 keys, q moves: 4 matmuls"}


def draw(source: Path, target: Path) -> None:
    """One panel per kind of attention and head dim; the ceiling is what the library's matmul reaches."""
    stages: dict[str, Any] = json.loads(source.read_text())["stages"]
    where, cases = stages.get("environment", {}), stages.get("attention", {}).get("cases", [])
    kinds = [kind for kind in TITLES if any(case["kind"] == kind for case in cases)]
    dims = sorted({case["head_dim"] for case in cases})
    names = sorted({name for case in cases for name, peer in case["peers"].items() if "tflops" in peer})
    if not names:
        raise SystemExit("no case was measured: nothing to draw")
    colours = dict(zip(names, plt.get_cmap("tab10").colors))
    figure, panels = plt.subplots(
        len(kinds), len(dims), figsize=(4.6 * len(dims), 3.6 * len(kinds) + 0.8), squeeze=False, sharey=True
    )
    for row, kind in zip(panels, kinds):
        for panel, dim in zip(row, dims):
            here = [case for case in cases if (case["kind"], case["head_dim"]) == (kind, dim)]
            for name in names:
                figures = {c["n"]: c["peers"][name]["tflops"] for c in here if "tflops" in c["peers"].get(name, {})}
                if figures:
                    style = "--" if "forward" in name or "SDPA" in name else "-"
                    panel.plot(
                        *zip(*sorted(figures.items())), style, marker="o", markersize=4, color=colours[name], label=name
                    )
            if "matmul_flops" in where:
                panel.axhline(where["matmul_flops"] / 1e12, color="black", linewidth=1, label="matmul ceiling")
            ticks = sorted({case["n"] for case in here})
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=30)
            panel.minorticks_off()
            panel.set_title(f"D = {dim}; {TITLES[kind]}", fontsize=9)
            panel.set_xlabel("tokens")
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("TFLOP/s")
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{where.get('device')}, torch {where.get('torch')}, Triton {where.get('triton')}, bfloat16")
    figure.tight_layout(rect=(0, 0.09, 1, 0.99))
    figure.savefig(target, dpi=130)
