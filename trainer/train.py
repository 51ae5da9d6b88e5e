"""The two training loops: a rectified-flow teacher, and its distillation with rCM."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

import jvpgraph
from jvpgraph.trainer.config import DemoConfig
from jvpgraph.trainer.data import Digits
from jvpgraph.trainer.dit import DiT
from jvpgraph.trainer.objectives.dmd import fake_score_loss
from jvpgraph.trainer.objectives.rcm import rcm_loss
from jvpgraph.trainer.trigflow import RECTIFIED_FLOW, Guided, TrigFlow, expand_like


class PowerEMA:
    """Average of parameters with the power-function profile of Karras et al. 2024 (EDM2, section 3.1).

    Update k sets avg <- beta avg + (1 - beta) theta with beta = (1 - 1/k)^(gamma + 1). `sigma_rel` is the
    width of the profile as a share of the run: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.gamma = power_ema_gamma(sigma_rel)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        beta = (1 - 1 / self.updates) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - beta)


def power_ema_gamma(sigma_rel: float) -> float:
    """The exponent of a profile of relative width `sigma_rel`: the largest root of a cubic."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class LossLog:
    """Losses of a run. They stay tensors until `check`, so that an ordinary step never waits for a value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pending: list[tuple[int, Tensor]] = []
        self.values: list[float] = []

    def add(self, step: int, loss: Tensor) -> None:
        self.pending.append((step, loss.detach()))

    def check(self) -> str:
        """Moves the pending losses to `values` and formats their mean.

        Raises:
            FloatingPointError: a loss is not finite; the message names the first such step.
        """
        for step, loss in self.pending:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"{self.name} is {value} at step {step}")
            self.values.append(value)
        recent = self.values[-max(1, len(self.pending)) :]
        self.pending.clear()
        return f"{np.mean(recent):.3f}" if recent else "-"


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float | None = None) -> None:
    """One update of `model`; with `clip_norm` its gradients are first scaled to at most that L2 norm."""
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


def train_teacher(data: Digits, config: DemoConfig, rng: torch.Generator) -> TrigFlow:
    """Rectified flow with label dropout; returns the averaged network in TrigFlow coordinates, frozen."""
    cfg = config.teacher
    net = DiT(config.model)
    ema = PowerEMA(net, cfg.ema_sigma_rel)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / cfg.lr_warmup, 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)),
    )
    log = LossLog("teacher loss")

    bar = trange(1, cfg.steps + 1, desc="teacher", unit="step")
    for step in bar:
        batch = data.draw(cfg.batch, rng)
        dropped = torch.rand(cfg.batch, generator=rng) < cfg.label_dropout
        labels = batch.labels.masked_fill(dropped, config.model.classes)
        eps = torch.randn(batch.x0.shape, generator=rng)
        s = torch.sigmoid(cfg.time_mean + cfg.time_std * torch.randn(cfg.batch, generator=rng))
        x_s = torch.lerp(batch.x0, eps, expand_like(s, eps))
        loss = (net(x_s, s, labels) - (eps - batch.x0)).square().mean()

        descend(net, optimizer, loss)
        schedule.step()
        ema.update(net)
        log.add(step, loss)
        if step % config.log_every == 0 or step == cfg.steps:
            bar.set_postfix(loss=log.check(), refresh=False)
    return TrigFlow(ema.model, RECTIFIED_FLOW)


def distill(teacher: TrigFlow, data: Digits, config: DemoConfig, rng: torch.Generator) -> TrigFlow:
    """rCM: returns the averaged student, frozen.

    Student and fake score start as copies of the teacher. Once the tangent has warmed up, `fake_updates`
    updates of the fake score follow each update of the student.
    """
    cfg = config.distill
    guided = Guided(teacher, config.teacher.guidance, no_label=config.model.classes)
    student = copy.deepcopy(teacher).requires_grad_(True)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    ema = PowerEMA(student, cfg.ema_sigma_rel)
    dual = jvpgraph.transform(student)

    def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay)

    student_optimizer, fake_optimizer = adamw(student, cfg.lr), adamw(fake, cfg.lr_fake)
    student_log, fake_log = LossLog("student loss"), LossLog("fake-score loss")

    bar = trange(1, cfg.steps + 1, desc="student", unit="step")
    for step in bar:
        batch = data.draw(cfg.batch, rng)
        loss = rcm_loss(dual, guided, batch, rng, fake=fake, config=cfg, iteration=step)
        descend(student, student_optimizer, loss, cfg.clip_norm)
        ema.update(student)
        student_log.add(step, loss)

        for k in range(cfg.fake_updates if step > cfg.tangent_warmup else 0):
            batch = data.draw(cfg.batch, rng)
            steps = 1 + (step * cfg.fake_updates + k) % cfg.simulation_steps
            loss = fake_score_loss(fake, dual, batch, rng, config=cfg, steps=steps)
            descend(fake, fake_optimizer, loss, cfg.clip_norm)
            fake_log.add(step, loss)

        if step % config.log_every == 0 or step == cfg.steps:
            bar.set_postfix(student=student_log.check(), fake=fake_log.check(), refresh=False)
    return ema.model
