"""A run on many processes: who they are, which part of each batch is theirs, and networks spread over them.

    with joined(config) as layout:              # one process, or those that torchrun started
        network = layout.spread(network)        # tensor parallel, then FSDP2
        layout.part, layout.noise(rng)          # which part of a batch is this process's, and the noise for it
        layout.mean(values)                     # over all of the batch

A run is a function of its settings, not of its processes: batches, their order and their noise are the same for any
number of them, so that a run may stop on some and go on with others.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from jvpgraph.context_parallel import ContextParallel
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import ParallelConfig, RunConfig
from jvpgraph.trainer.data.sample import shorten
from jvpgraph.trainer.model.networks import device_of
from jvpgraph.trainer.model.offload import Traffic, buffers_to, count_gathers, rest
from jvpgraph.trainer.model.parts import commonest_dtype, in_bytes, local
from jvpgraph.trainer.model.student import repeated_blocks
from jvpgraph.trainer.noise import Random, RankNoise
from jvpgraph.trainer.run.memory import clashes
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.trigflow import TrigFlow

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


@contextmanager
def joined(config: RunConfig) -> Iterator[Layout]:
    """This process among those that torchrun started, or alone.

    Raises:
        ValueError: settings and processes do not fit each other; nothing was built yet.
    """
    started = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    sizes = sizes_of(config.parallel, world)
    check(config, sizes)
    if world == 1:
        yield Layout(device_of(config), sizes, None, Ranks())
        return
    device = device_of(config, int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=config.parallel.timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    yield Layout(device, sizes, meshes_of(sizes, device), Ranks(timeout))
    if not started:  # and not after an error: the others may not be there to take leave of
        dist.destroy_process_group()


def sizes_of(config: ParallelConfig, world: int) -> dict[str, int]:
    """How often each setting splits, outermost first: processes that talk most are neighbours."""
    sizes = {name: getattr(config, name) for name in ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses", "tp")}
    if config.dp_shard == -1:
        sizes["dp_shard"] = 1
        sizes["dp_shard"] = max(1, world // prod(sizes.values()))
    if (asked := prod(sizes.values())) != world:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 x 1"
        raise ValueError(
            f"parallel: {product} makes {asked} process{'es' * (asked > 1)}, and there {'is' if world == 1 else 'are'} "
            f"{world}: change these settings (parallel.dp_shard=-1 takes as many as there are), or start the run with "
            f"torchrun --nproc-per-node {asked} -m jvpgraph.trainer.cli train"
        )
    return sizes


def check(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raises ValueError for settings that cannot be spread like this or do not go together, of all at once."""
    problems = [*misfits(config, sizes), *clashes(config, sizes)]
    if len(problems) > 1:
        lines = "\n  ".join(problems)
        raise ValueError(f"{len(problems)} settings do not go together:\n  {lines}\nChange them and start again.")
    if problems:
        raise ValueError(problems[0])


def misfits(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[str]:
    parts = sizes["dp_replicate"] * sizes["dp_shard"]
    for index, stage in enumerate(config.stages):
        if stage.batch % parts:
            yield (
                f"stages.{index}.batch is {stage.batch}, and parallel splits it into {parts} equal parts: "
                f"take a multiple of {parts}"
            )
        if stage.objective.critic is not None and context_parallel(sizes):
            yield (
                f"stages.{index}.objective: a critic looks at all tokens of a block, and parallel.cp_* splits them: "
                "use dp_shard"
            )
    if prod(sizes.values()) > 1 and config.student.compile:
        yield "student.compile needs one process: fully_shard's hooks are not compiled. Set it to false"
    if sizes["tp"] > 1 and parts > 1 and config.student.backend == "inductor":
        # torch 2.13 puts device_mesh._get_submesh into the graph as no overload, which Inductor's lowering asserts.
        yield (
            "parallel.tp with dp_shard or dp_replicate uses part of a mesh, for which Inductor has no lowering: set "
            "student.backend to eager, or tp to 1, or tp to the number of processes"
        )
    if sizes["tp"] > 1 and context_parallel(sizes):
        yield "parallel.tp and parallel.cp_* do not go together in the trainer yet: set one of them to 1"
    if sizes["tp"] > 1 and config.student.lora is not None:
        yield "parallel.tp splits linear layers, and not LoRA adapters on them: use dp_shard, or no lora"


def context_parallel(sizes: Mapping[str, int]) -> bool:
    return sizes["cp_ring"] * sizes["cp_ulysses"] > 1


@dataclass(frozen=True)
class Meshes:
    """Two views of the same processes, in the same order."""

    weights: DeviceMesh  # dp_replicate, shard, tp, as far as there are any: who holds which part of a parameter
    data: DeviceMesh  # part, ring, ulysses, tp: who works on which part of a batch, and on which tokens of it


def meshes_of(sizes: Mapping[str, int], device: torch.device) -> Meshes:
    replicate, shard, ring, ulysses, tp = (
        sizes[name] for name in ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses", "tp")
    )
    split = {"dp_replicate": replicate, "shard": shard * ring * ulysses, "tp": tp}
    # Without dims of one process: Inductor does not take the slice of a mesh that tensor parallel alone would see.
    split = {name: size for name, size in split.items() if size > 1 or (name == "shard" and replicate > 1)}
    weights = init_device_mesh(device.type, tuple(split.values()), mesh_dim_names=tuple(split))
    data = init_device_mesh(
        device.type, (replicate * shard, ring, ulysses, tp), mesh_dim_names=("part", "ring", "ulysses", "tp")
    )
    return Meshes(weights, data)


@dataclass(frozen=True)
class Layout:
    """The processes of a run, seen from one of them."""

    device: torch.device
    sizes: Mapping[str, int]  # how often each setting splits
    meshes: Meshes | None  # None: one process
    ranks: Ranks  # all processes, for agreeing on values that are no tensors

    @property
    def many(self) -> bool:
        return self.meshes is not None

    @property
    def first(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.ranks.first

    @property
    def sharded(self) -> bool:
        """Whether parameters are gathered by FSDP2 just before they are used."""
        return self.parts > 1 or context_parallel(self.sizes)

    @property
    def parts(self) -> int:
        """Of each batch."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    @property
    def part(self) -> int:
        """Which one is this process's. Those that split a network or its tokens have the same."""
        return 0 if self.meshes is None else self.meshes.data.get_local_rank("part")

    @property
    def workshop(self) -> torch.device:
        """Where networks are built: one that is going to be split need not fit on the device whole."""
        return torch.device("cpu") if self.many else self.device

    def noise(self, rng: torch.Generator) -> Random:
        """Draws for this process's part of a batch from a generator that all processes have in the same state."""
        return rng if self.parts == 1 else RankNoise(rng, self.part, self.parts)

    def keep(self, model: TrigFlow, rests: Traffic | None = None) -> TrigFlow:
        """The model itself, all of it in this process; `rests` as in `spread`."""
        return model.to(self.device) if rests is None else rest(model, self.device, rests)

    def spread(self, model: TrigFlow, rests: Traffic | None = None) -> TrigFlow:
        """The model itself, its parameters split over the processes and on their devices; names stay.

        Args:
            rests: keep them on the CPU while they are not used, and count here what is copied.

        Raises:
            ValueError: the network has no plan for tensor parallel, or it does not divide.
        """
        if self.meshes is None:
            return self.keep(model, rests)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        if self.sizes["tp"] > 1:
            parallelize(model.net, self.meshes.weights["tp"])
            for name, parameter in model.named_parameters():  # DTensors are new parameters
                parameter.requires_grad_(name not in frozen)
        if context_parallel(self.sizes):
            split_tokens(model.net, self.meshes.data)
        if self.sharded:
            mesh, whole = self.meshes.weights[self.shard_dims], {p for p in model.parameters() if in_bytes(p)}
            stays = OffloadPolicy() if rests is None else CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            # The root too gives up what it gathered: its parameters may be written to between two forwards.
            for module in (*repeated_blocks(model.net), model):
                dtype, others = main_dtype(p for p in module.parameters() if "shard" not in mesh_dims(p))
                whole |= others
                wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
                policy = MixedPrecisionPolicy(reduce_dtype=wide)
                fully_shard(
                    module,
                    mesh=mesh,
                    reshard_after_forward=True,
                    mp_policy=policy,
                    offload_policy=stays,
                    ignored_params=whole,
                )
                if context_parallel(self.sizes):  # sums over the tokens, means over the samples
                    module.set_gradient_divide_factor(self.parts)  # type: ignore[operator]
                    # Else a factor of one's own becomes PREMUL_SUM, which is NCCL's only.
                    module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
            if rests is not None:
                count_gathers(model, rests)
                for parameter in whole:
                    parameter.data = parameter.data.to(self.device)
                return buffers_to(model, self.device)
        return model.to(self.device)

    @property
    def shard_dims(self) -> tuple[str, ...]:
        """Dims of `meshes.weights` over which FSDP2 reduces gradients."""
        return ("shard",) if self.sizes["dp_replicate"] == 1 else ("dp_replicate", "shard")

    @torch.no_grad()
    def reduce_whole(self, model: nn.Module) -> None:
        """Reduces the gradients of parameters that FSDP2 does not shard as it has reduced the others, in float32."""
        if self.meshes is None or not self.sharded:
            return
        whole = [p.grad for p in model.parameters() if p.grad is not None and "shard" not in mesh_dims(p)]
        if not whole:
            return
        gradients = [local(gradient) for gradient in whole]
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
        total = torch.cat([gradient.flatten().to(wide) for gradient in gradients])
        for dim in self.shard_dims:
            dist.all_reduce(total, group=self.meshes.weights.get_group(dim))
        total /= self.parts
        for gradient, reduced in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(reduced.view_as(gradient))

    def check_gradients(self, model: TrigFlow, sample: Batch) -> None:
        """Raises ValueError if the network's plans would give wrong gradients, for one backward or two."""
        if self.sizes["tp"] > 1:
            self.check_plan(model, sample)
        if context_parallel(self.sizes):
            self.check_gather(model, sample)

    def check_gather(self, model: TrigFlow, sample: Batch) -> None:
        """Raises ValueError if a parameter sees all tokens in every process, behind the network's gather.

        Gradients are summed over the processes that split the tokens, each with those of its own; that one's would be
        counted by each of them. It is found by weights of the loss, 1 and -1 in the first and the last process, that
        leave nothing of such a gradient, and something of any sum over other tokens.
        """
        assert self.meshes is not None
        data, last = self.meshes.data, self.sizes["cp_ring"] * self.sizes["cp_ulysses"] - 1
        own = data.get_local_rank("ring") * self.sizes["cp_ulysses"] + data.get_local_rank("ulysses")
        t = torch.full((len(sample),), 0.5, dtype=torch.float64, device=self.device)
        noise = torch.randn(sample.x0.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        names, norms = [], []
        for weight in (1.0, 1.0 if own == 0 else -1.0 if own == last else 0.0):
            (weight * (model(sample.x0, t, sample.cond) * noise).sum()).backward()
            self.reduce_whole(model)
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            names = list(gradients)
            norms.append(torch.stack([local(g).double().square().sum() for g in gradients.values()]))
            model.zero_grad()
        for norm in norms:  # of copies, a multiple
            dist.all_reduce(norm)
        plain, weighted = (norm.tolist() for norm in norms)
        if behind := [name for name, a, b in zip(names, plain, weighted, strict=True) if b < 1e-4 * a]:
            raise ValueError(
                f"parallel.cp_*: {shorten(behind)} of {type(model.net).__name__} see the tokens of all processes, "
                f"which makes their gradients {last + 1} times too large: gather (ContextParallel.gather) after the "
                "last parameter, not before it, or set cp_ulysses and cp_ring to 1"
            )

    def check_plan(self, model: TrigFlow, sample: Batch) -> None:
        """Raises ValueError if a parameter that tensor parallel leaves whole gets another gradient in each process.

        So it is with one that works on a split activation, such as the norm of split heads: torch's styles let it, and
        the copies of the parameter would drift apart.
        """
        assert self.meshes is not None
        t = torch.full((len(sample),), 0.5, dtype=torch.float64, device=self.device)
        model(sample.x0, t, sample.cond).square().sum().backward()
        group, own = self.meshes.weights.get_group("tp"), []
        for name, parameter in model.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or "tp" in mesh_dims(gradient):
                continue
            mine = local(gradient).double()
            mean = mine.clone()
            dist.all_reduce(mean, group=group)
            mean /= self.sizes["tp"]
            if (mean - mine).norm() > 1e-2 * mean.norm():
                own.append(name)
        if names := sorted({name for found in self.ranks.gather(lambda: own) for name in found}):
            raise ValueError(
                f"parallel.tp: the gradients of {shorten(names)} differ between processes: these parameters see a part "
                "of an activation, and the plan of the network leaves them out. Name their modules in its tp_plan, "
                "for example with SequenceParallel(sequence_dim=2, use_local_output=True) for a norm of heads "
                "[B, N, H, D], or set tp=1"
            )

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over all processes, each of no dims; they come out the same bits everywhere."""
        if self.meshes is None:
            return dict(values)
        total = torch.stack([value.detach().to(self.device, torch.float64) for value in values.values()])
        dist.all_reduce(total)
        means = (total / self.ranks.size).unbind()
        return {name: mean.to(value.dtype) for mean, (name, value) in zip(means, values.items(), strict=True)}


def mesh_dims(tensor: Tensor) -> tuple[str, ...]:
    """Names of the dims that a tensor is spread over; none for a plain tensor."""
    return (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()


def main_dtype(parameters: Iterable[nn.Parameter]) -> tuple[torch.dtype | None, set[nn.Parameter]]:
    """The dtype of most of what is trained, and the parameters that are trained in another.

    FSDP2 reduces what it shards together in one dtype. diffusers keeps some small parameters of a bfloat16 network in
    float32, also single ones of a block: they stay whole in every process.
    """
    trained = [p for p in parameters if p.requires_grad]
    most = commonest_dtype(trained)
    return most, {p for p in trained if p.dtype != most}


def split_tokens(net: Any, mesh: DeviceMesh) -> None:
    """Context parallel by the network's own interface: its method `split_tokens`, or diffusers' enable_parallelism."""
    if hasattr(net, "split_tokens"):
        ring, ulysses = (mesh.get_group(name) if mesh[name].size() > 1 else None for name in ("ring", "ulysses"))
        net.split_tokens(ContextParallel(ring=ring, ulysses=ulysses))
    elif getattr(net, "_cp_plan", None):
        if mesh["ring"].size() > 2:
            # Version 0.42 adds gradients of keys and values to those of other processes' keys and values. What mends
            # that is for calls with tangents of the network itself; there are others here.
            raise ValueError(
                f"parallel.cp_ring is {mesh['ring'].size()}: the ring attention of diffusers has wrong gradients on "
                f"more than two processes. Use parallel.cp_ulysses instead, or give {type(net).__name__} a method "
                "split_tokens that attends by jvpgraph.context_parallel.ContextParallel"
            )
        if not torch.accelerator.device_count():
            raise ValueError("parallel.cp_*: diffusers' context parallel needs a GPU")
        diffusers = importlib.import_module("diffusers")
        config = diffusers.ContextParallelConfig(
            ring_degree=mesh["ring"].size(), ulysses_degree=mesh["ulysses"].size(), mesh=mesh["ring", "ulysses"]
        )
        net.enable_parallelism(config=config)
    else:
        raise ValueError(
            f"parallel.cp_*: {type(net).__name__} has no interface for context parallel: give it a method split_tokens "
            "that takes a jvpgraph.context_parallel.ContextParallel, or set cp_ulysses and cp_ring to 1"
        )


def parallelize(net: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallel by the network's own plan: module names, with * for any, to torch's styles.

    The plan is the network's `tp_plan`, or `_tp_plan` of diffusers, where "colwise" and "rowwise" stand for styles.
    """
    plan = getattr(net, "tp_plan", None) or getattr(net, "_tp_plan", None)
    if not plan:
        raise ValueError(
            f"parallel.tp: {type(net).__name__} has no plan for tensor parallel: give its class a `tp_plan`, a "
            'dictionary such as {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.2": RowwiseParallel()}, or set tp=1'
        )
    parallelize_module(net, mesh, {name: _style(net, name, style) for name, style in plan.items()})
    for name, parameter in net.named_parameters():
        for placement in parameter.placements if isinstance(parameter, DTensor) else ():
            if isinstance(placement, Shard) and parameter.shape[placement.dim] % mesh.size():
                raise ValueError(
                    f"parallel.tp: {mesh.size()} processes do not divide dim {placement.dim} of {name} "
                    f"{list(parameter.shape)}"
                )


def _style(net: nn.Module, name: str, style: Any) -> ParallelStyle:
    if isinstance(style, ParallelStyle):
        return style
    if style not in STYLES:
        # Packed layers reorder rows, and a checkpoint of them would load as nonsense on other processes.
        raise ValueError(
            f"parallel.tp: the plan of {type(net).__name__} splits {name} by {type(style).__name__}; only "
            '"colwise", "rowwise" and styles of torch.distributed.tensor.parallel keep checkpoints readable'
        )
    return STYLES[style]()
