"""Terms: a weighted sum of objectives, which share a fake score, a critic and what they make of the student."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random
from jvpgraph.trainer.objectives.adversarial import Adversarial
from jvpgraph.trainer.objectives.data import Data
from jvpgraph.trainer.objectives.flow import FlowMatching
from jvpgraph.trainer.objectives.objective import Objective, Shared, Terms, loss_of, objective
from jvpgraph.trainer.ranges import not_negative
from jvpgraph.trainer.times import Ranges


@dataclass(frozen=True)
class Term:
    """One objective of several."""

    objective: Objective  # any but terms
    weight: float = 1.0  # of its loss in the sum; 0: what it trains beside the student alone
    after: int = 0  # student updates of the stage before it begins

    def __post_init__(self) -> None:
        not_negative(self, "weight", "after")

    def acts(self, iteration: int) -> bool:
        return iteration > self.after


@dataclass(frozen=True)
class WeightedTerms(Objective):
    """A weighted sum of other objectives."""

    name: ClassVar[str] = "terms"
    terms: tuple[Term, ...]  # [{objective: scm}, {objective: dmd, weight: 0.01, after: 50}]

    def __post_init__(self) -> None:
        objectives = self.objectives
        if not any(term.weight for term in self.terms):
            raise ValueError("terms: none has a weight above 0, so that nothing trains the student")
        if not any(term.weight and term.acts(1) for term in self.terms):
            raise ValueError("terms: nothing trains the student in the first updates: set `after` of a term to 0")
        if nested := [part.name for part in objectives if isinstance(part, WeightedTerms)]:
            raise ValueError(f"terms: {nested[0]} inside of terms: list its terms beside the others")
        # flow matching asks for the velocity, which a network with a second time has too
        others = [part for part in objectives if not isinstance(part, FlowMatching)]
        kinds = {part.second_time: part.name for part in others}
        if len(kinds) > 1:
            raise ValueError(
                f"terms: {kinds[True]} needs a student with a second time, and {kinds[False]} asks it without one. "
                f"Take {kinds[False]} out, or have it simulate by rollout: jumps"
            )
        if others and len(others) < len(objectives) and not others[0].second_time:
            raise ValueError(
                f"terms: flow_matching asks the student for its velocity where {others[0].name} asks it for a clean "
                "image, and without a second time it gives one of them: take data in its place, or flow_matching out"
            )
        ways = {part.sampler: part.name for part in self.leading}
        if len(ways) > 1:
            one, other = list(ways.items())[:2]
            raise ValueError(
                f"terms: the student of {one[1]} is sampled by {one[0]} and that of {other[1]} by {other[0]}: take one "
                "of them out"
            )
        started = [part.simulated for part in objectives if part.simulated is not None and part.simulated.earlier]
        if len({(each.earlier, each.start) for each in started}) > 1:
            places = " and of ".join(f"{each.earlier} at {each.start:.6g}" for each in started)
            raise ValueError(f"terms: samples start from those of {places}: name one run as `earlier`, and one `start`")
        for what in ("fake_score", "critic"):
            found = [(part.name, settings) for part in objectives if (settings := getattr(part, what)) is not None]
            for name, settings in found[1:]:
                if settings.trained_like != found[0][1].trained_like:
                    raise ValueError(
                        f"terms: {found[0][0]} and {name} train a {what.replace('_', ' ')} each, and a stage has one: "
                        "give both the same settings of it, or take one out"
                    )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Those of the terms; an adversarial one with what its settings leave to the others."""
        given = [term.objective for term in self.terms]
        others = [part for part in given if not isinstance(part, Adversarial)]
        others.sort(key=lambda part: not part.needs_critic)  # whose samples the critic has to know
        simulation = next((part.simulation for part in others if part.simulation is not None), None)
        score = next((part.fake_score for part in others if part.fake_score is not None), None)

        def completed(part: Adversarial) -> Adversarial:
            times = score.times if score is not None and part.features == "fake_score" else None
            return replace(part, simulation=part.simulation or simulation, times=part.times or times)

        return tuple(completed(part) if isinstance(part, Adversarial) else part for part in given)

    @property
    def leading(self) -> list[Objective]:
        """Those that say what the student is: not what trains others, or only holds it near the data."""
        weighed = [part for term, part in zip(self.terms, self.objectives) if term.weight]
        leading = [part for part in weighed if not isinstance(part, Data | FlowMatching)]
        return leading or weighed

    @property
    def sampler(self) -> str:  # type: ignore[override]
        return self.leading[0].sampler

    @property
    def only_simulated(self) -> bool:  # type: ignore[override]
        return all(part.only_simulated for part in self.leading)

    @property
    def span(self) -> tuple[float, float]:
        starts, ends = zip(*(part.span for part in self.leading))
        return max(starts), min(ends)

    @property
    def asked(self) -> Ranges:
        return tuple(times for part in self.objectives if part.asks_teacher for times in part.asked)

    @property
    def second_time(self) -> bool:  # type: ignore[override]
        return any(part.second_time for part in self.objectives)

    @property
    def knows_second_time(self) -> bool:  # type: ignore[override]
        return all(part.knows_second_time for part in self.objectives)

    @property
    def asks_teacher(self) -> bool:
        return any(part.asks_teacher for part in self.objectives)

    @property
    def trains_plainly(self) -> bool:  # type: ignore[override]
        return any(term.weight and term.objective.trains_plainly for term in self.terms)

    @property
    def takes_tangent(self) -> bool:  # type: ignore[override]
        return any(part.takes_tangent for part in self.objectives)

    @property
    def waits(self) -> dict[str, int]:
        begins = {f"{name} begins": term.after for name, term in self.named()}
        return begins | {
            f"{name}: {what}": n for name, term in self.named() for what, n in term.objective.waits.items()
        }

    @property
    def needs_negative(self) -> bool:  # type: ignore[override]
        return any(part.needs_negative for part in self.objectives)

    @property
    def through_tangent(self) -> bool:  # type: ignore[override]
        return any(part.through_tangent for part in self.objectives)

    def check_sampling(self, steps: Collection[int], shift: float, gamma: float = 0.0) -> None:
        for part in self.objectives:
            part.check_sampling(steps, shift, gamma)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return any(part.needs_data for part in self.objectives)

    @property
    def fake_score(self) -> Any:
        return next((part.fake_score for part in self.objectives if part.fake_score is not None), None)

    @property
    def critic(self) -> Any:
        return next((part.critic for part in self.objectives if part.critic is not None), None)

    @property
    def guided_apart(self) -> bool:
        return any(part.guided_apart for part in self.objectives)

    @property
    def needs_critic(self) -> bool:
        return any(part.needs_critic for part in self.objectives)

    @property
    def simulation(self) -> Any:
        return next((part.simulation for part in self.objectives if part.simulation is not None), None)

    @property
    def simulated(self) -> Any:
        found = [part.simulated for part in self.objectives if part.simulated is not None]
        return next((each for each in found if each.earlier is not None), found[0] if found else None)

    def fake_updates(self, iteration: int) -> int:
        acting = (term.objective for term in self.terms if term.acts(iteration))
        return max((part.fake_updates(iteration) for part in acting), default=0)

    def named(self) -> Iterator[tuple[str, Term]]:
        """The terms by their names in the log: that of the objective, with its number if that is another's too."""
        names = [part.name for part in self.objectives]
        for index, (name, term, part) in enumerate(zip(names, self.terms, self.objectives)):
            number = "" if names.count(name) == 1 else f"_{names[: index + 1].count(name)}"
            yield f"{name}{number}", replace(term, objective=part)


@objective
def terms_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: WeightedTerms,
    *,
    iteration: int,
    **offered: Any,
) -> Terms:
    """The weighted sum of the losses of the terms that act; each under its name, and whatever else they log.

    Args:
        student, teacher, batch, rng: as of each.
        iteration: of the student, from 1.
        offered: what else the trainer has, for those that ask for it.
    """
    shared: Shared = {}
    total: Tensor | None = None
    logged: Terms = {}
    for name, term in config.named():
        if not term.weight or not term.acts(iteration):
            continue
        loss = loss_of(term.objective)
        terms = loss(student, teacher, batch, rng, term.objective, iteration=iteration, shared=shared, **offered)
        own = terms.pop("loss")
        total = term.weight * own if total is None else total + term.weight * own
        suffix = name.removeprefix(term.objective.name)
        logged |= {name: own, **{f"{key}{suffix}": value for key, value in terms.items()}}
    assert total is not None, "no term acts"
    return {**logged, "loss": total}
