"""The backward of attention beside that of torch's SDPA, and the backward through its tangent: a stage of
benchmarks/gpu.py.

What is timed: bfloat16, from the forward's o, lse and lse_dot, laid out as [B, H, N, D].
  value    dq, dk, dv from a gradient of o: 5 matmuls of 2 B H N N D FLOP
  tangent  the gradients of q, k, v and their tangents from one of o and one of o_dot
Both sides of a comparison are held against float64 in one head before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.part import Part
from benchmarks.timing import Clock, interleaved, summary
from jvpgraph.kernels import (
    aten_cuda,
    attention_blocked,
    attention_triton,
    backward_blocked,
    backward_triton,
    reference,
)
from jvpgraph.kernels.call import Call, Cotangents, Wanted

Gradients = tuple[Tensor | None, ...]
Run = Callable[[], Gradients]

LIMIT = 2e-2  # norm of the error over the norm of what is right
HEADS = {128: 12, 64: 24}


def runs(x: list[Tensor], o_grad: Tensor, o_dot_grad: Tensor) -> dict[str, Run]:
    """Every way to the gradients, from sums that the forward left."""
    q, k, v = x[:3]
    scale = q.shape[-1] ** -0.5
    value, whole = Call(q, k, v, scale=scale), Call(*x, scale=scale, wanted=Wanted(from_tangent=True))
    outs = attention_triton.attend(whole) if q.is_cuda else attention_blocked.attend(whole)
    of_value, of_whole = Cotangents(o_grad), Cotangents(o_grad, o_dot=o_dot_grad)
    found: dict[str, Run] = {
        "value, blocked": lambda: backward_blocked.differentiate(value, outs, of_value),
        "tangent, blocked": lambda: backward_blocked.differentiate(whole, outs, of_whole),
    }
    if q.is_cuda:
        found["value, flash"] = lambda: aten_cuda.flash(value, outs, of_value)
        found["value, triton"] = lambda: backward_triton.differentiate(value, outs, of_value)
        found["tangent, triton"] = lambda: backward_triton.differentiate(whole, outs, of_whole)
    return found


def truth(x: list[Tensor], o_grad: Tensor, o_dot_grad: Tensor) -> dict[str, Gradients]:
    """The gradients of the last head, in float64."""
    exact = [t[-1:, -1:].double().requires_grad_() for t in x]
    o, _, o_dot, _ = reference.attention_jvp(*exact)
    of_o = torch.autograd.grad(o, exact[:3], o_grad[-1:, -1:].double(), retain_graph=True)
    of_both = torch.autograd.grad((o, o_dot), exact, [t[-1:, -1:].double() for t in (o_grad, o_dot_grad)])
    return {"value": of_o, "tangent": of_both}


def worst(have: Gradients, want: Gradients) -> float:
    found = [((a[-1:, -1:].double() - b).norm() / b.norm()).item() for a, b in zip(have, want) if a is not None]
    return max(found, key=lambda error: float("inf") if error != error else error)


def measure(part: Part) -> None:
    done = part.data.setdefault("cases", [])
    clock = Clock(part.device)
    for d, heads in HEADS.items():
        if part.left < 4 and not part.dry_run:
            part.save(left_out=[f"D={d}"])
            break
        batch, heads, n = (1, 2, 48) if part.dry_run else (2, heads, 8192)
        x = [torch.randn(batch, heads, n, d, device=part.device, dtype=torch.bfloat16) for _ in range(6)]
        o_grad, o_dot_grad = (torch.randn_like(x[0]) for _ in range(2))
        want = truth(x, o_grad, o_dot_grad)
        ways = runs(x, o_grad, o_dot_grad)
        figures: dict[str, dict[str, Any]] = {}
        for name in list(ways):
            part.save(running=[f"D={d}", name])
            error = worst(ways[name](), want[name.split(",")[0]])
            figures[name] = {"error": error}
            if not error < LIMIT:
                figures[name]["wrong"] = True
                del ways[name]
        quick = {"least": 2, "most": 2} if part.dry_run else {"least": 3, "most": 9, "warm_up": 1}
        for name, times in interleaved(clock, ways, **quick).items():
            figures[name] |= summary(times)
            if name.startswith("value"):
                figures[name]["tflops"] = 5 * 2 * batch * heads * n * n * d / figures[name]["seconds"] / 1e12
        done.append({"head_dim": d, "heads": heads, "batch": batch, "n": n, "ways": figures})
        part.data.pop("running")
        part.save(table=[line(entry) for entry in done])
    wrong = [f"D={e['head_dim']}: {name}" for e in done for name, figure in e["ways"].items() if "wrong" in figure]
    if wrong:
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


def line(entry: dict[str, Any]) -> str:
    ways = entry["ways"].items()
    figures = [f"{name} {1e3 * w['seconds']:.3g} ms" if "seconds" in w else f"{name}: wrong" for name, w in ways]
    return f"D={entry['head_dim']} N={entry['n']}: " + "; ".join(figures)
