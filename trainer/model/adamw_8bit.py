"""AdamW with moments of a byte each, by torchao's update (Dettmers et al. 2021).

Each block of a moment has a float32 scale. A block lies within a row of the parameter, so that rows may be spread over
any number of processes, and a checkpoint of one layout is read in any other. Moments of vectors, of rows that no block
divides and of fewer than SMALLEST numbers stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.model.parts import local
from jvpgraph.trainer.optional import torchao

BLOCKS = (256, 128, 64)  # numbers; the first that divides a row is taken. bitsandbytes has 256
SMALLEST = 4096  # bitsandbytes' too
WITHOUT = "stages.N.student.kind and fake.kind to adamw"
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign


def block_of(shape: torch.Size) -> int | None:
    """Numbers that share a scale; None: the moments stay as they are."""
    row = shape[1:].numel()
    return next((b for b in BLOCKS if row % b == 0), None) if len(shape) > 1 and shape.numel() >= SMALLEST else None


class AdamW8bit:
    """What MasterAdamW needs of torch.optim.AdamW, for float32 parameters, sharded ones too.

    Attributes:
        state: of each parameter: `step`, and for each moment either itself or its `_codes`, of the parameter's shape,
            and its `_scale` [rows, blocks in a row]. They are made at once, and changed in place.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr}]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.subclass: Any = torchao("optim.subclass_8bit", WITHOUT).OptimState8bit
        self.update: Any = torchao("optim.adam", WITHOUT).single_param_adam
        self.compiled: Any = torch.compile(self.update, fullgraph=True, dynamic=False)
        self.maps: dict[tuple[torch.device, bool], Tensor] = {}  # from codes to values
        self.state = {parameter: moments_of(parameter) for parameter in self.param_groups[0]["params"]}

    @torch.no_grad()
    def step(self) -> None:
        with torch._dynamo.utils.disable_cache_limit():  # each shape of a parameter is compiled once
            self._step(self.param_groups[0]["lr"])

    def _step(self, lr: float) -> None:
        for parameter, state in self.state.items():
            if parameter.grad is None:
                continue
            state["step"] += 1
            mine, gradient = local(parameter.detach()), local(parameter.grad)
            if not mine.numel():
                continue
            on_cpu = mine.device.type in ("cpu", "meta")  # where compiling takes longer than it saves
            (self.update if on_cpu else self.compiled)(
                mine,
                gradient,
                state["step"],
                *(self.moment(state, name) for name in MOMENTS),
                None,
                torch.tensor(lr, dtype=torch.float32),
                *self.betas,
                self.weight_decay,
                self.eps,
                True,  # AdamW
                False,  # no stochastic rounding: masters are float32
            )

    def moment(self, state: dict[str, Tensor], name: str) -> Tensor:
        """This rank's part of a moment, which can be written to."""
        if name in state:
            return local(state[name])
        codes, scale = local(state[f"{name}_codes"]), local(state[f"{name}_scale"])
        key = (codes.device, MOMENTS[name])
        if key not in self.maps:
            block = self.subclass.zeros((BLOCKS[0],), MOMENTS[name], BLOCKS[0], device=codes.device)
            self.maps[key] = block.qmap
        found: Tensor = self.subclass(codes, scale.view(-1), self.maps[key], MOMENTS[name], dtype=torch.float32)
        return found


def check_float32(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError where 8-bit moments would be less exact than the parameters ask for."""
    if wide := [name for name, parameter in parameters.items() if parameter.dtype == torch.float64]:
        raise ValueError(
            f"adamw_8bit steps in float32, and {wide[0]} is float64: set student.dtype to float32 or bfloat16, or the "
            "optimiser's kind to adamw"
        )


def moments_of(parameter: Tensor) -> dict[str, Tensor]:
    """Zeros: with a scale of 0, whatever the codes."""
    block, parameter = block_of(parameter.shape), parameter.detach()
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for name in MOMENTS:
        if block is None:
            state[name] = torch.zeros_like(parameter)
        else:
            rows = parameter.flatten(1)
            state[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{name}_scale"] = torch.zeros_like(rows[:, : rows.shape[1] // block])
    return state
