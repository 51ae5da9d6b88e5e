"""Power-function averages of parameters, and averages of other widths out of saved ones (Karras et al. 2024, EDM2).

After n updates the average weighs the parameters of update k in proportion to k^(gamma + 1) - (k - 1)^(gamma + 1).
That is the profile

    p(tau; n, gamma) = (gamma + 1) tau^gamma / n^(gamma + 1),   0 <= tau <= n

of parameters that keep still between updates. Its width (standard deviation) as a share of n is `sigma_rel`, with
sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Two profiles with ends a <= b have the inner product

    <p(a, alpha), p(b, beta)> = (alpha + 1)(beta + 1) / (alpha + beta + 1) (a / b)^beta / b
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jvpgraph.trainer.files import draft_of
from jvpgraph.trainer.model.parts import gathered, local

Numbers = float | np.ndarray

WIDEST = 12**-0.5  # gamma = 0: every update weighs the same
WORST_RESIDUAL = 0.1  # of a reconstruction, as a share of the profile's norm


def power_ema_gamma(sigma_rel: float) -> float:
    """The exponent of a profile of relative width `sigma_rel`: the largest root of a cubic.

    Raises:
        ValueError: no profile with gamma >= 0 has that width.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel}: the width of an average lies in (0, {WIDEST:.4f}]")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA:
    """The running average of `parameters`, in float32.

    Update k sets avg <- beta avg + (1 - beta) theta with beta = (1 - 1/k)^(gamma + 1); the first one copies.

    Args:
        parameters: by name; give the float32 masters where there are any, not their roundings. Not changed.
        sigma_rel: width of the profile as a share of the run, in (0, 0.2887].
        device: where the averages are kept; None: where the parameters are.

    Attributes:
        parameters: the averages by name, float32.
        updates: how many there were.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], sigma_rel: float, device: torch.device | str | None = None
    ) -> None:
        self.sigma_rel = sigma_rel
        self.gamma = power_ema_gamma(sigma_rel)
        self.updates = 0
        self.parameters = {
            name: p.detach().to(device or p.device, torch.float32, copy=True) for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in the parameters of one more step.

        Raises:
            ValueError: the names are not those of the average.
        """
        _same_names(self.parameters, parameters)
        self.updates += 1
        beta = (1 - 1 / self.updates) ** (self.gamma + 1)
        new = [local(parameters[name].detach()).to(p.device, torch.float32) for name, p in self.parameters.items()]
        if new:
            torch._foreach_lerp_([local(average) for average in self.parameters.values()], new, 1 - beta)

    def state_dict(self) -> dict[str, Any]:
        """The live tensors by name, and the counter."""
        return {"updates": self.updates, "sigma_rel": self.sigma_rel, "parameters": dict(self.parameters)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over averages and counter, bit for bit.

        Raises:
            ValueError: names, shapes or the width differ; nothing was changed.
        """
        given: Mapping[str, Tensor] = state["parameters"]
        _same_names(self.parameters, given)
        if state["sigma_rel"] != self.sigma_rel:
            raise ValueError(f"the saved average has sigma_rel {state['sigma_rel']}, this one {self.sigma_rel}")
        wrong = [n for n, p in self.parameters.items() if p.shape != given[n].shape]
        if wrong:
            raise ValueError("the saved averages have other shapes: " + ", ".join(wrong))
        for name, average in self.parameters.items():
            if average is not given[name]:
                average.copy_(given[name])
        self.updates = int(state["updates"])


def update_all(emas: Sequence[PowerEMA], parameters: Mapping[str, Tensor]) -> int:
    """One more step for averages of the same parameters, which are copied once to where those are kept.

    Returns:
        Bytes that went from one device to another.
    """
    near, copied = dict(parameters), 0
    for name, average in emas[0].parameters.items() if emas else ():
        if name in near and near[name].device != average.device:
            near[name] = local(near[name].detach()).to(average.device)
            copied += near[name].nbytes
    for ema in emas:
        ema.update(near)
    return copied


def averages_of(run: Path, stage: int) -> Path:
    """The folder of a stage's snapshots."""
    return run / "ema" / f"stage-{stage}"


def save_snapshot(folder: Path, step: int, ema: PowerEMA) -> Path:
    """Writes the average as `ema-<sigma_rel>-<step>.safetensors`, whole or not at all.

    Sharded averages are gathered, which is a collective: then call it on every rank. The first one writes.

    Raises:
        ValueError: the average has seen no update.
        OSError: the disk would not take it; no partial file stays behind.
    """
    if ema.updates == 0:
        raise ValueError("this average has seen no update yet: there is nothing to save")
    folder = Path(folder)
    path = folder / f"ema-{ema.sigma_rel:g}-{step:08d}.safetensors"
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    tensors = {}
    for name, average in ema.parameters.items():
        whole = gathered(average)
        if first:
            tensors[name] = whole.cpu().contiguous()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {"sigma_rel": ema.sigma_rel, "gamma": ema.gamma, "step": step, "updates": ema.updates}
        _write(path, tensors, {name: repr(number) for name, number in numbers.items()})
    return path


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        with draft_of(path) as draft:
            save_file(tensors, draft, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


@dataclass(frozen=True)
class Snapshot:
    """One saved average: where it is, and the profile it has."""

    path: Path
    sigma_rel: float
    gamma: float
    step: int
    updates: int


def snapshots(folder: Path) -> list[Snapshot]:
    """Those in `folder`, by step and width.

    Raises:
        ValueError: a file cannot be read, or carries no profile.
    """
    found = []
    for path in sorted(Path(folder).glob("ema-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                data = file.metadata() or {}
            found.append(
                Snapshot(path, float(data["sigma_rel"]), float(data["gamma"]), int(data["step"]), int(data["updates"]))
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a snapshot of an average: {error!r}. Move it elsewhere.") from error
    return sorted(found, key=lambda s: (s.updates, s.sigma_rel))


def reconstruct(folder: Path, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of width `sigma_rel` at `step`, out of the snapshots up to there (EDM2, section 3.2).

    Args:
        folder: with the snapshots of two or more widths at several steps.
        sigma_rel: the width that is wanted, in (0, 0.2887].
        step: of one of the snapshots; None for the last one.

    Returns:
        The averages by name, float32, summed in float64.

    Raises:
        ValueError: there is no snapshot of that step, or no combination of them comes near the profile; the message
            gives the residual.
    """
    gamma = power_ema_gamma(sigma_rel)
    every = snapshots(folder)
    if not every:
        raise ValueError(f"{folder} holds no snapshots of averages (ema-*.safetensors)")
    step = max(s.step for s in every) if step is None else step
    end = next((s.updates for s in every if s.step == step), None)
    if end is None:
        steps = ", ".join(map(str, sorted({s.step for s in every})))
        raise ValueError(f"{folder} has no snapshot at step {step}: there are those of {steps}")
    usable = [s for s in every if s.updates <= end]
    weights, residual = combination(usable, gamma, end)
    if not residual <= WORST_RESIDUAL:
        widths = ", ".join(f"{w:g}" for w in sorted({s.sigma_rel for s in usable}))
        raise ValueError(
            f"the {len(usable)} snapshots in {folder} up to step {step}, of sigma_rel {widths}, cannot represent "
            f"sigma_rel {sigma_rel:g}: the best combination is off by {residual:.1%} of the profile's norm, above "
            f"{WORST_RESIDUAL:.0%}. Choose a width between those that were tracked, or save snapshots more often."
        )
    return _weighted_sum(usable, weights)


def combination(of: list[Snapshot], gamma: float, end: float) -> tuple[np.ndarray, float]:
    """Weights of sum one whose mix of profiles is nearest to that of exponent `gamma` ending at update `end`.

    The sum of one, which EDM2 leaves to the fit, keeps parameters exact that never changed.

    Returns:
        The weights [len(of)] and the residual, both norms being L2 over training time, relative to the profile's.
    """
    gammas = np.array([s.gamma for s in of])
    ends = np.array([s.updates for s in of], dtype=np.float64)
    gram = inner_products(ends[:, None], gammas[:, None], ends[None, :], gammas[None, :])
    wanted = inner_products(ends, gammas, end, gamma)
    norm = inner_products(end, gamma, end, gamma)
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of norm one: early snapshots are tall
    n = len(of)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram * scale[:, None] * scale
    system[:n, n] = system[n, :n] = scale * np.sqrt(norm)
    right = np.append(wanted * scale, np.sqrt(norm))
    weights = np.linalg.lstsq(system, right, rcond=1e-13)[0][:n] * scale
    weights /= weights.sum()
    squared = norm - 2 * weights @ wanted + weights @ gram @ weights
    return weights, float(np.sqrt(max(0.0, squared) / norm))


def inner_products(a: Numbers, alpha: Numbers, b: Numbers, beta: Numbers) -> Any:
    """Of the profiles that end at `a` with exponent `alpha` and at `b` with `beta`; they broadcast."""
    early, late = np.minimum(a, b), np.maximum(a, b)
    exponent = np.where(a <= b, beta, alpha)  # of the one that goes on
    return (alpha + 1) * (beta + 1) / (alpha + beta + 1) * (early / late) ** exponent / late


def _weighted_sum(of: list[Snapshot], weights: np.ndarray) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(of, weights):
        with safe_open(snapshot.path, "pt") as file:
            names = list(file.keys())
            if total:
                _same_names(total, dict.fromkeys(names, torch.empty(0)), str(snapshot.path))
            for name in names:
                part = float(weight) * file.get_tensor(name).double()
                total[name] = total[name].add_(part) if name in total else part
    return {name: value.float() for name, value in total.items()}


def _same_names(mine: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str = "the parameters given") -> None:
    missing, extra = sorted(mine.keys() - given.keys()), sorted(given.keys() - mine.keys())
    if missing or extra:
        lines = [f"missing: {n}" for n in missing] + [f"unexpected: {n}" for n in extra]
        raise ValueError(f"{where} are not those that are averaged\n  " + "\n  ".join(lines))
