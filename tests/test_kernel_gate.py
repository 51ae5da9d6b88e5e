"""The attention kernel compiled for GPUs that are not here: the whole block table, and what the gate must catch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from jvpgraph.kernels import gate
from jvpgraph.kernels.attention_triton import packed_blocks
from jvpgraph.kernels.blocks import (
    BACKWARD_TABLE,
    GLUON_TABLE,
    SHARED_MEMORY,
    TABLE,
    BackwardBlocks,
    BackwardEntry,
    Blocks,
    Entry,
    GluonBlocks,
    GluonEntry,
    Sweeps,
    backward_sweeps,
    choose_blocks,
    variant,
)
from jvpgraph.kernels.gate import Flags
from jvpgraph.kernels.sass import disassemble, wrong_descriptors

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has replaced the compiler"
)

BF16 = torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Kernels for absent GPUs stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def gates(_cache) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """The command for each architecture, side by side."""
    command = [sys.executable, "-W", "ignore", "-m", "jvpgraph.kernels.gate", "--arch"]
    started = {
        arch: subprocess.Popen([*command, str(arch)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for arch in sorted(SHARED_MEMORY)
    }
    yield started
    for process in started.values():
        with process:  # closes its output, and waits
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
def test_every_entry_of_the_table_passes(arch, gates):
    out, _ = gates[arch].communicate()
    assert gates[arch].returncode == 0, out
    of_backward = sum(len(gate.launches(x, sweeps)) for x, sweeps in BACKWARD_TABLE.items() if x.arch == arch)
    forward = sum(entry.arch == arch for entry in TABLE) + (arch == 90) * len(GLUON_TABLE)
    assert out.count(" ok\n") == forward + of_backward
    assert of_backward


def test_what_the_gate_must_catch():
    """A tile too large for the registers, and one too large for the shared memory."""
    spilling = gate.check(Entry(90, 128, BF16, "jvp"), Blocks(128, 64, 4, 2))
    assert any("spills in the loop" in what for what in spilling.violations)
    large = gate.check(Entry(90, 64, BF16, "forward"), Blocks(128, 256, 8, 6))
    assert any("shared memory" in what for what in large.violations)
    serialised = gate.check(Entry(90, 128, BF16, "jvp"), Blocks(128, 64, 8, 2, halves=True))
    assert any("serialised" in what for what in serialised.violations)
    replicated = gate.check(Entry(80, 64, BF16, "forward"), Blocks(64, 64, 8, 2))
    assert any("matrix instructions" in what for what in replicated.violations)


def test_what_the_gate_must_catch_in_gluon():
    """As above: a tile too large for the registers, which wgmma is serialised over, and one for the shared memory."""
    spilling = gate.check_gluon(GluonEntry(128, 4), GluonBlocks(128, 1))
    assert any("spills in the loop" in what for what in spilling.violations)
    assert any("serialised" in what for what in spilling.violations)
    large = gate.check_gluon(GluonEntry(128, 4), GluonBlocks(64, 3))
    assert any("shared memory" in what for what in large.violations)


def test_what_the_gate_must_catch_in_the_backward():
    spilling = gate.check_backward(BackwardEntry(90, 128, True), "keys", BackwardBlocks(64, 64, 4, 2))
    assert any("spills in the loop" in what for what in spilling.violations)
    large = gate.check_backward(BackwardEntry(80, 64, False), "queries", BackwardBlocks(128, 64, 8, 6))
    assert any("shared memory" in what for what in large.violations)


def test_a_planted_entry_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(gate, "TABLE", {Entry(90, 128, BF16, "jvp"): Blocks(128, 64, 4, 2)})
    monkeypatch.setattr(gate, "GLUON_TABLE", {GluonEntry(128, 2): GluonBlocks(128, 2)})
    planted = Sweeps(*(BackwardBlocks(128, 64, 4, 2),) * 3)
    monkeypatch.setattr(gate, "BACKWARD_TABLE", {BackwardEntry(90, 128, False): planted})
    assert gate.main([]) == 4
    assert capsys.readouterr().out.count("spills in the loop") == 4


# What the table is not checked for, but must compile to and fit: the interpreter does not know types of loops.
VARIANTS = [
    (90, 72, 40, BF16, Flags(has_k_dot=False, has_v_dot=False), True),
    (90, 128, 64, BF16, Flags(has_right=True), True),
    (90, 40, 72, torch.float16, Flags(False, False, True, bias=1, bias_has_rows=True), True),
    (90, 200, 256, BF16, Flags(False, True, False, bias=2), True),
    (90, 128, 128, BF16, Flags(), False),
    (80, 96, 256, BF16, Flags(True, False, True, has_right=True), False),
    (80, 48, 32, torch.float32, Flags(False, False, False, 2, True, True, has_right=True), False),
    (100, 72, 128, torch.float16, Flags(bias=1, bias_has_rows=True, has_right=True), True),
    (100, 72, 128, BF16, Flags(), True),
    (90, 128, 128, BF16, Flags(bias=2, bias_has_rows=True, has_left=True), True),
    (90, 72, 40, BF16, Flags(False, False, False, packed=True), False),
    (80, 64, 64, torch.float32, Flags(has_right=True, packed=True), False),
    (100, 256, 64, BF16, Flags(), False),
]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
def test_windows_and_packed_sequences_keep_what_the_table_has(arch, head_dim, packed):
    entry = Entry(arch, head_dim, BF16, "jvp")
    blocks = packed_blocks(TABLE[entry]) if packed else TABLE[entry]
    report = gate.check(entry, blocks, Flags(has_left=True, has_right=True, packed=packed))
    assert not report.violations


@pytest.mark.parametrize(("arch", "d", "d_v", "dtype", "flags", "by_descriptor"), VARIANTS, ids=str)
def test_other_variants_compile_and_fit(arch, d, d_v, dtype, flags, by_descriptor):
    moves = flags.has_q_dot or flags.has_k_dot or flags.has_v_dot or flags.has_bias_dot
    blocks = choose_blocks(arch, (d, d_v), dtype, variant(moves, bool(flags.bias)), by_descriptor)
    if flags.packed:
        blocks = packed_blocks(blocks)
    compiled, _ = gate.compile_ahead(arch, d, d_v, dtype, blocks, flags, by_descriptor)
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    assert not wrong_descriptors(disassemble(compiled.asm["cubin"]))
    assert (getattr(compiled.metadata, "tmem_size", None) or 0) <= gate.TENSOR_MEMORY


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("arch", "head_dim"), [(80, 112), (90, 112), (90, 72), (100, 112)])
def test_the_backward_compiles_and_fits_in_head_dims_of_several_parts(arch, moves, head_dim):
    sweeps = backward_sweeps(arch, head_dim, moves)
    if sweeps is None:
        assert (arch, moves) == (80, True)
        return
    entry = BackwardEntry(arch, head_dim, moves)
    for sweep, blocks in gate.launches(entry, sweeps).items():
        report = gate.check_backward(entry, sweep, blocks)
        assert report.shared <= SHARED_MEMORY[arch]
        assert report.tensor_memory <= gate.TENSOR_MEMORY
