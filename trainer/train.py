"""Distillation of one network: `train(config)`, from the data to the last checkpoint.

A step is one update of the student with the stage's objective, the averages of its weights, then some updates of
the fake score if the objective has one. What it needs to resume after a stop is `Stage.state()`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.passes.context import Report
from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch, drop_condition
from jvpgraph.trainer.config import OptimizerConfig, RunConfig
from jvpgraph.trainer.data.loader import loader
from jvpgraph.trainer.data.sample import Dataset, first_samples
from jvpgraph.trainer.evaluation.phases import student_sampler
from jvpgraph.trainer.model.critic import Critic, critic_on
from jvpgraph.trainer.model.ema import PowerEMA, averages_of, save_snapshot, update_all
from jvpgraph.trainer.model.networks import averaged, check_run, moving, trainable, try_network
from jvpgraph.trainer.model.optimizer import MasterAdamW, learning_rate
from jvpgraph.trainer.noise import Random, uniform
from jvpgraph.trainer.objectives import Terms, loss_of
from jvpgraph.trainer.objectives.adversarial import beside_loss
from jvpgraph.trainer.run.beforehand import data_of, look, shown, warn_of_settings
from jvpgraph.trainer.run.build import Networks, build_networks
from jvpgraph.trainer.run.changes import covered
from jvpgraph.trainer.run.checkpoint import CheckpointError, Checkpoints, OnePiece
from jvpgraph.trainer.run.decay import Watch
from jvpgraph.trainer.run.diagnosis import Probe
from jvpgraph.trainer.run.earlier import check_earlier, expert_of, students_of, try_stages
from jvpgraph.trainer.run.folder import check_folder, check_free, checkpoint_step, claimed, newest_step
from jvpgraph.trainer.run.kept import Means, RandomState
from jvpgraph.trainer.run.log import RunLog, read_lines
from jvpgraph.trainer.run.not_finite import Compute, not_finite
from jvpgraph.trainer.run.origin import Position, origin_of, resumed, write_origin
from jvpgraph.trainer.run.pace import Pace, memory_gib
from jvpgraph.trainer.run.parallel import Layout, joined
from jvpgraph.trainer.run.preview import Previews, try_decoders
from jvpgraph.trainer.run.prompted import prompted_of
from jvpgraph.trainer.run.stopping import Stop
from jvpgraph.trainer.run.validation import Validation
from jvpgraph.trainer.trigflow import SCALE, TrigFlow

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    fresh: bool = False,
    change: Sequence[str] = (),
    start: Path | None = None,
    time_limit: float | None = None,
) -> Path:
    """Runs all stages and returns the run's folder; resumes from its last checkpoint if it has one.

    A run that was stopped and resumed ends with the same parameters as one that was not stopped: bit for bit on a
    CPU, and on a GPU as far as its kernels are deterministic.

    Args:
        config: the whole run.
        fresh: move an earlier run in the folder aside instead of resuming it.
        change: keys of settings in which a run in the folder may differ from the ones given here, see run/changes.py.
        start: folder of another run, or of an exported network, from whose weights the student of a new run starts.
        time_limit: seconds after which it has stopped by itself.

    Raises:
        Stopped: SIGTERM, SIGINT or the time limit. A checkpoint of the last step was saved; the same call goes on.
        ValueError: the settings do not fit each other, the network or the data, or the folder holds another run.
        NotFinite: a loss or a gradient is not finite. The last checkpoint is from before it.
        CheckpointError: a checkpoint could not be written, or does not fit the model.
        BadShard: a part of the data cannot be read, and the settings say to stop then.
    """
    stop = Stop(time_limit)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(config) as layout:
        return train_here(config, layout, stop, fresh, change, start)


def train_here(
    config: RunConfig, layout: Layout, stop: Stop, fresh: bool, change: Sequence[str], start: Path | None
) -> Path:
    """`train` as one of the processes of a layout. All do the same; the first one writes."""
    ranks = layout.ranks
    ranks.on_first(lambda: check_free(config.out))
    changes = [] if fresh else ranks.on_first(lambda: check_folder(config, change))
    begun = None if fresh else ranks.on_first(lambda: newest_step(config.out))
    torch.manual_seed(config.seed)
    rng = torch.Generator(layout.device).manual_seed(config.seed)
    dataset = data_of(config)
    ends = list(accumulate(stage.steps for stage in config.stages))
    with ExitStack() as stack:
        stack.enter_context(room_for_shapes(dataset))
        extremes = ranks.on_first(lambda: look(config, dataset))
        prompted = ranks.on_first(lambda: prompted_of(config, dataset, layout.device))
        networks = build_networks(config, layout, start if begun is None else None)
        if begun is None:
            origin = ranks.on_first(lambda: origin_of(config, networks.digests, dataset, start))
        else:
            dataset, origin, others = resumed(config, networks.digests, dataset, start, change, ranks)
            changes += others
        validation = Validation.of(config, dataset, ranks, layout.device, networks.digests.teacher)
        check_earlier(config, has_latents=getattr(dataset, "has_latents", True))
        check_run(config, networks.student, networks.guided, dataset, layout.device)
        ranks.on_first(lambda: warn_of_settings(config))
        ahead = 0 if begun is None else 1 + next(i for i, end in enumerate(ends) if begun <= end)
        try_stages(config, ahead, layout, networks, first_samples(dataset, 1).to(layout.device))
        for batch in extremes:
            one = batch.to(layout.device)
            for who, network in (("teacher", networks.guided.model), ("student", networks.student)):
                try_network(f"the {who} cannot run with {shown(batch)}", network, one.x0, one.cond)
        if prompted is not None:
            one = next(prompted.batch.split(1)).to(layout.device)
            try_network("the student cannot run with a prompt of log.prompts", networks.student, one.x0, one.cond)
        layout.check_gradients(networks.student, first_samples(dataset, 1).to(layout.device))
        ranks.on_first(lambda: try_decoders(config, dataset, prompted, layout.device))
        beside = None if validation is None else validation.of_teacher(networks.guided)
        watch = Watch.of(config, dataset, networks.guided, ranks, layout.device)

        folder = ranks.on_first(lambda: stack.enter_context(claimed(config, fresh=fresh)))
        checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            timeout=layout.ranks.timeout,
        )
        stack.push(partial(finish, checkpoints))
        last = checkpoints.latest()
        done = 0
        if last is not None:
            done = checkpoint_step(last)
            checkpoints.trim(last)

        def settle() -> None:
            settings.save(config, folder / "config.yaml")
            write_origin(folder, origin, done, changes)

        if last is None:  # else not before the checkpoint was found to fit
            ranks.on_first(settle)
        said = 0
        log: RunLog | None = None

        def open_log() -> None:
            nonlocal log
            log = stack.enter_context(
                RunLog(folder, tensorboard=config.log.tensorboard, wandb=config.log.wandb, total=ends[-1], start=done)
            )

        ranks.on_first(open_log)
        show, seconds = (None, 0.0) if log is None else (log.show, log.seconds)
        if watch is not None and log is not None:
            watch.remember(read_lines(log.path))
        if prompted is not None:
            ranks.on_first(lambda: prompted.save(folder))
        if beside is not None:
            ranks.on_first(lambda: beside.save(folder))
        probe = Probe(config, dataset, networks.guided, layout) if config.precision.probe_every else None
        previews = Previews(config, networks.student, dataset, prompted, log)
        pace = stack.enter_context(Pace.of(config, layout, networks.student, show, seconds))
        stack.enter_context(stop)
        for index, end in enumerate(ends):
            if done > end:
                continue
            stage = Stage(index, config, layout, networks, dataset, rng, pace, change)
            if last is not None:
                checkpoints.load(stage.state(), last)
                last = None
                ranks.on_first(settle)
            elif index == 0:
                checkpoints.save(0, stage.state())  # so that there is one from before anything goes wrong
            for step in range(done + 1, end + 1):
                with pace.step(index):
                    stage.means.add(stage.step(step))
                said = say_kernels(networks.reports, said) if layout.first else said
                last_step = step == end
                validated = due(step, config.validation.every)
                probed = probe is not None and due(step, config.precision.probe_every)
                watched = due(step, config.watch.every)
                if last_step or validated or probed or watched or due(step, config.log.every):
                    means, memory = {**stage.means.take(), **stage.rates}, max(ranks.gather(memory_gib))
                    moved = networks.traffic.take()
                    if validation is not None and beside is not None and validated:
                        average = stage.emas[0].parameters
                        means |= validation.of_student(networks.student, stage.sampler, average, beside.figures)
                    if probe is not None and probed:
                        means |= probe.look(step, index, networks.student)
                    if watch is not None and watched:
                        means |= watch.look(step, index, networks.student, stage.sampler, stage.emas[0].parameters)
                    if log is not None:
                        log.add(step, means, pace.line(step, memory, moved))
                if config.ema.snapshot_every and (last_step or due(step, config.ema.snapshot_every)):
                    for ema in stage.emas:
                        save_snapshot(averages_of(folder, index), step, ema)
                stopping = step < ends[-1] and stop.agreed(ranks, reserve=checkpoints.seconds)
                if last_step or stopping or due(step, config.checkpoint.every):
                    checkpoints.save(step, stage.state())
                if stopping:
                    checkpoints.wait()
                    raise stop.stopped(step)
                if due(step, config.log.preview_every):
                    previews.draw(stage.sampler, stage.emas[0].parameters, step)
            done = max(done, end)
            del stage  # before the next one takes its memory
        if log is not None:
            log.curves(folder / "curves.png")
    return folder


def room_for_shapes(dataset: Dataset) -> AbstractContextManager[Any]:
    """Each shape of the data is a graph of its own, so that a run has the same bits whichever comes first; and Dynamo
    gives a function up that it has compiled recompile_limit times."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=config.recompile_limit * len(getattr(dataset, "buckets", [dataset])))


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def say_kernels(reports: Sequence[Report], said: int) -> int:
    """What computes attention with its tangent, and why nothing faster does, in graphs of which ``said`` were reported
    before; how many there are now."""
    kernels = sum((report.kernels for report in reports[said:]), Counter[str]())
    for kernel, count in kernels.most_common():
        logger.info("attention with its tangent: %d by %s", count, kernel)
    return len(reports)


def finish(checkpoints: Checkpoints, kind: type[BaseException] | None, *_: Any) -> None:
    """Waits for the last save, also after a failed step: what is being written is from before it."""
    try:
        checkpoints.wait()
    except CheckpointError as error:
        if kind is None:
            raise
        logger.error("%s", error)  # what ended the run matters more


class Stage:
    """The moving parts of a stage: loader, optimisers, averages, the fake score and the critic."""

    def __init__(
        self,
        index: int,
        config: RunConfig,
        layout: Layout,
        networks: Networks,
        dataset: Any,
        rng: torch.Generator,
        pace: Pace,
        change: Sequence[str] = (),
    ) -> None:
        settings = config.stages[index]
        self.index, self.settings, self.layout, self.networks = index, settings, layout, networks
        self.rng, self.noise, self.pace = rng, layout.noise(rng), pace
        self.objective, self.loss = settings.objective, loss_of(settings.objective)
        self.dual = networks.dual_for(settings.objective)
        self.guided = networks.guided_in[index]
        self.scales = config.scales_in(index)  # that samples are told
        self.begin = sum(stage.steps for stage in config.stages[:index])
        self.precision, self.folder = config.precision.of_tangents, config.out
        self.loader = loader(
            dataset,
            settings.batch // layout.parts,
            config.seed + index,
            workers=config.data.workers,
            rank=layout.part,
            ranks=layout.parts,
        )
        self.kept = {
            "random": OnePiece(RandomState(rng, config.seed if covered("device", change) else None)),
            "data": OnePiece(Position(self.loader, change)),
        }
        self.batches: Iterator[Batch] | None = None
        self.means = Means()
        self.rates: dict[str, float] = {}  # learning rates of the last step

        self.optimizer = adamw(networks.student, settings.student)
        away = "cpu" if config.ema.device == "cpu" else None
        self.emas = [PowerEMA(self.optimizer.masters, sigma_rel, away) for sigma_rel in config.ema.sigma_rel]
        self.fake: TrigFlow | None = None
        if self.objective.fake_score is not None:
            self.fake = networks.new_student()
            self.fake_optimizer = adamw(self.fake, settings.fake)
        sample = first_samples(dataset, 1).to(layout.device)
        self.earlier = expert_of(self.objective, layout, sample, config.scale_of_samples(index))
        students = students_of(config, index, networks.student, self.earlier, layout, sample)
        self.sampler = partial(student_sampler, config, index, students)
        self.critic: Critic | None = None
        if self.objective.critic is not None:
            host = networks.teacher if self.objective.critic.features == "teacher" else self.fake
            assert host is not None, "the settings were checked"
            self.critic = critic_on(host, self.objective.critic, sample)
            self.critic_optimizer = adamw(self.critic, settings.critic)
        self.fake_begins = settings.fake_begins

    def state(self) -> dict[str, Any]:
        """Everything that a step reads and changes."""
        state: dict[str, Any] = {
            "student": moving(self.networks.student),
            "optimizer": self.optimizer,
            "ema": {f"{ema.sigma_rel:g}": ema for ema in self.emas},
            **self.kept,
            "means": OnePiece(self.means),
        }
        if self.fake is not None:
            state |= {"fake": moving(self.fake), "fake_optimizer": self.fake_optimizer}
        if self.critic is not None:
            state |= {"critic": moving(self.critic), "critic_optimizer": self.critic_optimizer}
        if self.earlier is not None:
            state["earlier"] = OnePiece(self.earlier)
        return state

    def step(self, step: int) -> dict[str, Tensor]:
        """Step number `step` of the run, counted from 1. Returns means over the batch, still on the device."""
        iteration = step - self.begin
        networks, noise, self.rates = self.networks, self.noise, {}

        def student_loss(student: nn.Module, batch: Batch) -> Terms:
            more = {
                "iteration": iteration,
                "fake": self.fake,
                "critic": self.critic,
                "averaged": self.averaged,
                "earlier": self.earlier,
            }
            return self.loss(student, self.guided, batch, noise, self.objective, **more)

        def others_loss(model: nn.Module, batch: Batch, *, count: int) -> Terms:
            fake = None if self.fake is None else model
            asked = networks.dual, self.guided
            return beside_loss(
                fake, self.critic, *asked, batch, noise, self.objective, count=count, earlier=self.earlier
            )

        student = Trained("student", self.dual, self.optimizer, self.settings.student)
        values = self.update(step, [student], student_loss)
        networks.traffic.bytes += update_all(self.emas, self.optimizer.masters)
        if iteration == 1 and self.layout.first:
            warn_of_regions(self.dual, self.layout)

        others = self.beside()
        updates = self.objective.fake_updates(iteration) if others else 0
        rounds = [
            self.update(step, others, partial(others_loss, count=iteration * updates + k), since=self.fake_begins)
            for k in range(updates)
        ]
        for name in rounds[0] if rounds else ():
            values[f"{others[0].name}_{name}"] = torch.stack([each[name] for each in rounds]).mean()
        return values

    def beside(self) -> list[Trained]:
        """What is trained beside the student, by one loss."""
        found = []
        if self.fake is not None:
            found.append(Trained("fake", self.fake, self.fake_optimizer, self.settings.fake))
        if self.critic is not None:
            found.append(Trained("critic", self.critic, self.critic_optimizer, self.settings.critic))
        return found

    def update(self, step: int, trained: Sequence[Trained], loss: Compute, since: int = 0) -> dict[str, Tensor]:
        """One update on `accumulate` batches; raises NotFinite and changes nothing if it would spoil it.

        Args:
            trained: what the loss trains, by whose first the update is called.
            loss: of that one and a batch.
            since: the iteration of the stage after which the learning rate's schedule begins.
        """
        name, model = trained[0].name, trained[0].model
        batches = [self.draw() for _ in range(self.settings.accumulate)]
        before = self.rng.get_state()
        parts = []
        for batch in batches:
            self.pace.saw(name, batch)
            try:
                terms = loss(model, batch)
            except IndexError as error:
                if "index out of range in self" not in str(error):  # of an embedding
                    raise
                raise ValueError(
                    f"{name}, step {step}: a label that the network does not know: {shown(batch)}\n"
                    "Give the network more classes, or take the sample out."
                ) from error
            (terms["loss"].mean() / len(batches)).backward()
            parts.append({key: value.detach() for key, value in terms.items()})
        for each in trained:
            self.layout.reduce_whole(each.model)
        terms = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        norms = {each.norm_key(name): each.optimizer.gradient_norm() for each in trained}
        means = self.layout.mean({**{key: value.mean() for key, value in terms.items()}, **norms})

        # The one value that a step waits for, and on which all processes agree. A NaN that reached the weights could
        # not be taken back.
        if not torch.isfinite(means["loss"] + sum(means[key] for key in norms)):
            self.rng.set_state(before)
            what = f"{name}, step {step}"
            key = f"stages.{self.index}.{name}.lr={trained[0].settings.lr:g}"
            ranks, folder = self.layout.ranks, self.folder
            raise not_finite(what, terms, batches, self.trained(), name, loss, ranks, key, self.precision, folder)
        iteration, steps = step - self.begin - since, self.settings.steps - since
        for each in trained:
            each.optimizer.clip(means[each.norm_key(name)])
            settings = each.settings
            lr = learning_rate(iteration, settings.lr, settings.warmup, steps, settings.decay)
            self.rates["lr" if each.name == "student" else f"{each.name}_lr"] = lr
            each.optimizer.step(lr)
            each.optimizer.zero_grad()  # frees the gradients until the next update
        return means

    def averaged(self) -> AbstractContextManager[None]:
        return averaged(self.networks.student, self.emas[0].parameters)

    def draw(self) -> Batch:
        """The next batch, on the device, some of its conditions dropped, and with a guidance scale, if the settings say
        so."""
        if self.batches is None:
            self.batches = iter(self.loader)  # not before the loader's state was restored
        batch = next(self.batches).to(self.rng.device)
        share = self.settings.condition_dropout
        if share:
            cond = drop_condition(batch.cond, self.networks.guided.negative, share, self.noise)
            batch = replace(batch, cond=cond)
        if self.scales is not None:
            batch = replace(batch, cond={**batch.cond, SCALE: drawn_scales(len(batch), *self.scales, self.noise)})
        return batch

    def trained(self) -> dict[str, nn.Module]:
        networks = {
            "student": self.networks.student,
            "fake": self.fake,
            "critic": self.critic,
            "teacher": self.networks.teacher,
        }
        return {name: network for name, network in networks.items() if network is not None}


class Trained(NamedTuple):
    """What an update trains."""

    name: str
    model: nn.Module
    optimizer: MasterAdamW
    settings: OptimizerConfig

    def norm_key(self, first: str) -> str:
        """Of its gradient's norm in the log of an update of `first`."""
        return "gradient_norm" if self.name == first else f"{self.name}_gradient_norm"


def drawn_scales(size: int, low: float, high: float, rng: Random) -> Tensor:
    """Guidance scales [B], float32, drawn between the two, which may be one."""
    share = uniform(size, rng, torch.float32) if high > low else torch.zeros(size, device=rng.device)
    return low + (high - low) * share


def warn_of_regions(dual: jvpgraph.DualModule, layout: Layout) -> None:
    """Where a network could not be one graph, which is not as fast, though nobody asked for parts of it."""
    regions = dual.regions
    if not layout.sharded and regions is not None and regions.groups:
        logger.warning("the student is captured in regions: %s", regions)


def adamw(model: nn.Module, settings: OptimizerConfig) -> MasterAdamW:
    return MasterAdamW(
        trainable(model),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        kind=settings.kind,
    )
