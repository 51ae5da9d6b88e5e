"""What an objective is: a function that reads like its paper, and a dataclass of its settings.

    @objective
    def scm_loss(student, teacher, batch, rng, config: SCM, *, iteration) -> Terms: ...

The class of `config` is the key: a stage whose settings are an SCM is trained with scm_loss. What else a loss needs it
asks for by the names of its keyword arguments: `iteration` of the stage, from 1; `fake`, the fake score; `averaged`,
which gives a context in which the student has the weights of its average; `critic`, heads on the blocks of a network;
and `shared`, where terms of one update find what another has made of the student.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

from torch import Tensor

from jvpgraph.trainer.settings import Variants
from jvpgraph.trainer.times import Ranges
from jvpgraph.trainer.trigflow import radians

CUT = 0.05  # of rectified-flow time

Terms = dict[str, Tensor]
"""Per sample [B]: `loss`, whose mean is minimised, and whatever else is worth logging."""

Shared = dict[Any, Any]
"""What was made of the student in this update, with its autograd history, by the settings that it was made with."""

Loss = Callable[..., Terms]
AnyLoss = TypeVar("AnyLoss", bound=Loss)


@dataclass(frozen=True)
class Objective(Variants):
    """Base of an objective's settings."""

    sampler: ClassVar[str] = "consistency"  # how what it trains is sampled: consistency, mean_flow or flow
    second_time: ClassVar[bool] = False  # whether the network takes a second time
    needs_data: ClassVar[bool] = True  # whether it reads the latents: prompts alone will not do
    needs_negative: ClassVar[bool] = False  # whether it asks for a negative condition beside the teacher's guidance
    only_simulated: ClassVar[bool] = False  # whether it asks the student at the times of a simulation alone
    trains_plainly: ClassVar[bool] = True  # whether there is a backward through calls of the student without tangents
    takes_tangent: ClassVar[bool] = True  # whether it may look at the student's derivative by time
    through_tangent: ClassVar[bool] = False  # whether its loss has a gradient through the tangent: needs one graph

    @property
    def knows_second_time(self) -> bool:
        """Whether it can train a student that has one."""
        return self.second_time

    @property
    def asks_teacher(self) -> bool:
        """Whether it learns from a teacher, whose guidance has a scale."""
        return True

    @property
    def waits(self) -> dict[str, int]:
        """What comes only after some student updates of the stage, and after how many."""
        return {"its tangent counts in full": getattr(self, "tangent_warmup", 0)}

    def check_sampling(self, steps: Collection[int], shift: float, gamma: float = 0.0) -> None:
        """Raises ValueError where samples in so many steps, of sampling.shift and .gamma, would be wrong."""

    @property
    def fake_score(self) -> Any:
        """Settings (DMD) of the fake score that is trained alongside the student, or None."""
        return None

    @property
    def critic(self) -> Any:
        """Settings (Adversarial) of the critic that is trained alongside the student, or None."""
        return None

    @property
    def needs_critic(self) -> bool:
        """Whether its loss asks a critic that another term has to train."""
        return False

    @property
    def simulated(self) -> Any:
        """Settings (Simulation) of the samples that dmd or a critic looks at, or None."""
        return self.simulation if self.fake_score is None else self.fake_score.simulation

    @property
    def span(self) -> tuple[float, float]:
        """The times of the student that it trains, in radians: from where down to where.

        Times that are cut a little short of noise and data, as DMD's often are to 0.98 and 0.02, reach them.
        """
        low, high = between(getattr(self, "times", None))
        return radians(high if high < 1 - CUT else 1.0), radians(low if low > CUT else 0.0)

    @property
    def asked(self) -> Ranges:
        """Rectified-flow times at which it asks the teacher with its guidance."""
        return (between(getattr(self, "times", None)),)

    @property
    def guided_apart(self) -> bool:
        """Whether it asks for the teacher's guidance by itself."""
        return False

    @property
    def simulation(self) -> Any:
        """Settings (Simulation) of the samples of the student that it makes, or None."""
        return None

    def fake_updates(self, iteration: int) -> int:
        """Updates of fake score and critic that follow student update `iteration`, counted from 1."""
        return 0


def between(times: Any) -> tuple[float, float]:
    """Rectified-flow times that a distribution is cut to."""
    return getattr(times, "between", (0.0, 1.0))


def listed(steps: Collection[int]) -> str:
    """Numbers of steps, for errors."""
    return ", ".join(map(str, sorted(steps)))


LOSSES: dict[type[Objective], Loss] = {}


def objective(loss: AnyLoss) -> AnyLoss:
    """Registers a loss for the class of its `config`."""
    settings = get_type_hints(loss)["config"]
    if settings in LOSSES:
        raise ValueError(f"{settings.__name__} has a loss already: {LOSSES[settings].__name__}")
    LOSSES[settings] = loss
    return loss


def loss_of(settings: Objective) -> Loss:
    """The loss, which may be offered more than it asks for."""
    loss = LOSSES[type(settings)]
    parameters = inspect.signature(loss).parameters.values()
    names = {p.name for p in parameters}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(loss)
    def given(*args: Any, **offered: Any) -> Terms:
        return loss(*args, **{name: value for name, value in offered.items() if takes_all or name in names})

    return given
