"""Attention with its JVP and its peers: what is run, on which inputs, and what is right.

bfloat16; q, k, v and their tangents contiguous as [B, H, N, D], which all peers take without a copy.
  self   q, k and v move, as in self-attention: 6 matmuls of 2 B H N Nkv D FLOP
  cross  512 keys that stand still, as those of a text: 4 matmuls
A forward without tangent counts 2. What is right is float64 on the same inputs, in some rows of some heads, the first
and last ones included.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.part import PEER
from jvpgraph.kernels import reference
from jvpgraph.kernels.attention import attention, attention_jvp
from jvpgraph.kernels.call import Call
from jvpgraph.kernels.choose import GLUON, plan

Result = tuple[Tensor, Tensor | None]  # o, o_dot
Run = Callable[[], Result]

NO_GPU = "needs a CUDA GPU"
# Norm of the error over the norm of what is right. Eight keys too many among 32,760 are already 1.6e-2.
LIMIT = 1e-2
# Bytes per score that eager differentiation keeps at its peak: scores, tangents, probabilities in two precisions.
BYTES_PER_SCORE = 24


class Unavailable(Exception):
    """A peer that is not here, or does not take such a case."""


@dataclass(frozen=True)
class Case:
    kind: str  # "self" or "cross"
    head_dim: int
    heads: int
    batch: int
    n: int
    n_kv: int
    peers: tuple[str, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        return f"{self.kind} D={self.head_dim} N={self.n} {'math' if 'func.jvp' in self.peers else 'kernels'}"

    @property
    def product(self) -> float:
        """FLOP of one matmul."""
        return 2.0 * self.batch * self.heads * self.n * self.n_kv * self.head_dim

    def matmuls(self, peer: str) -> int:
        return 2 if peer in FORWARDS else 6 if self.kind == "self" else 4


FORWARDS = ("jvpgraph forward", "SDPA flash", "SDPA cuDNN")
OURS = ("jvpgraph", "jvpgraph triton", "jvpgraph forward")
KERNELS = ("jvpgraph", "jvpgraph triton", "jvpgraph forward", "SDPA flash", "SDPA cuDNN", PEER)
POINTERS = f"{PEER}, pointers"
MATH = ("jvpgraph", "func.jvp", "compiled func.jvp")
# Head dim: heads. Those of Wan 1.3B, of a DiT of width 1536, of DiT-XL and PixArt.
HEADS = {128: 12, 64: 24, 72: 16}


def cases(dry_run: bool) -> list[Case]:
    """The most wanted first: time may run out."""
    if dry_run:
        sizes = [(64, 2, 16), (40, 1, 24)]
        return [
            Case(kind, d, 2, b, n, 24 if kind == "cross" else n, (*KERNELS, POINTERS) if not math else MATH)
            for math in (False, True)
            for kind in ("self", "cross")
            for n, b, d in sizes[: 1 if math else 2]
        ]
    found = []
    order = (("self", 128), ("self", 64), ("cross", 128), ("self", 72), ("cross", 64), ("cross", 72))
    for peers in (KERNELS, MATH):
        for kind, d in order:
            for n in (32760, 4096, 16384, 1024, 75600):
                heads = HEADS[d] if n < 75600 else HEADS[d] // 3
                more = (POINTERS,) if peers is KERNELS and kind == "self" and n in (4096, 16384) else ()
                found.append(
                    Case(kind, d, heads, max(1, 32768 // n), n, 512 if kind == "cross" else n, (*peers, *more))
                )
    return found


class Inputs:
    """Random q, k, v and tangents of a case; k_dot and v_dot are None where the keys stand still."""

    def __init__(self, case: Case, device: str) -> None:
        def rows(n: int) -> Tensor:
            return torch.randn(case.batch, case.heads, n, case.head_dim, device=device, dtype=case.dtype)

        self.q, self.k, self.v = rows(case.n), rows(case.n_kv), rows(case.n_kv)
        self.q_dot = rows(case.n)
        self.k_dot, self.v_dot = (rows(case.n_kv), rows(case.n_kv)) if case.kind == "self" else (None, None)

    def all(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.q_dot, self.k_dot, self.v_dot


def ours(case: Case, x: Inputs) -> Run:
    """The op, with the kernel that it chooses."""

    def run() -> Result:
        os.environ.pop("JVPGRAPH_ATTENTION", None)
        o, _, o_dot, _ = attention_jvp(*x.all())
        return o, o_dot

    return run


def our_triton(case: Case, x: Inputs) -> Run:
    """The op with the Triton kernel, where that is not the one chosen."""
    if not x.q.is_cuda:
        raise Unavailable(NO_GPU)
    os.environ.pop("JVPGRAPH_ATTENTION", None)
    if plan(Call(*x.all(), scale=case.head_dim**-0.5)).forward is not GLUON:
        raise Unavailable("is what jvpgraph chooses")

    def run() -> Result:
        os.environ["JVPGRAPH_ATTENTION"] = "triton"
        o, _, o_dot, _ = attention_jvp(*x.all())
        return o, o_dot

    return run


def our_forward(case: Case, x: Inputs) -> Run:
    def run() -> Result:
        os.environ.pop("JVPGRAPH_ATTENTION", None)
        return attention(x.q, x.k, x.v)[0], None

    return run


def sdpa(case: Case, x: Inputs, backend: SDPBackend) -> Run:
    if not x.q.is_cuda:
        raise Unavailable(NO_GPU)

    def run() -> Result:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x.q, x.k, x.v), None

    return run


def jvp_flash_attention(case: Case, x: Inputs, use_tma: bool) -> Run:
    """Its forward with tangents, called without the dual numbers around it."""
    if case.kind == "cross":
        raise Unavailable("takes as many keys as queries, all of which move")
    if importlib.util.find_spec(PEER) is None:
        raise Unavailable("not installed: `make wheels` fetches it")
    if not x.q.is_cuda:
        raise Unavailable(NO_GPU)
    if not use_tma and case.n % 32:
        raise Unavailable("reads past the end of a length that is no multiple of 32")
    from jvp_flash_attention.jvp_attention import JVPAttn

    def run() -> Result:
        o, (o_dot, *_) = JVPAttn.forward(*x.all(), USE_TMA=use_tma)
        return o, o_dot

    return run


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = ((q * q.shape[-1] ** -0.5) @ k.mT).float().softmax(-1)
    return p.to(v.dtype) @ v


def func_jvp(case: Case, x: Inputs, compiled: bool) -> Run:
    bytes_needed = BYTES_PER_SCORE * case.product / (2 * case.head_dim)
    if x.q.is_cuda and bytes_needed > torch.cuda.get_device_properties(0).total_memory:
        raise Unavailable(f"needs about {bytes_needed / 1e9:.0f} GB, more than there is")

    def jvp(q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor, k_dot: Tensor | None, v_dot: Tensor | None) -> Result:
        if k_dot is None or v_dot is None:
            return torch.func.jvp(lambda q: math_attention(q, k, v), (q,), (q_dot,))
        return torch.func.jvp(math_attention, (q, k, v), (q_dot, k_dot, v_dot))

    if compiled:
        torch._dynamo.reset()
        jvp = torch.compile(jvp, dynamic=False, backend="inductor" if x.q.is_cuda else "eager")
    return lambda: jvp(*x.all())


PEERS: dict[str, Callable[[Case, Inputs], Run]] = {
    "jvpgraph": ours,
    "jvpgraph triton": our_triton,
    "jvpgraph forward": our_forward,
    "SDPA flash": lambda case, x: sdpa(case, x, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": lambda case, x: sdpa(case, x, SDPBackend.CUDNN_ATTENTION),
    PEER: lambda case, x: jvp_flash_attention(case, x, True),
    POINTERS: lambda case, x: jvp_flash_attention(case, x, False),
    "func.jvp": lambda case, x: func_jvp(case, x, False),
    "compiled func.jvp": lambda case, x: func_jvp(case, x, True),
}


class Truth:
    """float64 attention in some rows of some heads, the first and the last rows among them."""

    def __init__(self, case: Case, x: Inputs) -> None:
        generator = random.Random(0)
        pairs = [(b, h) for b in range(case.batch) for h in range(case.heads)]
        self.pairs = sorted({pairs[0], pairs[-1], *generator.sample(pairs, min(3, len(pairs)))})
        inside = generator.sample(range(case.n), min(64, case.n))
        self.rows = sorted({*range(min(64, case.n)), *inside, *range(max(0, case.n - 64), case.n)})
        moved = [None if t is None else self._heads(t) for t in x.all()]
        q, k, v, q_dot, k_dot, v_dot = moved
        o, _, o_dot, _ = reference.attention_jvp(q[:, :, self.rows], k, v, q_dot[:, :, self.rows], k_dot, v_dot)
        self.o, self.o_dot = o, o_dot

    def _heads(self, x: Tensor) -> Tensor:
        return torch.stack([x[b, h] for b, h in self.pairs])[:, None].double()

    def errors(self, o: Tensor, o_dot: Tensor | None) -> dict[str, float]:
        """Relative to the norm of what is right; infinite where anything at all is not a number."""
        found = {}
        for name, have, want in (("o", o, self.o), ("o_dot", o_dot, self.o_dot)):
            if have is not None:
                # a whole tensor's sum is finite only if all of it is, and takes no memory
                finite = math.isfinite(have.sum(dtype=torch.float32).item())
                error = (self._heads(have)[:, :, self.rows] - want).norm() / want.norm()
                found[name] = error.item() if finite else math.inf
        return found


def poison(x: Inputs) -> None:
    """Leave NaN in the memory that results will be put into."""
    junk = [torch.full_like(x.q, math.nan) for _ in range(3)]
    junk.append(torch.full(x.q.shape[:-1], math.nan, device=x.q.device))
    del junk


def is_lost(what: str, cuda: bool) -> bool:
    """Whether an error has taken the device from this process, as an illegal access does."""
    if "CUDA error" in what:
        return True
    try:
        if cuda:
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
