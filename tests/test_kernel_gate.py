"""The attention kernels compiled for GPUs that are not here: what the gate must catch, and a part of what it checks.
`make gate` checks the rest, and `make test-kernels` assembles the variants that are not in the tables."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime import driver

from jvpgraph.kernels import gate, gate_checks, gate_launches
from jvpgraph.kernels.attention_triton import packed_blocks
from jvpgraph.kernels.blocks import (
    BACKWARD_TABLE,
    SHARED_MEMORY,
    TABLE,
    BackwardBlocks,
    BackwardEntry,
    Blocks,
    Entry,
    GluonBlocks,
    GluonEntry,
    Sweeps,
    _table_arch,
    backward_sweeps,
    choose_blocks,
    variant,
)
from jvpgraph.kernels.call import Place
from jvpgraph.kernels.gate_launches import Case, Flags
from jvpgraph.kernels.recorded import KERNELS, memory
from jvpgraph.kernels.sass import disassemble, wrong_descriptors

pytestmark = [
    pytest.mark.slow,  # Triton's compiler, and NVIDIA's assembler
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has replaced the compiler"),
]

BF16 = torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Kernels for absent GPUs stay out of the user's cache, and none is assembled twice for these tests."""
    assemble, known = gate_checks.compile_launch, {}

    def once(launch):
        key = launch.target, launch.key
        if key not in known:
            known[key] = assemble(launch)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(gate_checks, "compile_launch", once)
        yield


@pytest.mark.long
def test_the_command(monkeypatch, capsys):
    of_arch = {x: y for x, y in BACKWARD_TABLE.items() if x.arch == 90}
    without_rows = {x: y for x, y in of_arch.items() if backward_sweeps(*x[:3]) is y}
    assert sum(len(gate_launches.sweeps_of(x, y)) for x, y in without_rows.items()) == 12
    of_64 = {x: y for x, y in BACKWARD_TABLE.items() if x.head_dim == 64}
    monkeypatch.setattr(gate, "BACKWARD_TABLE", of_64)
    assert gate.main(["--arch", "90", "--table", "backward", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        out.count(" ok\n")
        == sum(len(gate_launches.sweeps_of(x, y)) for x, y in without_rows.items() if x in of_64)
        == 6
    )


def test_what_the_command_covers():
    of_tables, calls = set(), set()
    for job in gate.jobs(tuple(SHARED_MEMORY), ("forward", "backward", "launches")):
        first, second = job.args[:2]
        if isinstance(first, Case):
            calls |= {(first, arch) for arch in second}
        else:
            of_tables.add(first)
    assert {x.arch for x in of_tables if isinstance(x, Entry)} == {80, 89, 90, 100, 120}  # 86 has the entries of 89
    assert calls == set(itertools.product(gate.CASES, SHARED_MEMORY))
    forward_86 = [job.args[0] for job in gate.jobs((86,), ("forward", "backward"))]
    assert {x.arch for x in forward_86} == {86}


# Launches that asked for more than there is, one for each kind of mask.
FIT = [
    (120, "d value", 128, "half rows", False),
    (89, "d value", 128, "bool rows", True),
    (86, "d value", 64, "fp32 rows", False),
    (90, "d tangent", 128, "fp32 padding", False),
    (90, "d tangent", 128, "half rows", True),
    (120, "tangent", 128, "fp32 rows", False),
    (100, "d tangent", 128, "fp32 rows", False),
    (90, "d tangent", 64, "tiles", False),
    (80, "tangent", 128, "tiles", False),
    (89, "d tangent", 64, "bool rows", False),
]


@pytest.mark.long
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("arch", "way", "head_dim", "mask", "is_causal"), FIT, ids=str)
def test_what_the_host_launches_fits(arch, way, head_dim, mask, is_causal):
    sizes, violations = gate_launches.too_large(Case(way, head_dim, mask, is_causal), (arch,))
    assert not violations
    assert set(sizes[arch]) >= ({"sums", "queries"} if way.startswith("d ") else {"forward"})
    assert 16384 < max(sizes[arch].values()) <= SHARED_MEMORY[arch]


@pytest.mark.long
def test_memory_is_that_of_the_compiled_kernel():
    for call, arch in ((Case("d tangent", 64, "bool rows"), 89), (Case("value", 64, "fp32 padding"), 100)):
        launch = call.launches(arch)[-1]
        compiled, _ = gate_checks.compile_launch(launch)
        assert memory(launch) == (compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0)


def test_every_call_of_ours_is_recorded():
    """With a mask or grouped heads or a gradient of lse it is the kernels of the backward, and all of its launches."""
    for arch, active in ((89, False), (90, False), (90, True)):
        call = Case("d tangent" if active else "d value", 128, "bool rows")
        sweeps = backward_sweeps(arch, 128, active, 1)
        launched = {gate_launches.sweep_of(x): x for x in call.launches(arch)}
        assert set(launched) == {"sums", "queries", *(("keys", "values") if active else ("keys and values",))}
        for name, launch in launched.items():
            blocks = getattr(sweeps, name.partition(" ")[0])
            flags = launch.constants
            assert (flags["BLOCK_Q"], flags["BLOCK_K"]) == blocks[:2]
            assert (launch.options["num_warps"], launch.options["num_stages"]) == blocks[2:]
            assert (flags["BIAS"], flags["BIAS_HAS_ROWS"], flags["TANGENT"]) == (1, True, active)
    assert [x.name for x in Case("tangent", 128, "no mask").launches(90)] == ["attention_jvp_kernel"]
    assert [x.name for x in Case("tangent", 128, "padding").launches(90)] == ["attention_kernel"]
    assert not Case("d tangent", 128, "padding").launches(89)  # blocks of torch ops


def test_recording_leaves_nothing_behind():
    active = driver._active
    Case("d value", 64, "bool rows").launches(90)
    assert driver._active is active
    assert all(not (set(kernel.device_caches) & {-90}) for kernel in KERNELS)
    assert all(kernel.compile is triton.compile for kernel in KERNELS)
    assert Place.of(torch.device("meta")) == Place("meta")


def test_a_planted_overflow_fails_the_command(monkeypatch, capsys):
    """The tiles without a mask take too much with one."""
    of_none, of_rows = BackwardEntry(89, 64, True, 0), BackwardEntry(89, 64, True)
    monkeypatch.setitem(BACKWARD_TABLE, of_rows, BACKWARD_TABLE[of_none])
    monkeypatch.setattr(gate, "CASES", (Case("d tangent", 64, "bool rows"),))
    assert gate.main(["--arch", "89", "--table", "launches", "--jobs", "1"]) == 1
    assert "sm_89, queries: shared memory 102400 of 101376 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("code", [7510, 7511, 7512, 7513, 7514, 7515])
def test_notes_of_serialised_products_are_read(code):
    log = (
        f"ptxas info    : (C{code}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline "
        "stage in the function 'queries_kernel'\nptxas info    : (C7600) something else\n"
    )
    assert gate_checks.serialised(log) == [f"C{code}"]
    assert any("serialised" in what for what in gate_checks._violations([], [], 0, log, 0, 90, 0))
    assert not gate_checks.serialised("ptxas info    : Used 255 registers")


def test_a_gpu_takes_the_tiles_of_one_with_as_much_memory():
    for capability, like in ((80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (103, 100), (120, 120), (121, 120)):
        assert _table_arch(capability) == like
    assert {x.arch for x in TABLE} == {x.arch for x in BACKWARD_TABLE} == set(SHARED_MEMORY)
    for arch, row_bytes in itertools.product(SHARED_MEMORY, (0, 1, 2, 4)):
        for head_dim, active in itertools.product((16, 64, 72, 128), (False, True)):
            is_there = backward_sweeps(arch, head_dim, active, row_bytes) is not None
            assert is_there == (head_dim <= 64 or not active or arch in (90, 100))


@pytest.mark.long
def test_what_the_gate_must_catch():
    """A tile too large for the registers, and one too large for the shared memory."""
    spilling = gate_checks.check(Entry(90, 128, BF16, "jvp"), Blocks(128, 64, 4, 2))
    assert any("spills in the loop" in what for what in spilling.violations)
    large = gate_checks.check(Entry(90, 64, BF16, "forward"), Blocks(128, 256, 8, 6))
    assert any("shared memory" in what for what in large.violations)
    serialised = gate_checks.check(Entry(90, 128, BF16, "jvp"), Blocks(128, 64, 8, 2, halves=True))
    assert any("serialised" in what for what in serialised.violations)
    replicated = gate_checks.check(Entry(80, 64, BF16, "forward"), Blocks(64, 64, 8, 2))
    assert any("matrix instructions" in what for what in replicated.violations)


@pytest.mark.long
def test_what_the_gate_must_catch_in_gluon():
    """As above: a tile too large for the registers, which wgmma is serialised over, and one for the shared memory."""
    spilling = gate_checks.check_gluon(GluonEntry(128, 4), GluonBlocks(128, 1))
    assert any("spills in the loop" in what for what in spilling.violations)
    assert any("serialised" in what for what in spilling.violations)
    large = gate_checks.check_gluon(GluonEntry(128, 4), GluonBlocks(64, 3))
    assert any("shared memory" in what for what in large.violations)


@pytest.mark.long
def test_what_the_gate_must_catch_in_the_backward():
    spilling = gate_checks.check_backward(BackwardEntry(90, 128, True), "keys", BackwardBlocks(64, 64, 4, 2))
    assert any("spills in the loop" in what for what in spilling.violations)
    large = gate_checks.check_backward(BackwardEntry(89, 64, False), "queries", BackwardBlocks(128, 64, 8, 6))
    assert any("shared memory" in what for what in large.violations)


@pytest.mark.long
def test_a_planted_entry_fails_the_command(monkeypatch, capsys):
    """The entries that spilled above, one in each table."""
    monkeypatch.setattr(gate, "TABLE", {Entry(90, 128, BF16, "jvp"): Blocks(128, 64, 4, 2)})
    monkeypatch.setattr(gate, "GLUON_TABLE", {GluonEntry(128, 4): GluonBlocks(128, 1)})
    entry, planted = BackwardEntry(90, 128, True, 0), Sweeps(*(BackwardBlocks(64, 64, 4, 2),) * 4)
    monkeypatch.setitem(BACKWARD_TABLE, entry, planted)
    monkeypatch.setattr(gate, "BACKWARD_TABLE", {entry: planted})
    monkeypatch.setattr(gate, "sweeps_of", lambda entry, sweeps: {"keys": sweeps.keys})
    monkeypatch.setattr(gate, "CASES", ())
    assert gate.main(["--jobs", "1"]) == 3
    assert capsys.readouterr().out.count("spills in the loop") == 3


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


@pytest.mark.long
@pytest.mark.sampled(5)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_windows_and_packed_sequences_keep_what_the_table_has(arch, head_dim, packed):
    entry = Entry(arch, head_dim, BF16, "jvp")
    blocks = packed_blocks(TABLE[entry]) if packed else TABLE[entry]
    report = gate_checks.check(entry, blocks, Flags(has_left=True, has_right=True, packed=packed))
    assert not report.violations


def variant_launch(arch, d, d_v, dtype, flags, by_descriptor):
    active = flags.has_q_dot or flags.has_k_dot or flags.has_v_dot or flags.has_bias_dot
    blocks = choose_blocks(arch, (d, d_v), dtype, variant(active, bool(flags.bias)), by_descriptor)
    if flags.packed:
        blocks = packed_blocks(blocks)
    return gate_launches.forward_launch(arch, (d, d_v), dtype, blocks, flags, by_descriptor)


def check_memory(launch):
    shared, tensor_memory = memory(launch)
    assert shared <= SHARED_MEMORY[launch.target.arch]
    assert tensor_memory <= gate_launches.TENSOR_MEMORY


@pytest.mark.long
@pytest.mark.sampled(6)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_other_variants_fit(variant):
    check_memory(variant_launch(*variant))


@pytest.mark.long
@pytest.mark.sampled(13)  # the first is of Hopper, whose operands an assembler may lose
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_other_variants_are_assembled(variant):
    compiled, _ = gate_checks.compile_launch(variant_launch(*variant))
    assert not wrong_descriptors(disassemble(compiled.asm["cubin"]))


SEVERAL_PARTS = [
    BackwardEntry(arch, head_dim, active)
    for arch, head_dim in ((80, 96), (90, 96), (90, 72), (100, 96))
    for active in (False, True)[: 1 if arch == 80 else 2]
]


def launches_of(entry):
    sweeps = backward_sweeps(entry.arch, entry.head_dim, entry.active)
    return [
        gate_launches.backward_launch(entry, sweep, blocks)
        for sweep, blocks in gate_launches.sweeps_of(entry, sweeps).items()
    ]


@pytest.mark.long
@pytest.mark.sampled(6)
@pytest.mark.parametrize("entry", SEVERAL_PARTS, ids=str)
def test_the_backward_fits_in_head_dims_of_several_parts(entry):
    assert backward_sweeps(80, 112, active=True) is None
    for launch in launches_of(entry):
        check_memory(launch)


@pytest.mark.matrix
@pytest.mark.parametrize("entry", SEVERAL_PARTS, ids=str)
def test_the_backward_is_assembled_in_head_dims_of_several_parts(entry):
    for launch in launches_of(entry):
        gate_checks.compile_launch(launch)
