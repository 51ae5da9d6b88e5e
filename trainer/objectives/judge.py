"""What losses ask of a critic: heads on the blocks of a network, which trainer/model/critic.py makes."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition

Features = Literal["fake_score", "teacher"]


class Judge(Protocol):
    """A critic as losses see it."""

    @property
    def features(self) -> Features:
        """Whose blocks the heads are on."""
        ...

    def judge(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Condition, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """F of the network, and logits [B, heads]: above 0 for what looks real; `share` of the network's gradient."""
        ...


def host_of(critic: Judge, fake: nn.Module | None, teacher: nn.Module) -> nn.Module:
    """The network with the heads: not the guided teacher."""
    if critic.features == "teacher":
        return without_guidance(teacher)
    assert fake is not None, "heads on a fake score need one"
    return fake


def without_guidance(teacher: nn.Module) -> nn.Module:
    """The network below a trigflow.Guided."""
    model = teacher.model
    assert isinstance(model, nn.Module)
    return model
