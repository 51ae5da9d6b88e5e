"""--format lora: what the student adds to its teacher, as the LoRA file that pipelines of diffusers load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jvpgraph.trainer.export.card import write_card
from jvpgraph.trainer.export.task import NETWORK, Task
from jvpgraph.trainer.model.student import adapted_layers

FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for


def export_lora(task: Task, out: Path) -> None:
    """The adapters of a LoRA student as they are; those of any other by the singular values of what it learnt.

    Raises:
        ValueError: the student has whole weights and no rank is given, or the network is not diffusers'.
    """
    task.check_inputs("pipelines that load LoRA files tell")
    if task.has_scale:
        raise ValueError(
            "the student's guidance scale acts on the bias of its time embedding, and LoRA files hold no biases\n"
            "Use --format diffusers."
        )
    if not task.from_diffusers:
        raise ValueError(
            f"{type(task.net).__name__} is no network of diffusers, whose pipelines load LoRA files\n"
            "Use --format diffusers, which writes its weights as safetensors."
        )
    if not hasattr(task.net, "load_lora_adapter"):
        raise ValueError(
            f"diffusers' {type(task.net).__name__} takes no LoRA, nor do its pipelines\n"
            "Use --format diffusers, which adds the adapters to the weights."
        )
    adapters = adapters_of(task.run.student.net)
    notes = f"LoRA adapters on {len(adapters)} layers, as they were trained."
    if task.rank is not None:
        extraction = extract(task.run.base.net, task.net, task.rank)
        adapters, notes = extraction.adapters, str(extraction)
        print(notes)
    elif not adapters:
        raise ValueError(
            "the student has whole weights, not adapters\nGive the rank of a LoRA that comes close: --rank 64."
        )
    tensors = {
        f"{NETWORK}.{layer}.lora_{part}.weight": weight.contiguous().cpu()
        for layer, (a, b) in adapters.items()
        for part, weight in (("A", a), ("B", b))
    }
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    if task.fits:
        task.save_scheduler(out / "scheduler")
    write_card(task, out, "lora", notes)


Adapters = dict[str, tuple[Tensor, Tensor]]
"""A [rank, in] and B [out, rank] by the layer that B A is added to."""


def adapters_of(net: nn.Module) -> Adapters:
    """Those of a LoRA student, with alpha / rank in B: a file without alphas means B A itself."""
    found: Adapters = {}
    for name, layer in adapted_layers(net):
        (adapter,) = layer.active_adapters
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        found[name] = a.detach(), b.detach() * layer.scaling[adapter]
    return found


@dataclass(frozen=True)
class Extraction:
    """A LoRA that comes close to a change of weights; `str()` says how close.

    Attributes:
        kept: squared norm of the change that the adapters make.
        lost: squared norm of what they lack in the linear layers.
        outside: squared norm of the change of everything else: biases, norms, embeddings, convolutions.
    """

    adapters: Adapters
    rank: int
    kept: float
    lost: float
    outside: float

    @property
    def error(self) -> float:
        """The norm of what is missing, relative to that of the whole change."""
        whole = self.kept + self.lost + self.outside
        return ((self.lost + self.outside) / whole) ** 0.5 if whole else 0.0

    def __str__(self) -> str:
        whole = max(self.kept + self.lost + self.outside, 1e-300)
        return (
            f"LoRA of rank {self.rank} on {len(self.adapters)} layers, by SVD: it misses {self.error:.2%} of what the "
            f"student learnt (relative L2 norm), {(self.lost / whole) ** 0.5:.2%} in these layers and "
            f"{(self.outside / whole) ** 0.5:.2%} in weights that a LoRA does not reach."
        )


@torch.no_grad()
def extract(teacher: nn.Module, student: nn.Module, rank: int) -> Extraction:
    """The best B A of a rank for every linear layer, in the Frobenius norm (Eckart-Young)."""
    before: Mapping[str, Tensor] = teacher.state_dict()
    linear = {f"{name}.weight": name for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    adapters: Adapters = {}
    kept = lost = outside = 0.0
    for name, value in student.state_dict().items():
        if not value.dtype.is_floating_point:
            continue
        change = value.double() - before[name].double()
        size = change.square().sum().item()
        if size == 0:
            continue
        if name not in linear:
            outside += size
            continue
        adapters[linear[name]], missed = low_rank(change, rank)
        kept, lost = kept + size - missed, lost + missed
    return Extraction(adapters, rank, kept, lost, outside)


def low_rank(change: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """A, B in float32 and the squared norm of change - B A; padded with zeros where there are fewer columns."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    short = rank - len(root)
    pad: Any = nn.functional.pad
    return (pad(a, (0, 0, 0, short)).float(), pad(b, (0, short)).float()), s[rank:].square().sum().item()
