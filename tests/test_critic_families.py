"""A critic on every network of diffusers that the trainer knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.model.critic import critic_on
from jvpgraph.trainer.objectives import Adversarial
from tests.gaussian import seeded
from tests.test_adapters import TABLE, build, latents, times
from tests.zoo.base import QUIET

pytestmark = [pytest.mark.matrix, *(pytest.mark.filterwarnings(quiet) for quiet in QUIET)]


@pytest.mark.parametrize("name", sorted(TABLE))
def test_latents_blocks_and_heads_get_gradients(name: str) -> None:
    network, cond = build(name), TABLE[name].cond
    x, t = latents(name).requires_grad_(), times()
    critic = critic_on(network, Adversarial(width=8), Batch(x.detach(), cond))
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.5, generator=seeded(1))
    F, logits = critic.judge(network, x, t, cond, share=0.5)
    assert torch.equal(F, network(x, t, cond))
    assert logits.shape == (2, len(critic.heads))
    assert not torch.equal(logits[0], logits[1])
    logits.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(gradient.any() for gradient in x.grad)
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters())
