"""One teacher of two networks, one above and one below a time, as Wan 2.2's of 14B: one for high noise, one for low."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.adapters import diffusers_model
from jvpgraph.trainer.trigflow import Call, TrigFlow


class Experts(nn.Module):
    """The networks alone; ByTime says which is called."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high = high
        self.low = low
        kept = (getattr(net, "_keep_in_fp32_modules", None) or () for net in (high, low))
        self._keep_in_fp32_modules = [name for names in kept for name in names]


class ByTime:
    """A call of Experts: each sample goes by its own time.

    A network is called with the whole batch, if any sample needs it, so that all calls have one shape. Where FSDP2
    gathers the parameters, all processes call the same ones.

    Args:
        high, low: the calls of the two networks.
        boundary: the network's time from which on the first one is meant.
    """

    def __init__(self, high: Call, low: Call, boundary: float) -> None:
        self.high = high
        self.low = low
        self.boundary = boundary

    def __call__(self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        above = time >= self.boundary
        calls = {"high": self.high, "low": self.low}
        if x.is_meta:  # a plan: most batches of one sample need one network
            needed = ["high"]
        else:
            flags = torch.stack([above.any(), (~above).any()]).int()
            if any(isinstance(p, DTensor) for p in net.parameters()):
                dist.all_reduce(flags, dist.ReduceOp.MAX)
            needed = [name for name, flag in zip(calls, flags.tolist(), strict=True) if flag]
        found = {name: calls[name](getattr(net, name), x, time, cond) for name in needed}
        if len(found) == 1:
            return next(iter(found.values()))
        return torch.where(above.reshape(-1, *[1] * (x.dim() - 1)), found["high"], found["low"])


def experts(
    path: Path | str | None = None,
    *,
    high: dict[str, Any] | None = None,
    low: dict[str, Any] | None = None,
    boundary: float | None = None,
    dtype: str = "float32",
) -> TrigFlow:
    """Two transformers of diffusers as one teacher, for teacher.model.

    Args:
        path: folder of a pipeline with `transformer`, for high noise, and `transformer_2`, for low.
        high, low: instead, options of `diffusers_model` for each.
        boundary: rectified-flow time (1 is noise) from which on the first one is asked; None: the pipeline's own.
        dtype: of the parameters, of both with a path.

    Raises:
        ValueError: it is no such pipeline, or the two are not of one kind.
    """
    if path is not None and (high is not None or low is not None):
        raise ValueError("give either path, the folder of a pipeline with both networks, or the options high and low")
    if path is not None:
        file = Path(path) / "model_index.json"
        own = read_json(file).get("boundary_ratio") if file.is_file() else None
        boundary = own if boundary is None else boundary
        if not (Path(path) / "transformer_2").is_dir() or boundary is None:
            raise ValueError(
                f"{path} is no pipeline of two networks: it has no transformer_2, or no boundary_ratio. Give the "
                "folder of Wan 2.2's of 14B; or two networks by the options high, low and boundary"
            )
        high, low = ({"path": str(Path(path) / part), "dtype": dtype} for part in ("transformer", "transformer_2"))
    if high is None or low is None or boundary is None or not 0 < boundary < 1:
        raise ValueError("give high, low and the time between them, boundary, above 0 (data) and below 1 (noise)")
    first, second = diffusers_model(**high), diffusers_model(**low)
    if (first.schedule, first.time_scale) != (second.schedule, second.time_scale):
        raise ValueError(
            f"high is of {first.schedule.name} and times up to {first.time_scale:g}, low of {second.schedule.name} and "
            f"{second.time_scale:g}: give two networks that were trained on the same noise"
        )
    call = ByTime(first.call, second.call, first.time_scale * boundary)
    return TrigFlow(Experts(first.net, second.net).eval(), call, first.schedule, time_scale=first.time_scale)
