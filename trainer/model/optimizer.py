"""AdamW on float32 master copies, and the learning rate of a step.

A bfloat16 parameter near 1 moves in steps of 1/256. At a learning rate of 2e-6 no single update reaches the next
representable value, so updates are summed in float32 masters and the parameters are roundings of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from jvpgraph.trainer.model.adamw_8bit import AdamW8bit, check_float32
from jvpgraph.trainer.model.parts import local

Shape = Literal["constant", "cosine"]
Kind = Literal["adamw", "adamw_8bit"]


def learning_rate(step: int, base: float, warmup: int, total: int, shape: Shape = "constant") -> float:
    """The rate of update `step`, counted from 1 to `total`.

    It rises linearly over the first `warmup` updates to `base`, and then stays there or falls along half a cosine
    towards zero, which it would reach one update after the last.

    Raises:
        ValueError: `step` is below 1, or there is no such shape.
    """
    if step < 1:
        raise ValueError(f"updates are counted from 1: there is no learning rate for update {step}")
    if shape not in ("constant", "cosine"):
        raise ValueError(f"unknown shape of the learning rate {shape!r}: choose 'constant' or 'cosine'")
    if step <= warmup:
        return base * step / warmup
    if shape == "constant":
        return base
    progress = (step - 1 - warmup) / max(1, total - warmup)
    return base * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


class MasterAdamW:
    """torch.optim.AdamW over float32 masters of the trainable parameters.

    Parameters of float32 and float64 are their own masters. For all others the gradient is handed over in float32,
    and after each step the parameter is its master, rounded. Only the masters count: who writes to a half-precision
    parameter directly is overruled by the next step.

        loss.backward()
        norm = optimizer.gradient_norm()
        optimizer.clip(norm)
        optimizer.step(lr)
        optimizer.zero_grad()

    Args:
        parameters: by name, as from `model.named_parameters()`; those that require no gradient are left out.
        lr: learning rate where `step` is not told another.
        betas, eps, weight_decay: of AdamW; the defaults of betas and weight decay are those of rCM.
        clip_norm: the L2 norm of all gradients that `clip` scales down to; None leaves them alone.
        kind: adamw_8bit has moments of a byte each, by torchao.
        foreach, fused: as in torch.optim.AdamW; None chooses as torch does.

    Attributes:
        masters: by name, in the order given.

    Raises:
        ValueError: there is nothing to train, a name occurs twice, or 8-bit moments are asked for in float64.
        ModuleNotFoundError: 8-bit moments without torchao.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip_norm: float | None = None,
        kind: Kind = "adamw",
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        # A list, because an iterator is used up by the first loop over it.
        named = list(parameters.items() if isinstance(parameters, Mapping) else parameters)
        self.parameters = {name: p for name, p in named if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        if len(self.parameters) != sum(p.requires_grad for _, p in named):
            raise ValueError("two parameters have the same name")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is {clip_norm}: pass a positive norm, or None to leave gradients alone")
        self.lr = lr
        self.clip_norm = clip_norm
        self.masters: dict[str, Tensor] = {name: _master(p) for name, p in self.parameters.items()}
        self.copied = [name for name, p in self.parameters.items() if self.masters[name] is not p]
        common: Any = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.adamw: torch.optim.AdamW | AdamW8bit
        if kind == "adamw_8bit":
            check_float32(self.masters)
            self.adamw = AdamW8bit(self.masters.values(), **common)
            return
        self.adamw = torch.optim.AdamW(self.masters.values(), **common, foreach=foreach, fused=fused)
        for master in self.masters.values():  # what AdamW makes at a first step, so that a checkpoint always has it
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
            }

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """One update of the masters and of the parameters that have a gradient."""
        for group in self.adamw.param_groups:
            group["lr"] = self.lr if lr is None else lr
        moved = [name for name in self.copied if self.parameters[name].grad is not None]
        for name in moved:
            gradient = self.parameters[name].grad
            assert gradient is not None
            self.masters[name].grad = gradient.to(self.masters[name].dtype)
        self.adamw.step()
        for name in moved:
            self.masters[name].grad = None
        self._round(moved)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The L2 norm of all gradients, a tensor of no dims that nobody has waited for yet.

        Squares are summed in float32, in float64 where a gradient is of that. For sharded parameters it is the norm
        of the whole gradients: a collective of the ranks of their mesh. torch.nn.utils.get_total_norm rounds the norm
        of each bfloat16 gradient to bfloat16, and takes neither two meshes nor sharded gradients beside plain ones.
        """
        gradients = self._gradients()
        plain = [g for g in gradients if not isinstance(g, DTensor)]
        squares = [_sum_of_squares(plain)] if plain else []
        sharded: dict[Any, list[DTensor]] = {}
        for gradient in gradients:
            if isinstance(gradient, DTensor):
                placements = tuple(Replicate() if p.is_partial() else p for p in gradient.placements)
                if placements != gradient.placements:
                    gradient = gradient.redistribute(placements=placements)
                summed = tuple(Replicate() if p.is_replicate() else Partial() for p in placements)
                sharded.setdefault((gradient.device_mesh, summed), []).append(gradient)
        for (mesh, placements), group in sharded.items():
            mine = _sum_of_squares([g.to_local() for g in group]).to(mesh.device_type)  # from the CPU, if they rest
            for dim, placement in enumerate(placements):
                if placement.is_partial():
                    dist.all_reduce(mine, group=mesh.get_group(dim))
            squares.append(mine)
        if not squares:
            return torch.zeros(())
        return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()

    @torch.no_grad()
    def clip(self, norm: Tensor) -> None:
        """Scales all gradients, whose norm is `norm`, so that it becomes at most `clip_norm`; does not wait for it.

        A norm that is not finite makes every gradient NaN rather than hide that.
        """
        if self.clip_norm is None:
            return
        scale = (self.clip_norm / norm).clamp(max=1.0)
        for gradient in self._gradients():
            mine = local(gradient)
            mine.mul_(scale.to(mine.device))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Masters and moments by the parameters' names: the live tensors, so that a checkpoint loads in place.

        A parameter that is its own master is not repeated here; it is saved with the model.
        """
        moments: dict[str, dict[str, Tensor]] = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                moments.setdefault(key, {})[name] = value
        return {"masters": {name: self.masters[name] for name in self.copied}, **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over masters and moments bit for bit; half-precision parameters become their masters, rounded.

        Raises:
            ValueError: names, shapes or dtypes differ; the message lists all that do, and nothing was changed.
        """
        mine = self.state_dict()
        pairs: list[tuple[Tensor, Tensor]] = []
        wrong: list[str] = []
        for part in sorted({*mine, *state}):
            own, given = mine.get(part, {}), state.get(part, {})
            for name in sorted({*own, *given}):
                if name not in given:
                    wrong.append(f"{part}.{name}: missing")
                elif name not in own:
                    wrong.append(f"{part}.{name}: there is no such parameter")
                elif (own[name].shape, own[name].dtype) != (given[name].shape, given[name].dtype):
                    wrong.append(f"{part}.{name}: {_kind(given[name])}, here it is {_kind(own[name])}")
                else:
                    pairs.append((own[name], given[name]))
        if wrong:
            raise ValueError("the state is that of another optimizer\n  " + "\n  ".join(wrong))
        for target, value in pairs:
            if target is not value:
                target.copy_(value)
        self._round(self.copied)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _round(self, names: Sequence[str]) -> None:
        if names:
            torch._foreach_copy_([local(self.parameters[n]) for n in names], [local(self.masters[n]) for n in names])


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().to(torch.float32)


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    device = tensors[0].device
    total = torch.zeros((), device=device)
    for dtype in (torch.float32, torch.float64):
        group = [t for t in tensors if (t.dtype == torch.float64) == (dtype == torch.float64)]
        if group:
            norms = torch._foreach_norm(group, 2, dtype=dtype)
            total = total + torch.stack([n.to(device) for n in norms]).square().sum()
    return total


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
