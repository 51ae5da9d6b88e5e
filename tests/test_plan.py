"""jvpgraph plan: against what runs take, by torch's allocator, and against the counts of jvpgraph's reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jvpgraph
from benchmarks import plan_table
from jvpgraph.trainer import cli
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.commands.plan import condition
from jvpgraph.trainer.config import RunConfig, StudentConfig
from jvpgraph.trainer.model.dit import dit
from jvpgraph.trainer.model.networks import build_student
from jvpgraph.trainer.model.student import LoRA
from jvpgraph.trainer.plan.machines import GPUS
from jvpgraph.trainer.plan.meter import Meter
from jvpgraph.trainer.plan.plan import computing_dtype, plan_run
from jvpgraph.trainer.plan.report import duration
from jvpgraph.trainer.plan.subject import Plainly, check_sample, network_of
from jvpgraph.trainer.settings import from_dict, load, to_dict

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "out": "run",
    "model": {"load": "jvpgraph.trainer.dit:dit", "options": {"width": 128, "depth": 3, "heads": 4}},
    "student": {"backend": "eager"},
    "device": "cpu",
    "threads": 1,
    "guidance": {"scale": 1.5, "negative": {"labels": 10}},
    "stages": [
        {
            "steps": 4,
            "batch": 32,
            "objective": {"name": "rcm", "dmd": {"simulation_steps": 2, "fake_updates_per_step": 1}},
        }
    ],
    "checkpoint": {"asynchronous": False},
}
ADAPTERS = ["student.lora={rank: 4, targets: [qkv, out]}", "student.checkpoint_blocks=true"]


def measured(folder: Path, overrides: list[str], processes: int) -> int:
    """The most bytes that a process of the run needs."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, "-W", "ignore", *many, "-m", "tests.measure_peak", str(folder / "tiny.yaml"), *overrides]
    done = subprocess.run([*command, f"out={folder / 'run'}"], cwd=ROOT, capture_output=True, text=True, check=False)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    assert len(peaks) == processes, done.stderr[-3000:]
    return max(peaks)


SMALL = [
    "teacher={offload: true, quantization: int8}",
    "fake_score.offload=true",
    "ema.device=cpu",
    "stages.0.student={kind: adamw_8bit}",
    "stages.0.fake={kind: adamw_8bit}",
]
SHARDED = ["parallel.dp_shard=2"]
FEW = ["model.options.depth=4", "stages.0.batch=4", "student.checkpoint_blocks=true"]  # activations beside weights


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([], 1),
        (ADAPTERS, 1),
        pytest.param(SHARDED, 2, marks=pytest.mark.ranks),
        (SMALL, 1),
        pytest.param(["student.dtype=bfloat16", "student.checkpoint_blocks=true"], 1, marks=pytest.mark.matrix),
        pytest.param([*ADAPTERS, "model.options.dtype=bfloat16"], 1, marks=pytest.mark.matrix),
        pytest.param([*ADAPTERS, "teacher.quantization=int8"], 1, marks=pytest.mark.matrix),
        pytest.param([*SHARDED, *ADAPTERS], 2, marks=[pytest.mark.ranks, pytest.mark.matrix]),
        pytest.param([*SHARDED, *FEW], 2, marks=[pytest.mark.ranks, pytest.mark.matrix]),
        pytest.param([*SHARDED, *FEW, "stages.0.objective=scm"], 2, marks=[pytest.mark.ranks, pytest.mark.matrix]),
        pytest.param([*SHARDED, *SMALL[1:], "teacher.offload=true"], 2, marks=[pytest.mark.ranks, pytest.mark.matrix]),
    ],
    ids=[
        "whole",
        "adapters and checkpointed blocks",
        "sharded",
        "small",
        "bfloat16",
        "adapters in bfloat16",
        "adapters on bytes",
        "sharded adapters",
        "sharded, and gradients are much of it",
        "sharded, and a loss of one pass",
        "small and sharded",
    ],
)
def test_the_peak_of_a_run_within_a_tenth(tmp_path, overrides, processes):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    config = load(RunConfig, tmp_path / "tiny.yaml", overrides)
    held = 1797 * 64 * 4  # the digits themselves, which are read at once
    [plan] = plan_run(config, processes=processes, on_gpu=False)
    near = (
        0.12 if overrides == [*SHARDED, *ADAPTERS] else 0.1
    )  # 0.9 of it: what FSDP2 holds beside is much of so little
    assert plan.peak + sum(plan.host.values()) + held == pytest.approx(
        measured(tmp_path, overrides, processes), rel=near
    )


WAN: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 512,
    "rope_max_seq_len": 64,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


@pytest.mark.matrix
@pytest.mark.parametrize(("depth", "backend"), [(6, "eager"), (10, "eager"), (6, "inductor")])
def test_checkpointed_blocks_of_wan_at_two_depths(tmp_path, depth, backend):
    """Where activations are most of it, and most blocks are extrapolated."""
    text = {"encoder_hidden_states": [32, 64]}
    config = {
        **TINY,
        "model": {
            "load": "jvpgraph.trainer.adapters:diffusers_model",
            "options": {"name": "WanTransformer3DModel", "config": {**WAN, "num_layers": depth}},
        },
        "student": {"checkpoint_blocks": True, "backend": backend},
        "guidance": {"scale": 5.0, "negative": {"encoder_hidden_states": [[0.0] * 64] * 32}},
        "data": {
            "source": {"load": "tests.test_export:Noise", "options": {"latents": [16, 5, 32, 32], "conditions": text}}
        },
        "stages": [{"steps": 3, "batch": 1, "objective": "scm"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    [plan] = plan_run(load(RunConfig, tmp_path / "tiny.yaml", []), processes=1, on_gpu=False)
    assert plan.peak == pytest.approx(measured(tmp_path, [], 1), rel=0.1)
    hidden = 5 * 16 * 16 * 128 * 4
    assert plan.kept / hidden == pytest.approx(3 * depth, rel=0.3)  # the input and two attentions' outputs of each


@pytest.mark.long
def test_more_blocks_are_extrapolated():
    """What two and three blocks cost says what six do."""
    shallow, deep = (
        from_dict(RunConfig, {**TINY, "model": {**TINY["model"], "options": {"width": 128, "depth": n, "heads": 4}}})
        for n in (4, 6)
    )
    [of_four], [of_six] = (plan_run(config, processes=1, on_gpu=False) for config in (shallow, deep))
    [of_three] = plan_run(from_dict(RunConfig, TINY), processes=1, on_gpu=False)
    assert of_six.flops == pytest.approx(of_four.flops + 2 * (of_four.flops - of_three.flops), rel=1e-3)
    assert of_six.peak == pytest.approx(of_four.peak + 2 * (of_four.peak - of_three.peak), rel=0.03)


@pytest.mark.long
def test_whole_gradients_wait_for_a_second_pass():
    """Autograd adds up the gradients of both passes of rCM before FSDP2 can reduce them; sCM has one."""
    base = from_dict(RunConfig, {**TINY, "parallel": {"dp_shard": 8}, "stages": [{"steps": 4, "batch": 8}]})
    at_work = {}
    for name in ("scm", "rcm"):
        stage = {"steps": 4, "batch": 8, "objective": name}
        config = from_dict(RunConfig, {**to_dict(base), "stages": [stage]})
        [plan] = plan_run(config, processes=8)
        at_work[name] = max(plan.moments["student: backward"] - plan.moments["student: forward"], 0)
        whole = 4 * plan.parameters[0]
    assert at_work["rcm"] - at_work["scm"] == pytest.approx(whole, rel=0.3)


@pytest.mark.long
def test_flops_are_those_of_the_report():
    student = build_student(dit(width=64, depth=1, heads=2).to("meta"), StudentConfig())
    dual = jvpgraph.transform(student, backend="eager", dynamic=False)
    x, t = torch.empty(2, 1, 8, 8, device="meta").double(), torch.empty(2, device="meta").double()
    cond = {"labels": torch.zeros(2, dtype=torch.long, device="meta")}
    for _ in range(2):  # the first one makes the graph
        with Meter([*student.parameters(), *student.buffers()]) as meter:
            F, _ = dual(x, t, cond, tangents={"x": x, "t": t})
            F.sum().backward()
    [report] = dual.reports
    assert meter.flops >= report.primal_flops + report.tangent_flops + report.backward_flops  # with what is recomputed
    assert meter.flops == pytest.approx(
        int(report.primal_flops + report.tangent_flops + report.backward_flops), rel=0.15
    )


@pytest.mark.slow
def test_the_command_says_whether_it_fits(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY, "stages": [{"steps": 4, "batch": 4, "objective": "dcm"}]}))
    assert cli.main(["plan", str(tmp_path / "tiny.yaml"), "--gpu", "rtx4090", "out=elsewhere"]) == 0
    told = capsys.readouterr().out
    assert "stage 0: dcm" in told
    assert "  fits: " in told
    assert "averages" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_conditions_that_are_the_same_for_all(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY, "stages": [{"steps": 4, "batch": 4, "objective": "dcm"}]}))
    alike = ["conditions={labels: 3}", "--latents", "1x8x8"]
    told = []
    for more in (alike, []):  # else the labels are the data's
        assert cli.main(["plan", str(tmp_path / "tiny.yaml"), "guidance={}", *more]) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if "FLOPs" in line or "optimiser" in line])
    assert told[0] == told[1]
    assert "FLOPs per update" in told[0][-2]


def test_settings_that_do_not_go_with_the_processes(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    assert cli.main(["plan", str(tmp_path / "tiny.yaml"), "--gpus", "3"]) == 1
    assert "parallel.dp_shard=-1 takes as many as there are" in capsys.readouterr().err


def test_durations():
    assert [duration(s) for s in (0.5, 3, 300, 7200, 200000)] == [
        "0.5 seconds",
        "3.0 seconds",
        "5.0 minutes",
        "2.0 hours",
        "2.3 days",
    ]
    assert all(gpu.half > gpu.single for gpu in GPUS.values())


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("encoder_hidden_states=512x4096", (512, 4096), torch.float32),
        ("labels=:0..999", (), torch.int64),
        ("labels=:int", (), torch.int64),
        ("guidance=", (), torch.float32),
        ("ids=77:int32", (77,), torch.int32),
        ("mask=300:bool", (300,), torch.bool),
    ],
)
def test_a_condition_in_words(text, shape, dtype):
    name, like = condition(text)
    assert name == text.partition("=")[0]
    assert (like.device.type, tuple(like.shape), like.dtype) == ("meta", shape, dtype)


@pytest.mark.parametrize("text", ["labels", "=3", "labels=:foo", "labels=:9..3", "labels=0", "labels=axb", "labels=3:"])
def test_a_condition_that_is_none_is_wrong_use(tmp_path, capsys, text):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    with pytest.raises(SystemExit):
        cli.main(["plan", str(tmp_path / "tiny.yaml"), "--latents", "1x8x8", "--condition", text])
    assert "is not NAME=LxD[:KIND], such as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--condition", "labels="], "labels [1] float32"),
        (["--condition", "text=3"], "text [1, 3] float32"),
        ([], "the network cannot run with a sample"),
    ],
)
def test_conditions_that_the_network_does_not_take(tmp_path, capsys, more, said):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    assert cli.main(["plan", str(tmp_path / "tiny.yaml"), "--latents", "1x8x8", *more]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "--condition NAME=LxD[:KIND]" in told


@pytest.mark.long
def test_labels_before_the_data_is_there(tmp_path, capsys):
    """A network of the user's with labels, sized in MiB; the labels' numbers do not matter."""
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY, "stages": [{"steps": 4, "batch": 4, "objective": "dcm"}]}))
    told = []
    for more in (["--latents", "1x8x8", "--condition", "labels=:0..9"], []):
        assert cli.main(["plan", str(tmp_path / "tiny.yaml"), *more]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "memory of each process, MiB" in told[0]


def test_adapters_are_computed_at_the_speed_of_the_weights_below_them():
    """They are float32 themselves, which a GPU computes 15 times slower than bfloat16."""
    for dtype, lora in ((torch.bfloat16, LoRA(rank=2, targets=("qkv",))), (torch.float32, None)):
        student = build_student(dit(width=64, depth=1, heads=2).to(dtype), StudentConfig(lora=lora))
        assert computing_dtype(student) == dtype


def test_numbers_that_a_forward_makes_tensors_of():
    """PyTorch makes those of the meta device in a way that Dynamo does not see, as in Qwen-Image's forward."""

    class Net(nn.Module):
        def forward(self, x):
            numbers = torch.tensor([1.0, 2.0], device=x.device), torch.as_tensor(3, device="meta")
            return x * numbers[0] + numbers[1] + torch.asarray(2.0, dtype=x.dtype, device=x.device)

    x = torch.empty(3, 2, device="meta")
    dual = Plainly(jvpgraph.transform(Net(), backend="eager"))  # which is one graph, or an error
    torch._dynamo.trace_rules.clear_lru_cache()  # as init_process_group does: Dynamo learns in here what torch has
    assert [out.shape for out in dual(x, tangents={"x": x})] == [x.shape] * 2
    one = (torch.ones(2),)
    assert jvpgraph.jvp(lambda x: x * torch.tensor([x.dim(), 2.0]), one, one, backend="eager")[1].tolist() == [1, 2]


def test_rows_that_were_not_made_again_stay():
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text()
    assert plan_table.merged(page, {}) == page
    of = plan_table.subject("FLUX.1-dev", plan_table.NETWORKS["FLUX.1-dev"], 8, 1)
    made = f"| {' | '.join(of)} | new |"
    before, after = page.splitlines(), plan_table.merged(page, {of: made}).splitlines()
    assert len(after) == len(before)
    assert [line for line in after if line not in before] == [made]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"), [("Wan2.1 1.3B", 1.42), ("Wan2.1 14B", 14.29), ("FLUX.1-dev", 11.90), ("Qwen-Image", 20.43)]
)
def test_the_networks_of_the_table_have_their_published_size(name, billions):
    """And run on the sample that the table is for."""
    network = plan_table.NETWORKS[name]
    teacher = network_of(plan_table.settings(network, 8), "model")
    assert sum(p.numel() for p in teacher.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    conditions = {
        key: torch.empty(1, *shape, dtype=dtype, device="meta") for key, (shape, dtype) in network.conditions.items()
    }
    check_sample("model", teacher, Batch(torch.empty(1, *network.latents, device="meta"), conditions))
