"""The stages of benchmarks/gpu.py, one per process.

    python -m benchmarks.stages NAME --part FILE --results FILE --seconds S [--dry-run]

Every stage saves what it knows in its part, a JSON file, as soon as it knows it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.part import PEER, Part

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "benchmarks" / ".wheels"
SANITIZER = "compute-sanitizer"


def install(part: Part) -> None:
    """Make jvpgraph and its peer importable: from files alone, with this python's own torch."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", str(WHEELS)]
    wheel = next(iter(WHEELS.glob(f"{PEER}-*.whl")), None)
    needed = {"jvpgraph": ["--editable", str(ROOT)]}
    if wheel is not None:
        needed[PEER] = [str(wheel)]
    missing = {name: what for name, what in needed.items() if not _is_installed(name)}
    if missing:
        subprocess.run([*pip, *(word for what in missing.values() for word in what)], cwd=ROOT, check=True)
    done = [f"{name}: {'installed' if name in missing else 'there already'}" for name in needed]
    if PEER not in needed and not _is_installed(PEER):
        done.append(f"{PEER}: no wheel in {WHEELS.relative_to(ROOT)}")
    part.save(packages=done)


def _is_installed(name: str) -> bool:
    """Whether it is, this package from here. To import it would take a quarter of a minute on a fresh machine."""
    found = list(importlib.metadata.distributions(name=name))  # the folder's own .egg-info is one, and says nothing
    sources = [json.loads(x.read_text("direct_url.json") or "{}").get("url") for x in found]
    return ROOT.as_uri() in sources if name == "jvpgraph" else bool(found)


def environment(part: Part) -> None:
    """Where everything below is measured, and the ceilings of this device."""
    import numpy
    import torch
    import triton

    from benchmarks import record, timing

    versions = {"triton": triton.__version__, "numpy": numpy.__version__, "cuda": torch.version.cuda}
    part.save(**record.environment(part.device), **versions, cores=os.cpu_count())
    if part.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        part.save(
            capability=f"{gpu.major}.{gpu.minor}",
            multiprocessors=gpu.multi_processor_count,
            memory_bytes=gpu.total_memory,
            l2_bytes=getattr(gpu, "L2_cache_size", None),
            cudnn=torch.backends.cudnn.version(),
        )
    part.save(nvidia_smi=_nvidia_smi())
    part.save(**timing.ceilings(timing.Clock(part.device), part.device, part.dry_run), state=timing.state(part.device))
    part.save(
        nvidia_smi_after=_nvidia_smi(),
        table=[
            f"{part.data['device']}, torch {torch.__version__}, triton {triton.__version__}, {part.data['commit']}",
            f"matmul {part.data['matmul_flops'] / 1e12:.0f} TFLOP/s, copy "
            f"{part.data['copy_bytes_per_second'] / 1e12:.2f} TB/s",
        ],
    )


def _nvidia_smi() -> str:
    """Driver, clocks and power as nvidia-smi shows them."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return "not found"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def tests(part: Part) -> None:
    """pytest over the files that have cases for CUDA, spread over the cores: most of the time is compilation."""
    files = ["tests/test_attention_cuda.py"]
    if not part.dry_run:
        files += [f"tests/test_{name}.py" for name in ("attention_triton", "backward_triton", "attention_gluon")]
    # the filters that turn warnings into errors are for the versions of constraints.txt
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    if importlib.util.find_spec("xdist") and not part.dry_run:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 1) - 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "90"]  # of one test: a kernel that hangs
    variables = os.environ | ({"JVPGRAPH_DRY_RUN": "1"} if part.dry_run else {})
    part.save(files=files, counts={}, failures=[])
    run = subprocess.Popen(
        [*command, *files], cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.stdout is not None
    # interrupted, it still says what failed and why
    timer = threading.Timer(max(1.0, part.left - 5), run.send_signal, [signal.SIGINT])
    timer.daemon = True
    timer.start()
    counts: dict[str, int] = {}
    failures: list[str] = []
    reasons: set[str] = set()
    saved = time.monotonic()
    for line in run.stdout:
        print(line, end="", flush=True)
        found = outcome(line)
        if found:
            name, what = found
            counts[what] = counts.get(what, 0) + 1
            if what in ("failed", "error"):
                failures.append(name)
        if reason := re.match(r"SKIPPED \[\d+\] [^:]+(?::\d+)?: (.*)", line):
            reasons.add(reason[1].strip())
        if time.monotonic() - saved > 1:
            part.save(counts=counts, failures=failures)
            saved = time.monotonic()
    code = run.wait()
    timer.cancel()
    summary = ", ".join(f"{n} {what}" for what, n in counts.items())
    part.save(counts=counts, failures=failures, skip_reasons=sorted(reasons), table=[summary, *failures[:20]])
    if code:
        raise SystemExit(code)


def outcome(line: str) -> tuple[str, str] | None:
    """(test, what became of it) of a line of pytest -v: "a.py::b PASSED [ 3%]", "[gw0] [  3%] PASSED a.py::b"."""
    results = "PASSED|FAILED|SKIPPED|ERROR"
    if found := re.match(rf"\[gw\d+\] \[ *\d+%\] ({results}) (\S.*)", line):
        return found[2].strip(), found[1].lower()
    if found := re.match(rf"(\S+::.*) ({results})\b.*\[ *\d+%\]", line):
        return found[1].strip(), found[2].lower()
    return None


def memcheck(part: Part) -> None:
    """One small case under compute-sanitizer, where there is one."""
    case = [sys.executable, "-m", "benchmarks.stages", "small_case", "--part", str(part.path.with_name("small.json"))]
    case += ["--results", str(part.results), "--seconds", f"{part.left:.0f}", *(["--dry-run"] if part.dry_run else [])]
    sanitizer = _find_sanitizer()
    part.save(sanitizer=str(sanitizer or "not found"))
    if sanitizer is None or part.dry_run:
        subprocess.run(case, cwd=ROOT, check=True)
        part.save(table=[f"{SANITIZER}: {part.data['sanitizer']}; the case itself passes"])
        return
    # the caching allocator would hide what lies beyond a tensor
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [str(sanitizer), "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20", *case]
    run = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    said = [line for line in run.stdout.splitlines() if line.startswith("=========")]
    part.save(said=said[:60], table=said[-1:])
    if "ERROR SUMMARY" not in run.stdout and "head dims" not in run.stdout:  # it cannot be used on every device
        subprocess.run(case, cwd=ROOT, check=True)
        part.save(table=[f"{SANITIZER} does not work here; the case itself passes", *said[:1]])
        return
    if run.returncode:
        raise SystemExit(run.returncode)


def _find_sanitizer() -> Path | None:
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    homes += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for entry in map(Path, sys.path):
        if (entry / "nvidia").is_dir():
            homes += [path.parent for path in (entry / "nvidia").glob(f"**/{SANITIZER}")]
    return next((home / SANITIZER for home in homes if os.access(home / SANITIZER, os.X_OK)), None)


def small_case(part: Part) -> None:
    """Odd lengths, two head dims that need padding, grouped heads, a mask: little for a sanitizer to trace."""
    import torch

    from jvpgraph.kernels import reference
    from jvpgraph.kernels.attention import attention_jvp

    for d, d_v, has_bias in ((72, 72, False), (64, 40, True), (128, 128, False)):
        shapes = ((1, 2, 65, d), (1, 1, 131, d), (1, 1, 131, d_v))
        inputs = [torch.randn(s, device=part.device).bfloat16() for s in shapes * 2]
        bias = torch.rand(1, 1, 1, 131, device=part.device) > 0.3 if has_bias else None
        have = attention_jvp(*inputs, bias)
        want = reference.attention_jvp(*(x.double() for x in inputs), bias)
        for a, b in zip(have, want):
            error = ((a.double() - b).norm() / b.norm()).item()
            if not error < 2e-2:
                raise SystemExit(f"head dims {d} and {d_v}: off by {error:.1e}")


def sweep(part: Part) -> None:
    from benchmarks import tiles

    tiles.sweep(part)


def attention(part: Part) -> None:
    from benchmarks import attention

    attention.measure(part)


def backward(part: Part) -> None:
    from benchmarks import attention_backward

    attention_backward.measure(part)


def plot(part: Part) -> None:
    from benchmarks import plot

    plot.draw(part.results, part.results.with_suffix(".png"))


def dit(part: Part) -> None:
    """A whole step beside its alternatives."""
    size = ["--dtype", "bfloat16", "--tokens", "1024", "--width", "768", "--batch", "8"]
    if part.dry_run:
        size = ["--tokens", "4", "--width", "64", "--depth", "1", "--repeats", "1", "--compiler", "eager"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.dit",
        "--device",
        part.device,
        *size,
        "--out",
        str(part.results.parent),
    ]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    if run.returncode:
        raise SystemExit(run.returncode)
    part.save(table=run.stdout.splitlines()[-8:])


STAGES: tuple[Callable[[Part], None], ...] = (
    install,
    environment,
    tests,
    memcheck,
    small_case,
    sweep,
    attention,
    backward,
    plot,
    dit,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[stage.__name__ for stage in STAGES])
    parser.add_argument("--part", type=Path, required=True, help="JSON file of this stage")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of all stages")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    o = parser.parse_args()
    stage = next(s for s in STAGES if s.__name__ == o.stage)
    stage(Part(o.part, o.results, o.seconds, o.dry_run))


if __name__ == "__main__":
    main()
