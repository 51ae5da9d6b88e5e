"""Attention with its JVP beside its peers, and tiles near those of the block table: stages of benchmarks/gpu.py.

What is timed: bfloat16, q, k, v and their tangents contiguous as [B, H, N, D], which all peers take without a copy.
  self   q, k and v move, as in self-attention: 6 matmuls of 2 B H N Nkv D FLOP
  cross  512 keys that stand still, as those of a text: 4 matmuls
A forward without tangent counts 2. Before a peer is timed its result is held against float64 on the same inputs, in
some rows of some heads, the first and last ones included: no figure for a wrong result.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.part import PEER, Part
from benchmarks.timing import Clock, interleaved, state, summary
from jvpgraph.kernels import attention_blocked, reference
from jvpgraph.kernels.attention import attention, attention_jvp
from jvpgraph.kernels.blocks import Blocks, GluonBlocks, choose_blocks
from jvpgraph.kernels.call import Call
from jvpgraph.kernels.choose import GLUON, plan

if importlib.util.find_spec("triton"):
    from jvpgraph.kernels import attention_gluon, attention_triton

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


# ----------------------------------------------------------------------------------------------------- peers


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


# ----------------------------------------------------------------------------------------------- correctness


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


# --------------------------------------------------------------------------------------------------- measure


def first_run(name: str, case: Case, x: Inputs, truth: Truth) -> tuple[dict[str, Any], Run | None]:
    """What a peer gives and takes; the function to be timed, if that is right."""
    cuda = x.q.is_cuda
    try:
        run = PEERS[name](case, x)
        poison(x)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        o, o_dot = run()
        memory = torch.cuda.max_memory_allocated() - before if cuda else None
        errors = truth.errors(o, o_dot)
    except Unavailable as reason:
        return {"skipped": str(reason)}, None
    except torch.OutOfMemoryError:
        return {"skipped": "needs more memory than there is"}, None
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if is_lost(what, cuda):
            raise SystemExit(f"{name}: {what}: nothing more runs in this process") from error
        return {"refused" if isinstance(error, AssertionError) else "failed": what}, None
    result: dict[str, Any] = {"error": errors, "memory_bytes": memory}
    if name in OURS:
        tensors = x.all() if o_dot is not None else (x.q, x.k, x.v)
        call = Call(*tensors, scale=case.head_dim**-0.5)
        result["implementation"] = str(plan(call))  # as the run has left the variable for it
    if not max(errors.values()) < LIMIT:
        return {"wrong": True} | result, None
    return result, run


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


def measure_case(case: Case, part: Part, clock: Clock, crashed: dict[str, str]) -> dict[str, Any]:
    torch.manual_seed(random.SystemRandom().randrange(1 << 31))
    x = Inputs(case, part.device)
    truth = Truth(case, x)
    peers: dict[str, dict[str, Any]] = {}
    runs = {}
    for name in case.peers:
        if name in crashed:
            peers[name] = {"crashed": crashed[name]}
            continue
        part.save(running=[case.key, name])
        peers[name], run = first_run(name, case, x, truth)
        if run is not None:
            runs[name] = run
        gc.collect()
        if part.device == "cuda":
            torch.cuda.empty_cache()
    part.save(running=[case.key, "timing"])
    quick = {"least": 2, "most": 2} if part.dry_run else {}
    times = interleaved(clock, runs, **quick)
    ceiling = part.of("environment").get("matmul_flops")
    forwards = [summary(times[name])["seconds"] for name in FORWARDS if name.startswith("SDPA") and name in runs]
    for name, run in runs.items():
        found = summary(times[name])
        rate = case.matmuls(name) * case.product / found["seconds"]
        found |= {"host_seconds": min(clock.host(run) for _ in range(3)), "tflops": rate / 1e12}
        if ceiling:
            found["of_ceiling"] = rate / ceiling
        if forwards:
            found["times_sdpa_forward"] = found["seconds"] / min(forwards)
        peers[name] |= found
    shape = {"kind": case.kind, "head_dim": case.head_dim, "heads": case.heads, "batch": case.batch}
    shape |= {"n": case.n, "n_kv": case.n_kv, "dtype": "bfloat16", "flop": case.matmuls("jvpgraph") * case.product}
    return {"case": case.key} | shape | {"peers": peers, "state": state(part.device)}


def measure(part: Part) -> None:
    """All cases, as far as the time goes; goes on where a process that died left off."""
    data = part.data
    done = data.setdefault("cases", [])
    crashed = data.setdefault("crashed", {})
    died_at = data.pop("running", None)
    if died_at is not None:
        crashed[died_at[1]] = f"took the process down in {died_at[0]}"
    todo = [case for case in cases(part.dry_run) if case.key not in {entry["case"] for entry in done}]
    if died_at is None:
        compile_ahead(part, ((case, name) for case in todo for name in case.peers if worth_compiling_ahead(case, name)))
    elif died_at[1] == "timing":
        todo = [case for case in todo if case.key != died_at[0]]
    clock = Clock(part.device)
    for i, case in enumerate(todo):
        if part.left < 5 and not part.dry_run:
            part.save(left_out=[case.key for case in todo[i:]])
            break
        entry = measure_case(case, part, clock, crashed)
        done.append(entry)
        data.pop("running", None)
        part.save(table=table(done))
    problems = [
        f"{entry['case']}: {name}: {peer}"
        for entry in done
        for name, peer in entry["peers"].items()
        if name in OURS and ("wrong" in peer or "failed" in peer or "refused" in peer or "crashed" in peer)
    ]
    problems += [f"{what}: while it was timed" for name, what in crashed.items() if name == "timing"]
    part.save(problems=problems)
    if problems:
        raise SystemExit("\n".join(problems[:8]))


def table(done: list[dict[str, Any]]) -> list[str]:
    """A line per case: TFLOP/s of every peer."""
    lines = []
    for entry in done:
        figures = [
            f"{name} {peer['tflops']:.3g}" if "tflops" in peer else f"{name}: {next(iter(peer))}"
            for name, peer in entry["peers"].items()
        ]
        lines.append(f"{entry['case']}: " + "; ".join(figures))
    return lines


# --------------------------------------------------------------------------------------------------- compile


def worth_compiling_ahead(case: Case, name: str) -> bool:
    """Triton kernels: ours once for all lengths, the peer's for every length."""
    if case.peers == MATH:
        return False
    if name in (PEER, POINTERS):
        return case.kind == "self"
    return name in OURS and case.n in (1024, 64)


def warm(job: tuple[str, Any]) -> None:
    """Run a job once, in a process whose end does not matter, for what it leaves in the compiler's cache."""
    device, what = job
    try:
        case, how = what
        if isinstance(how, str):
            PEERS[how](case, Inputs(case, device))()
        else:
            kind, tile = how
            sweep_run(kind, case, Inputs(small(case), device), tile)()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:  # whatever it is, it is found and recorded where it is measured
        pass


def compile_ahead(part: Part, what: Iterable[tuple[Any, ...]]) -> None:
    """Compile in parallel what would otherwise be compiled one after the other."""
    jobs = [(part.device, job) for job in what]
    jobs = jobs[:1] if part.dry_run else jobs
    workers = 1 if part.dry_run else min(12, max(1, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        # a worker that dies takes its job with it: wait no longer than a third of the time
        pool.map_async(warm, jobs, chunksize=1).wait(max(1.0, min(60.0, part.left / 3)))


# ----------------------------------------------------------------------------------------------------- sweep


# Near the entries of the tables, and those of the tables again: None. "forward" is the value alone.
CANDIDATES: dict[tuple[str, int, torch.dtype], list[Blocks | GluonBlocks]] = {
    ("self", 128, torch.bfloat16): [Blocks(64, 64, 4, 2), GluonBlocks(64, 2), GluonBlocks(64, 2, overlap=True)],
    ("self", 64, torch.bfloat16): [
        Blocks(128, 128, 8, 2),
        Blocks(64, 64, 4, 3),
        GluonBlocks(128, 2),
        GluonBlocks(64, 4),
    ],
    ("cross", 128, torch.bfloat16): [Blocks(128, 64, 8, 3), GluonBlocks(64, 4), GluonBlocks(64, 4, overlap=True)],
    ("cross", 64, torch.bfloat16): [Blocks(64, 128, 4, 2), GluonBlocks(128, 3), GluonBlocks(128, 4)],
    ("self", 72, torch.bfloat16): [Blocks(64, 64, 4, 2), GluonBlocks(64, 2)],
    ("self", 96, torch.bfloat16): [GluonBlocks(64, 2)],
    ("self", 128, torch.float16): [GluonBlocks(64, 2)],
    ("self", 64, torch.float16): [GluonBlocks(128, 2)],
    ("self", 48, torch.bfloat16): [GluonBlocks(128, 2)],
    ("self", 32, torch.bfloat16): [GluonBlocks(128, 2)],
    ("forward", 128, torch.bfloat16): [Blocks(128, 128, 8, 3), GluonBlocks(128, 2), GluonBlocks(64, 4)],
    ("forward", 64, torch.bfloat16): [Blocks(64, 64, 4, 4), GluonBlocks(128, 4), GluonBlocks(128, 2)],
}


def small(case: Case) -> Case:
    """What compiles the same kernels, and is done at once."""
    return replace(case, batch=1, n=256, n_kv=256)


def sweep_run(kind: str, case: Case, x: Inputs, tile: Blocks | GluonBlocks | None) -> Run:
    """A kernel with a tile, None for the Triton kernel with that of the table; without a GPU torch's blocks, of a size
    of theirs."""
    scale = case.head_dim**-0.5

    def run() -> Result:
        call = Call(*(x.all() if kind != "forward" or not x.q.is_cuda else (x.q, x.k, x.v)), scale=scale)
        if not x.q.is_cuda:
            outs = attention_blocked.attend(call, block_k=None if tile is None else tile.block_k // 8)
        elif isinstance(tile, GluonBlocks):
            outs = attention_gluon.attend(call, blocks=tile)
        else:
            outs = attention_triton.attend(call, blocks=tile)
        return outs.o, outs.o_dot

    return run


def tile_name(tile: Blocks | GluonBlocks | None) -> str:
    if tile is None:
        return "table"
    name = "x".join(str(int(x)) for x in tile[: 3 if isinstance(tile, GluonBlocks) else 4])
    return f"gluon {name}" if isinstance(tile, GluonBlocks) else name


def sweep(part: Part) -> None:
    """Times of candidate tiles beside that of the table's entry; the table stays as it is."""
    n, heads, batch = (48, 2, 1) if part.dry_run else (8192, 12, 2)
    swept = {
        at: Case("cross" if at[0] == "cross" else "self", at[1], heads * 128 // at[1], batch, n, n, (), at[2])
        for at in CANDIDATES
    }
    if not part.dry_run:
        compile_ahead(part, ((swept[at], (at[0], tile)) for at, tiles in CANDIDATES.items() for tile in (None, *tiles)))
    clock = Clock(part.device)
    found = part.data.setdefault("sweep", [])
    for (kind, dim, dtype), tiles in CANDIDATES.items():
        if part.left < 3 and not part.dry_run:
            part.save(left_out=[f"{kind} D={dim}" for kind, dim, _ in list(CANDIDATES)[len(found) :]])
            break
        case = swept[kind, dim, dtype]
        x = Inputs(case, part.device)
        truth = Truth(case, x)
        matmuls = 2 if kind == "forward" else case.matmuls("jvpgraph")
        entry: dict[str, Any] = {"kind": kind, "head_dim": dim, "heads": case.heads, "batch": batch, "n": n}
        entry["dtype"] = str(dtype).removeprefix("torch.")
        entry["table"] = list(table_entry(part, kind, dim))
        tried: dict[str, dict[str, Any]] = {}
        runs = {}
        for tile in (None, *tiles):
            name = tile_name(tile)
            part.save(running=[f"sweep {kind} D={dim}", name])
            run = sweep_run(kind, case, x, tile)
            try:
                poison(x)
                errors = truth.errors(*run())
            except Exception as error:  # more shared memory than there is, say
                tried[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                if is_lost(tried[name]["failed"], x.q.is_cuda):
                    part.save(sweep=[*found, entry | {"tried": tried}])
                    raise SystemExit(f"{name}: {tried[name]['failed']}") from error
                continue
            tried[name] = {"error": errors} | ({} if max(errors.values()) < LIMIT else {"wrong": True})
            if "wrong" not in tried[name]:
                runs[name] = run
        quick = {"least": 2, "most": 2} if part.dry_run else {"seconds": 1.0}
        for name, times in interleaved(clock, runs, **quick).items():
            tried[name] |= summary(times)
            tried[name]["tflops"] = matmuls * case.product / tried[name]["seconds"] / 1e12
        entry["tried"] = tried
        if runs:
            entry["winner"] = min(runs, key=lambda name: tried[name]["seconds"])
        found.append(entry)
        part.data.pop("running", None)
        part.save(table=[sweep_line(entry) for entry in found])
    if any("tflops" not in entry["tried"]["table"] for entry in found):
        raise SystemExit("an entry of the table is wrong or does not run")


def table_entry(part: Part, kind: str, dim: int) -> tuple[Any, ...]:
    """What the block table has for this device."""
    if part.device != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    variant = "forward" if kind == "forward" else "jvp"
    return choose_blocks(arch, (dim, dim), torch.bfloat16, variant, 90 <= arch < 120)


def sweep_line(entry: dict[str, Any]) -> str:
    figures = [
        f"{name} {tried['tflops']:.3g}" if "tflops" in tried else f"{name}: {next(iter(tried))}"
        for name, tried in entry["tried"].items()
    ]
    return f"{entry['kind']} D={entry['head_dim']} {entry['dtype']} (table {entry['table']}): " + "; ".join(figures)
