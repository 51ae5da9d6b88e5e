"""A loss or gradient that is not finite ends the run: which sample, which term, and which module began it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.precision import Policy, Precision
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.model.parts import local
from jvpgraph.trainer.objectives import Terms
from jvpgraph.trainer.run.diagnosis import last_diagnosis
from jvpgraph.trainer.run.ranks import Ranks

HUGE = 1e3  # latents are of deviation 1

Compute = Callable[[nn.Module, Batch], Terms]
"""(the module that is trained, batch) -> the terms of its loss."""


class NotFinite(FloatingPointError):
    """A loss or a gradient is NaN or infinite; the message says where it began and what to do."""


def not_finite(
    what: str,
    terms: Terms,
    batches: Sequence[Batch],
    networks: Mapping[str, nn.Module],
    trained: str,
    compute: Compute,
    ranks: Ranks,
    lr: str,
    precision: Precision | Policy,
    folder: Path,
) -> NotFinite:
    """The error for an update of `networks[trained]` that went wrong; the update is replayed op by op to find out.

    With many ranks all of them call this, and it is not replayed: the first module to go wrong would stop its rank,
    and leave the others waiting for it.

    Args:
        what: the loss and the step, in words.
        terms: of all micro-batches, [accumulate * B] each.
        batches: the micro-batches.
        networks: every network that takes part, by name.
        trained: which of them is trained.
        compute: its loss; random draws must be those of the update.
        ranks: that train together, each with a part of the batch.
        lr: the setting of its learning rate, for the advice: key=value.
        precision: of tangents, as in the settings.
        folder: of the run, with its last diagnosis if there is one.
    """
    if ranks.size > 1:
        lines = found_by_all(what, terms, batches, networks, trained, ranks)
        return NotFinite("\n".join([*lines, *of_tangents(lines, folder), advice(lr)]))
    bad = bad_terms(terms, batches)
    overflow = None if bad else overflowing(networks[trained], terms, batches)
    lines = [f"{what}: the {'loss' if 'loss' in bad else 'gradient'} is not finite", *bad.values()]
    lines.append(f"  began in {overflow or first_offender(batches, networks, trained, compute, precision)}")
    return NotFinite("\n".join([*lines, *huge_latents(batches), *of_tangents(lines, folder), advice(lr)]))


def of_tangents(lines: Sequence[str], folder: Path) -> list[str]:
    """What is known of the student's tangents, if it is one of them that went wrong."""
    return last_diagnosis(folder) if "tangent" in "".join(lines) else []


def overflowing(model: nn.Module, terms: Terms, batches: Sequence[Batch]) -> str | None:
    """Where gradients are finite and the sum of their squares is not in float32: how large, and whose doing it is."""
    gradients = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if not gradients or not all(finite(gradient) for gradient in gradients.values()):
        return None
    sizes = {name: gradient.abs().max().item() for name, gradient in gradients.items() if gradient.numel()}
    name = max(sizes, key=sizes.__getitem__)
    keys, losses = keys_of(batches), terms["loss"].double()
    worst = int(losses.argmax())
    return (
        f"a gradient that is too large: {sizes[name]:.3g} in {name}, whose square overflows float32. The largest loss "
        f"is {losses[worst].item():.3g}, of sample {keys[worst]}; the median {losses.median().item():.3g}"
    )


def huge_latents(batches: Sequence[Batch]) -> list[str]:
    """A line on the sample with the largest latent, if that is far from what latents of deviation 1 have."""
    largest = torch.cat([batch.x0.double().flatten(1).abs().amax(1) for batch in batches])
    worst = int(largest.argmax())
    return [f"  x0 of sample {keys_of(batches)[worst]} reaches {largest[worst].item():.3g}"] * bool(
        largest[worst] > HUGE
    )


def advice(lr: str) -> str:
    return (
        "  Nothing of this update reached the weights. Take a bad sample out; or go on from the last checkpoint with a "
        f"rate below {lr} and --change {lr.partition('=')[0]}"
    )


def keys_of(batches: Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys or [f"#{i}" for i in range(len(batch))]]


def found_by_all(
    what: str,
    terms: Terms,
    batches: Sequence[Batch],
    networks: Mapping[str, nn.Module],
    trained: str,
    ranks: Ranks,
) -> list[str]:
    """Lines of what each rank finds in its part of data, parameters and gradients."""
    bad = bad_terms(terms, batches)
    at_rest = bad_at_rest(batches, networks)
    gradients = (name for name, p in networks[trained].named_parameters() if p.grad is not None and not finite(p.grad))
    overflow = overflowing(networks[trained], terms, batches)
    found = ranks.gather(lambda: (bad, at_rest, next(gradients, None)))
    too_large = ranks.gather(lambda: overflow)
    huge = [line for lines in ranks.gather(lambda: huge_latents(batches)) for line in lines]
    loss = any("loss" in terms_there for terms_there, _, _ in found)
    lines = [f"{what}: the {'loss' if loss else 'gradient'} is not finite"]
    for rank, (terms_there, at_rest_there, _) in enumerate(found):
        lines += [f"  rank {rank}:{line[1:]}" for line in terms_there.values()]
        lines += [f"  rank {rank}: {at_rest_there}"] if at_rest_there else []
    if len(lines) == 1:  # else every rank has it in its gradients: they are sums over all
        lines += [f"  rank {rank}: the gradient of {trained}.{name}" for rank, (_, _, name) in enumerate(found) if name]
    if len(lines) == 1:
        lines += [f"  rank {rank}: {text}" for rank, text in enumerate(too_large) if text]
    lines += huge
    lines.append("  The same run in one process resumes from the last checkpoint, and names the module it begins in.")
    return lines


def bad_terms(terms: Terms, batches: Sequence[Batch]) -> dict[str, str]:
    """A line on each term that is not finite: for which samples."""
    keys = keys_of(batches)
    bad = {name: (~torch.isfinite(value)).nonzero().flatten().tolist() for name, value in terms.items()}
    return {name: f"  {name}: {named(keys, indices)}" for name, indices in bad.items() if indices}


def named(keys: Sequence[str], indices: Sequence[int], most: int = 4) -> str:
    """Which samples: the first few by name, and how many of how many."""
    shown = ", ".join(keys[i] for i in indices[:most]) + (", ..." if len(indices) > most else "")
    return f"{len(indices)} of {len(keys)} samples ({shown})"


def first_offender(
    batches: Sequence[Batch],
    networks: Mapping[str, nn.Module],
    trained: str,
    compute: Compute,
    precision: Precision | Policy,
) -> str:
    """The first thing that is not finite: data, a parameter, a module's output, a tangent, a gradient."""
    at_rest = bad_at_rest(batches, networks)
    if at_rest is not None:
        return at_rest
    found: list[str] = []

    def note(where: str, value: Any) -> None:
        if isinstance(value, Tensor) and not found and not finite(value):
            found.append(where)

    def watch(module: nn.Module, args: Any, out: Any, *, where: str) -> None:
        for value in out if isinstance(out, (tuple, list)) else [out]:
            note(f"the output of {where}", value)
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(note, f"the gradient at the output of {where}"))

    model = networks[trained]
    config = jvpgraph.Config(check_finite=True, tangent_precision=precision)
    by_ops = jvpgraph.transform(model, backend="op_by_op", config=config)
    with ExitStack() as hooks:
        for network, module in networks.items():
            for name, child in module.named_modules():
                where = f"{network}.{name}" if name else network
                hooks.callback(child.register_forward_hook(partial(watch, where=where)).remove)
        for batch in batches:
            try:
                terms = compute(by_ops, batch)
            except jvpgraph.NonFiniteTangent as error:
                return found[0] if found else f"{trained}: {error}"
            if not found and not finite(terms["loss"]):
                return "the loss itself: every module's output and tangent is finite"
            terms["loss"].mean().backward()
    for name, parameter in model.named_parameters():
        note(f"the gradient of {trained}.{name}", parameter.grad)
    if found:
        return found[0]
    return "nothing that a second run could find: the error does not repeat itself"


def bad_at_rest(batches: Sequence[Batch], networks: Mapping[str, nn.Module]) -> str | None:
    """Data or a parameter that is not finite."""
    for batch in batches:
        for name, value in {"x0": batch.x0, **batch.cond}.items():
            if not finite(value):
                rows = [i for i, row in enumerate(value) if not finite(row)]
                return f"the data: {name} of sample {batch.keys[rows[0]] if batch.keys else rows[0]}"
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            if not finite(parameter):
                return f"a parameter: {network}.{name}"
    return None


@torch.no_grad()  # in a checkpointed block all that keeps tensors has to come again when it is recomputed
def finite(x: Tensor) -> bool:
    """Of a sharded tensor: this rank's part."""
    return bool(torch.isfinite(local(x)).all())
