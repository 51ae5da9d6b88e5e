"""A critic: small heads on the blocks of a network, which tell real latents from the student's samples.

DMD2 (Yin et al. 2024) has one on its fake score, whose features go on learning; SANA-Sprint (arXiv 2503.09641) and LADD
(Sauer et al. 2024) have heads on a frozen teacher. All see noisy latents, as the network does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.model.experts import Experts
from jvpgraph.trainer.model.student import repeated_blocks
from jvpgraph.trainer.objectives import Adversarial
from jvpgraph.trainer.objectives.judge import Features

BLOCKS = 4  # heads where the settings name no blocks


class Head(nn.Module):
    """Tokens [B, N, C] -> logits [B]: two layers for each token, two for their mean. Its answer is 0 at first."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)  # blocks differ in size by orders of magnitude
        self.of_tokens = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.of_mean = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        last = self.of_mean[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(next(self.parameters()).dtype)
        return self.of_mean(self.of_tokens(self.norm(tokens)).mean(1)).squeeze(-1)


class Critic(nn.Module):
    """Heads on some of a network's blocks, in float32 or wider; the network is not part of it.

    Args:
        features: whose blocks those are.
        blocks: places among the network's repeated blocks.
        channels: of the tokens that each of them gives.
        width: of the layers of the heads.
    """

    def __init__(
        self, features: Features, blocks: Sequence[int], channels: Sequence[int], width: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.features = features
        self.blocks = tuple(blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same in all processes, and a run draws nothing for it
            self.heads = nn.ModuleList(Head(size, width, dtype) for size in channels)

    def judge(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Condition, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """F [B, ...] of the network, and logits [B, heads]: above 0 for what looks real.

        Args:
            share: of the logits' gradients that reaches the network; those of the heads are whole.
        """
        with watched(network, self.blocks) as found:
            F = network(x, t, cond)
        features = [tokens_of(out, len(x)) for out in found]
        if share != 1:
            features = [h.detach() + share * (h - h.detach()) if share else h.detach() for h in features]
        logits = torch.stack([head(tokens) for head, tokens in zip(self.heads, features)], dim=1)
        if share:
            # FSDP2 gathers what is outside of blocks when the gradient of the network's own answer comes.
            logits = logits + 0 * F.flatten(1).sum(1, keepdim=True).to(logits.dtype)
        return F, logits


def critic_on(network: nn.Module, settings: Adversarial, sample: Batch, blocks: Sequence[int] = ()) -> Critic:
    """A critic for the blocks of a TrigFlow network; the answers for a sample say how many channels they have.

    Args:
        blocks: other ones than those of the settings.

    Raises:
        ValueError: the network has no repeated blocks, not these, or none that give tokens.
    """
    net: Any = getattr(network, "net", None)
    if net is None:
        raise ValueError(
            f"adversarial.features: the {settings.features} is a {type(network).__name__}, and not one network with "
            "blocks to look into"
        )
    if isinstance(net, Experts):
        raise ValueError(
            f"adversarial.features: the {settings.features.replace('_', ' ')} is two networks, of which one sees a "
            "sample: heads would see some only. Take the other one"
        )
    name, count = type(net).__name__, len(list(repeated_blocks(net)))
    if not count:
        raise ValueError(f"adversarial: {name} has no nn.ModuleList of blocks of one class to look into")
    if wrong := [index for index in settings.blocks if not blocks and not 0 <= index < count]:
        raise ValueError(f"adversarial.blocks: {wrong[0]} is none of the {count} blocks of {name}, counted from 0")
    blocks = blocks or settings.blocks or sorted({count * (k + 1) // BLOCKS - 1 for k in range(BLOCKS)} - {-1})
    t = torch.full((len(sample),), 0.5, dtype=torch.float64, device=sample.x0.device)
    with torch.no_grad(), watched(network, blocks) as found:
        network(sample.x0, t, sample.cond)
    if len(found) < len(blocks):
        raise ValueError(f"adversarial.blocks: {name} uses {len(found)} of its blocks {list(blocks)}: name others")
    channels = [tokens_of(out, len(sample)).shape[-1] for out in found]
    dtype = torch.promote_types(next(net.parameters()).dtype, torch.float32)
    return Critic(settings.features, blocks, channels, settings.width, dtype).to(sample.x0.device)


@contextmanager
def watched(network: nn.Module, blocks: Sequence[int]) -> Iterator[list[Any]]:
    """What some of the blocks of a network give in its next call, in the order of `blocks`."""
    net: Any = network.net
    modules, found = list(repeated_blocks(net)), dict[int, Any]()

    def seen(index: int, out: Any) -> None:
        found[index] = out

    hooks = [
        modules[index].register_forward_hook(lambda module, args, out, index=index: seen(index, out))
        for index in blocks
    ]
    answers: list[Any] = []
    try:
        yield answers
        answers += [found[index] for index in blocks if index in found]
    finally:
        for hook in hooks:
            hook.remove()


def tokens_of(out: Any, size: int) -> Tensor:
    """The answer of a block as [B, N, C]: of several streams the largest, and pictures [B, C, ...] as their places.

    Raises:
        ValueError: there is nothing like that.
    """
    streams = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
    streams = [x for x in streams if x.is_floating_point() and x.dim() >= 3 and len(x) == size]
    if not streams:
        raise ValueError("adversarial: a block gives no tokens [B, N, C]; name other ones in adversarial.blocks")
    largest = max(streams, key=Tensor.numel)
    return largest if largest.dim() == 3 else largest.flatten(2).transpose(1, 2)
