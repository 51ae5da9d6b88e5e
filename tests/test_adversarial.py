"""The critic: what it teaches the student, what it knows of densities, and that it is part of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.model.critic import Critic, critic_on, tokens_of
from jvpgraph.trainer.model.dit import dit
from jvpgraph.trainer.objectives import DCM, DMD, SCM, Adversarial, Term, WeightedTerms
from jvpgraph.trainer.objectives.adversarial import adversarial_loss, beside_loss, passing_loss, telling_loss
from jvpgraph.trainer.objectives.dmd import WEIGHTS, Divergence, dmd_loss, fake_score_error
from jvpgraph.trainer.objectives.simulation import Simulation
from jvpgraph.trainer.objectives.terms import terms_loss
from jvpgraph.trainer.plan.plan import plan_run
from jvpgraph.trainer.run.folder import checkpoint_step
from jvpgraph.trainer.times import ShiftedUniform
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import add_noise, expand_like
from tests.gaussian import (
    STD,
    Constant,
    ExactDual,
    GaussianConsistency,
    GaussianFlow,
    gaussian_batch,
    images,
    seeded,
    variance,
)
from tests.test_dmd import GuidedTo, Watched
from tests.test_train import SMALL, awake, content, last_checkpoint, run_until
from tests.tiny_runs import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ShiftedUniform(shift=1.0)


class Ratio(nn.Module):
    """A critic that knows all: the log ratio of the densities of N(0, STD^2) and N(0, std^2), with noise."""

    features = "teacher"

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def judge(self, network: nn.Module, x: Tensor, t: Tensor, cond: Condition, share: float = 1.0) -> Any:
        real, made = variance(t), variance(t, self.std)
        square, size = x.square().flatten(1).sum(1), x[0].numel()
        log_ratio = 0.5 * square * (1 / made - 1 / real) + 0.5 * size * (made / real).log()
        return network(x, t, cond), (self.factor * log_ratio)[:, None]


def teacher_of(size: int) -> GuidedTo:
    return GuidedTo(images(size, seeded(1)), images(size, seeded(2)))


# ---------------------------------------------------------------- the student's side


def test_the_students_gradient_is_that_of_passing_for_real_and_reaches_nothing_else() -> None:
    """d softplus(-l) / dx0 = -sigmoid(-l) cos(t) x_t (1 / V_made - 1 / V_real)."""
    critic, student, teacher = Ratio(0.9), Constant(images(6, seeded(3))), teacher_of(6)
    config = Adversarial(simulation=Simulation(PLAIN, steps=1), times=PLAIN)
    batch = gaussian_batch(6, seeded(4))
    terms = adversarial_loss(student, teacher, batch, seeded(5), config, iteration=1, fake=None, critic=critic)
    terms["loss"].sum().backward()

    rng = seeded(5)
    images(6, rng)
    t = PLAIN.draw(6, rng)
    x = add_noise(student.x0.detach(), images(6, rng), t)
    logit = critic.judge(teacher, x, t, {})[1][:, 0]
    slope = x * expand_like(t.cos() * (1 / variance(t, 0.9) - 1 / variance(t)), x)
    torch.testing.assert_close(student.x0.grad, (-expand_like((-logit).sigmoid(), x) * slope).detach())
    torch.testing.assert_close(terms["loss"], nn.functional.softplus(-logit))
    assert critic.factor.grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_hinge_and_softplus_are_those_of_the_papers() -> None:
    real, made = torch.tensor([[0.5, 2.0]]), torch.tensor([[-2.0, 0.5]])
    assert passing_loss(made, "hinge").item() == pytest.approx((2 - 0.5) / 2)
    assert telling_loss(real, made, "hinge").item() == pytest.approx((0.5 + 0 + 0 + 1.5) / 2)
    at_zero = torch.zeros(1, 1)
    assert telling_loss(at_zero, at_zero, "softplus").item() == pytest.approx(2 * math.log(2))


def test_the_critic_learns_the_ratio_of_the_densities() -> None:
    """telling_loss is least at the exact log ratio, among its multiples."""
    t = torch.full((4000,), 0.7, dtype=torch.float64)
    rng = seeded(6)
    real, made = (add_noise(std * images(4000, rng), images(4000, rng), t) for std in (STD, 0.7))

    def loss(factor: float) -> float:
        critic = Ratio(0.7)
        with torch.no_grad():
            critic.factor.fill_(factor)
        told = (critic.judge(GaussianFlow(), x, t, {})[1] for x in (real, made))
        return telling_loss(*told, "softplus").mean().item()

    assert loss(1.0) < min(loss(0.8), loss(1.25))


# ---------------------------------------------------------------- f-distill

F_OF_RATIO: dict[Divergence, Callable[[Tensor], Tensor]] = {  # each with f''(1) = 1
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: 2 * (r + 1) * (1 + 1 / r).log(),
    "jensen_shannon": lambda r: 2 * (r * r.log() - (r + 1) * ((r + 1) / 2).log()),
    "hellinger": lambda r: -4 * r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log() / 2,
    "forward_kl": lambda r: r * r.log(),
}


@pytest.mark.parametrize("divergence", list(WEIGHTS))
def test_weighted_scores_give_the_gradient_of_the_divergence(divergence: Divergence) -> None:
    """d/ds of D_f(N(0, STD^2), N(0, s^2)), integrated, against the mean of w(r) (score_made - score_real) x / s."""
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    s = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def density(std: Tensor | float) -> Tensor:
        return (-((x / std) ** 2) / 2).exp() / (std * math.sqrt(2 * math.pi))

    inside = x.abs() < 4  # 6.6 deviations; beyond it the ratio is 0 / 0
    ratio = torch.where(inside, density(STD) / density(s), 1.0)
    mean = torch.trapezoid(torch.where(inside, density(s) * F_OF_RATIO[divergence](ratio), 0.0), x)
    (slope,) = torch.autograd.grad(mean, s)
    made = s.detach()
    scores = -x / made**2 + x / STD**2
    weights = WEIGHTS[divergence](ratio.detach())
    expected = torch.trapezoid(torch.where(inside, density(made) * weights * scores * x / made, 0.0), x)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


def test_dmd_is_weighted_by_what_the_critic_says() -> None:
    student, fake, teacher = Constant(images(6, seeded(7))), Constant(images(6, seeded(8))), teacher_of(6)
    batch, gradients = gaussian_batch(6, seeded(9)), []
    plain, weighted = DMD(times=PLAIN), DMD(times=PLAIN, divergence="forward_kl", ratio_limit=3.0)
    for config in (plain, weighted):
        student.x0.grad = None
        more = {"iteration": 0, "fake": fake, "critic": Ratio(0.9)}
        terms = dmd_loss(student, teacher, batch, seeded(10), config, **more)
        terms["loss"].sum().backward()
        gradients.append(student.x0.grad)
    torch.testing.assert_close(gradients[1], expand_like(terms["weight"], gradients[0]) * gradients[0])
    assert terms["weight"].min() >= 1 / 3 - 1e-12
    assert terms["weight"].max() <= 3 + 1e-12
    assert terms["weight"].std() > 0


# ---------------------------------------------------------------- heads on a network


def sample(size: int) -> Batch:
    labels = torch.arange(size) % 10
    return Batch(images(size, seeded(11)).repeat(1, 1, 2, 2), {"labels": labels})


def test_heads_look_without_changing_what_the_network_says() -> None:
    network, batch, t = awake(width=16, depth=3, heads=2), sample(4), torch.full((4,), 0.6, dtype=torch.float64)
    critic = critic_on(network, Adversarial(blocks=(2, 0), width=8), batch)
    F, logits = critic.judge(network, batch.x0, t, batch.cond)
    assert torch.equal(F, network(batch.x0, t, batch.cond))
    assert logits.shape == (4, 2)
    assert not logits.any()  # before the first update
    assert not any(module._forward_hooks for module in network.modules())
    assert len(critic_on(network, Adversarial(width=8), batch).heads) == 3  # of four places among three blocks


def test_a_share_of_the_gradient_reaches_the_network_and_all_of_it_the_heads() -> None:
    network, batch, t = awake(width=16, depth=2, heads=2), sample(4), torch.full((4,), 0.6, dtype=torch.float64)
    critic = critic_on(network, Adversarial(width=8), batch)
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.3, generator=seeded(12))
    found = []
    for share in (1.0, 0.25, 0.0):
        network.zero_grad(), critic.zero_grad()
        critic.judge(network, batch.x0, t, batch.cond, share)[1].sum().backward()
        found.append([[p.grad for p in each.parameters()] for each in (network, critic)])
    (whole, heads), (quarter, same), (nothing, still) = found
    assert all(gradient is None for gradient in nothing)
    for a, b in zip(whole, quarter):
        if a is not None:
            torch.testing.assert_close(b, 0.25 * a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(same, heads)
    torch.testing.assert_close(still, heads)


def test_the_largest_stream_is_looked_at_and_pictures_as_their_places() -> None:
    text, image = torch.zeros(2, 3, 5), torch.ones(2, 9, 5)
    assert torch.equal(tokens_of((text, image), 2), image)
    assert tokens_of(torch.zeros(2, 7, 4, 4), 2).shape == (2, 16, 7)
    with pytest.raises(ValueError, match="gives no tokens"):
        tokens_of((torch.zeros(3, 4), None), 2)


def test_blocks_that_are_not_there_are_named() -> None:
    network, batch = awake(width=16, depth=2, heads=2), sample(2)
    with pytest.raises(ValueError, match="2 is none of the 2 blocks of DiT"):
        critic_on(network, Adversarial(blocks=(0, 2)), batch)


# ---------------------------------------------------------------- beside the student

SCORED = WeightedTerms((Term(DMD(times=PLAIN)), Term(Adversarial(features="fake_score"), weight=0.5)))


def test_one_pass_of_the_fake_score_trains_it_and_the_critic() -> None:
    critic, fake = Ratio(0.9), Watched(GaussianFlow())
    critic.features = "fake_score"
    batch, student, teacher = gaussian_batch(6, seeded(13)), GaussianConsistency(), teacher_of(6)

    def loss(config: WeightedTerms) -> dict[str, Tensor]:
        fake.times.clear()
        return beside_loss(fake, critic, student, teacher, batch, seeded(14), config, count=2)

    terms = loss(SCORED)
    assert len(fake.times) == 2
    alone = fake_score_error(fake, student, batch, seeded(14), SCORED.fake_score, 2)
    assert torch.equal(terms["velocity"], alone)
    torch.testing.assert_close(terms["loss"], terms["velocity"] + terms["telling"])
    other = replace(
        SCORED, terms=(SCORED.terms[0], Term(Adversarial(features="fake_score", times=ShiftedUniform(3.0))))
    )
    assert torch.equal(loss(other)["velocity"], alone)
    assert len(fake.times) == 3


def test_scm_and_the_adversarial_term_share_a_pass_of_the_student() -> None:
    config = WeightedTerms((Term(SCM()), Term(Adversarial(), weight=2.0)))
    student, teacher = Watched(Constant(images(6, seeded(15)))), teacher_of(6)
    more = {"iteration": 1, "fake": None, "critic": Ratio(0.9)}
    dual = ExactDual(student)
    terms = terms_loss(dual, teacher, gaussian_batch(6, seeded(16)), seeded(17), config, **more)
    alone = terms_loss(
        dual, teacher, gaussian_batch(6, seeded(16)), seeded(17), replace(config, terms=config.terms[:1]), **more
    )
    calls = len(student.times)
    assert calls == 2 * (calls // 2)  # no more with the adversarial term than without
    torch.testing.assert_close(terms["loss"], terms["scm"] + 2 * terms["adversarial"])
    assert torch.equal(terms["scm"], alone["scm"])
    one, other = (torch.autograd.grad(each["loss"].sum(), student.model.x0)[0] for each in (terms, alone))
    assert (one - other).abs().max() > 1e-3


# ---------------------------------------------------------------- runs

SUM = {
    "name": "terms",
    "terms": [
        {"objective": {"name": "dmd", "fake_updates_per_step": 2, "divergence": "jensen_shannon"}},
        {"objective": {"name": "adversarial", "features": "fake_score", "width": 8}, "weight": 0.5, "after": 1},
    ],
}
OF_TEACHER = {
    "name": "terms",
    "terms": [
        {"objective": "scm"},
        {"objective": {"name": "adversarial", "loss": "hinge", "width": 8}, "weight": 0.1},
    ],
}


def run_of(out: Path, objective: dict[str, Any], steps: int = 4, **more: Any) -> RunConfig:
    rates = {name: {"lr": 1e-3} for name in ("student", "fake", "critic")}
    stage = {"objective": objective, "steps": steps, "batch": 8, **rates}
    return settings.from_dict(RunConfig, {**SMALL, "out": str(out), "stages": [stage], **more})


def model(dtype: str) -> dict[str, Any]:
    options = {"width": 16, "depth": 2, "heads": 2, "dtype": dtype}
    return {"load": "tests.test_train:awake", "options": options}


@pytest.mark.long
@pytest.mark.parametrize(("objective", "dtype"), [(SUM, "bfloat16"), (OF_TEACHER, "float32")])
def test_a_run_that_goes_on_has_the_critic_that_it_had(tmp_path: Path, objective: dict[str, Any], dtype: str) -> None:
    whole = train(run_of(tmp_path / "whole", objective, model=model(dtype)))
    stopped = train(run_of(tmp_path / "stopped", objective, steps=2, model=model(dtype)))
    assert checkpoint_step(last_checkpoint(stopped)) == 2
    resumed = train(run_of(tmp_path / "stopped", objective, model=model(dtype)))
    one, other = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    heads = {key: value for key, value in one.items() if key.startswith(".critic.")}
    assert len(heads) == 16
    assert {value.dtype for value in heads.values()} == {torch.float32}
    assert all(value.any() for key, value in heads.items() if "of_mean.2.weight" in key)  # which was zero at first


@pytest.mark.long
def test_a_killed_run_with_a_critic_ends_with_the_same_bits(tmp_path: Path) -> None:
    more = {"student": {"backend": "inductor"}, "model": model("float32"), "checkpoint": {"every": 2, "keep": 2}}
    whole = train(run_of(tmp_path / "whole", SUM, steps=6, **more))
    config = run_of(tmp_path / "killed", SUM, steps=6, **more)
    run_until(config, 3, tmp_path, 0.0)
    train(config)
    one, other = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (whole, config.out))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.long
def test_a_phase_starts_from_what_the_expert_before_it_makes(tmp_path: Path) -> None:
    """Also after a stop; and not with another expert than it began with."""
    dmd = {"name": "dmd", "fake_updates_per_step": 1, "simulation_steps": 2}
    more = {"model": model("float32"), "sampling": {"steps": [2]}}
    first = train(run_of(tmp_path / "first", {**dmd, "end": 1.0}, steps=1, **more))
    after = {**dmd, "start": 1.0, "earlier": str(first)}
    whole = train(run_of(tmp_path / "whole", after, steps=2, **more))
    train(run_of(tmp_path / "second", after, steps=1, **more))
    second = train(run_of(tmp_path / "second", after, steps=2, **more))
    one, other = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (whole, second))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    latents = train(run_of(tmp_path / "latents", {**dmd, "start": 1.0}, steps=2, **more))
    assert not torch.equal(
        content(last_checkpoint(latents), tmp_path / "content.pt")[".student.net.patch_in.weight"],
        one[".student.net.patch_in.weight"],
    )
    with pytest.raises(ValueError, match=r"ends its phase at 1 radians, and this one starts at 0\.9"):
        train(run_of(tmp_path / "gap", {**after, "start": 0.9}, steps=1, **more))
    assert not (tmp_path / "gap").exists()
    train(run_of(tmp_path / "first", {**dmd, "end": 1.0}, steps=2, **more))
    with pytest.raises(ValueError, match="other weights than when this run began"):
        train(run_of(tmp_path / "second", after, steps=3, **more))


@pytest.mark.long
@pytest.mark.parametrize("objective", [SUM, OF_TEACHER])
def test_plan_counts_the_critic(objective: dict[str, Any]) -> None:
    options = {"width": 16, "depth": 1, "heads": 2}
    config = run_of(Path("run"), objective, model={"load": "jvpgraph.trainer.dit:dit", "options": options})
    (plan,) = plan_run(config, processes=1, on_gpu=False)
    own = sum(p.nbytes for p in critic_on(dit(**options), Adversarial(width=8), sample(2)).parameters())
    heads = plan.costs.critic / own
    assert heads == pytest.approx(4)  # of a network with blocks enough
    assert plan.resident["critic and its optimiser"] == 3 * plan.costs.critic
    assert plan.costs.fake.flops > 0
    assert ("critic: an update" in plan.moments) == (objective is OF_TEACHER)


@pytest.mark.parametrize(
    ("objective", "more", "says"),
    [
        ({"name": "dmd", "divergence": "forward_kl"}, {}, "with weight 0 for its ratio alone"),
        ({"name": "rcm", "dmd": {"divergence": "forward_kl"}}, {}, "with weight 0 for its ratio alone"),
        ({"name": "adversarial", "features": "fake_score"}, {}, "set features to teacher"),
        (OF_TEACHER, {"student": {"compile": True}}, "Set it to false"),
        ({"name": "dmd", "guidance_times": "shifted_uniform"}, {}, "guidance.scale is 1"),
        ({"name": "adversarial", "blocks": [1, 1]}, {}, "each once"),
        (
            {"name": "terms", "terms": [*SUM["terms"][:1], {"objective": {"name": "adversarial", "loss": "hinge"}}]},
            {},
            "needs a critic with loss softplus",
        ),
    ],
)
def test_a_critic_that_cannot_be_is_refused(objective: dict[str, Any], more: dict[str, Any], says: str) -> None:
    with pytest.raises(settings.SettingsError, match=says):
        settings.from_dict(RunConfig, {**TINY, **more, "stages": [{"steps": 1, "objective": objective}]})


def test_a_second_stage_whose_critic_has_no_such_block_ends_before_the_first_step(tmp_path: Path) -> None:
    config = run_of(tmp_path / "run", OF_TEACHER, model=model("float32"))
    first = replace(config.stages[0], objective=DCM())
    second = replace(config.stages[0], objective=Adversarial(blocks=(7,)))
    with pytest.raises(ValueError, match="7 is none of the 2 blocks of DiT"):
        train(replace(config, stages=(first, second)))
    assert not config.out.exists()
    with pytest.raises(ValueError, match="the teacher is a Sequential, and not one network"):
        critic_on(nn.Sequential(), Adversarial(), sample(1))


def test_prompts_alone_have_nothing_that_a_critic_could_call_real() -> None:
    assert not DMD().needs_data
    assert WeightedTerms((Term(DMD()), Term(Adversarial(features="fake_score")))).needs_data
    assert isinstance(Critic("teacher", [0], [4], 8, torch.float32), nn.Module)
