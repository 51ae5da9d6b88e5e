"""Validation while a run goes on: the averaged student's samples measured, beside its teacher's for the same noise.

The teacher's samples are drawn once, before the first step, and kept in OUT/validation.safetensors with their figures.
Nothing is taken from the run's random streams.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import Dataset, some_samples
from jvpgraph.trainer.evaluation.measures import Measure, Shown
from jvpgraph.trainer.evaluation.samplers import Sampler, draw, sampler_of
from jvpgraph.trainer.files import draft_of
from jvpgraph.trainer.model.networks import averaged
from jvpgraph.trainer.plug import PlugFailed, described, speaks_for_itself
from jvpgraph.trainer.run.kept import unseen
from jvpgraph.trainer.run.origin import digest_of_values, digests_of, what_teaches
from jvpgraph.trainer.run.preview import decoder_of
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.trigflow import Guided, TrigFlow

log = logging.getLogger(__name__)

FILE = "validation.safetensors"


@dataclass(frozen=True)
class OfTeacher:
    """Its figures by name; on the first process, the samples too, and what the file says of them."""

    figures: dict[str, float]
    latents: Tensor | None
    said: dict[str, str]

    def save(self, folder: Path) -> None:
        """For when the run goes on."""
        assert self.latents is not None, "called on the first process"
        with draft_of(folder / FILE) as draft:
            save_file({"latents": self.latents}, draft, {**self.said, "figures": json.dumps(self.figures)})


@dataclass(frozen=True)
class Validation:
    """What is measured of a run.

    Attributes:
        batch: the conditions, and the data's latents for them, on the device.
        measures: by name, on the first process; on others empty.
        texts: captions of the batch, if the data has them.
        digest: of the teacher's values, on the first process.
    """

    config: RunConfig
    ranks: Ranks
    batch: Batch
    measures: Mapping[str, Measure]
    texts: tuple[str, ...] | None
    digest: str

    @classmethod
    def of(
        cls, config: RunConfig, dataset: Dataset, ranks: Ranks, device: torch.device, digest: str
    ) -> Validation | None:
        """None: validation.every is not set.

        Raises:
            ValueError: a measure cannot be made, or the data lacks what it needs.
        """
        wanted = config.validation
        if wanted.every is None:
            return None
        batch = some_samples(dataset, wanted.count)
        captions = getattr(dataset, "captions", None)
        by_key = {} if captions is None else captions()
        texts = tuple(by_key[key] for key in batch.keys) if {*batch.keys} <= by_key.keys() else None
        missing = {"real": not getattr(dataset, "has_latents", True), "texts": texts is None}
        made: dict[str, Measure] = {}

        def make() -> None:
            for name, plug in wanted.measures.items():
                made[name] = plug.build()
                if not callable(made[name]):
                    raise ValueError(f"validation.measures.{name}: {plug.load} gave no function; see docs/trainer.md")
                for need in getattr(made[name], "needs", ()):
                    if missing[need]:
                        what = {"real": "the data's pictures, and it holds prompts only", "texts": TEXTS}[need]
                        raise ValueError(f"validation.measures.{name} needs {what}\nTake the measure out.")

        ranks.on_first(lambda: unseen(make))
        return cls(config, ranks, batch.to(device), made, texts, digest)

    def of_student(
        self,
        student: TrigFlow,
        sampler: Callable[[int], Sampler],
        average: Mapping[str, Tensor],
        teacher: Mapping[str, float],
    ) -> dict[str, float]:
        """Figures of student and teacher by their names in the log. A collective; on the first process alone they are
        more than nothing.

        Args:
            sampler: of the student, in a number of steps.
            teacher: its figures.
        """
        config = self.config
        steps = config.validation.steps or max(config.sampling.steps)
        with averaged(student, average):
            latents = self.drawn(sampler(steps))
        found = self.ranks.on_first(lambda: self.measured(latents))
        if self.ranks.first:
            words = [f"{name} {x:.4g} (teacher {teacher.get(name, float('nan')):.4g})" for name, x in found.items()]
            log.info("validation, %d steps: %s", steps, ", ".join(words))
        return {f"validation/{name}": x for name, x in found.items()} | {
            f"validation/{name}_teacher": x for name, x in teacher.items()
        }

    def of_teacher(self, guided: Guided) -> OfTeacher:
        """From the run's folder, if what is there is of the same teacher, samples and measures. A collective.

        Raises:
            ValueError: the decoder or a measure cannot do with the samples.
        """
        config, path = self.config, self.config.out / FILE
        plain = settings.to_dict(config)
        means: list[Any] = [what_teaches(config, self.digest, guided.negative)]
        means += [plain["sampling"], plain["data"]["source"], config.validation.count, config.validation.seed]
        means += [self.batch.keys, digest_of_values({"x0": self.batch.x0, **self.batch.cond})]
        measures, decode = config.validation.measures, config.sampling.decode
        code = digests_of({name: plug.file for name, plug in [*measures.items(), ("", decode)] if plug is not None})
        samples, figures = digest(means), digest([means, plain["validation"]["measures"], code])
        said = {"samples_of": samples, "figures_of": figures}

        def known() -> tuple[bool, dict[str, float] | None]:
            """Whether there are samples, and their figures."""
            there = read(path)
            same = there.get("figures_of") == figures
            return there.get("samples_of") == samples, json.loads(there["figures"]) if same else None

        there, found = self.ranks.on_first(known)  # who alone has the digest of the teacher
        latents = None
        if not there:
            if self.ranks.first:
                log.info("validation: the teacher's samples, in %d steps", config.sampling.teacher_steps)
            sampler = sampler_of("flow", guided, config.sampling.teacher_steps, config.sampling)
            latents = self.drawn(sampler).float().cpu().contiguous()

        def measure() -> dict[str, float]:
            nonlocal latents
            if latents is None:
                latents = tensor_in(path)
            return self.measured(latents) if found is None else found

        return OfTeacher(self.ranks.on_first(measure), latents, said)

    def drawn(self, sample: Sampler) -> Tensor:
        """Latents; the noise that a part begins with depends on its place alone, not on how it is sampled."""
        size, seed = self.config.sampling.batch, self.config.validation.seed
        return torch.cat([draw(sample, part, size, seed + i) for i, part in enumerate(self.batch.split(size))])

    def measured(self, latents: Tensor) -> dict[str, float]:
        """Figures by name; several of one measure as NAME/FIGURE."""
        decode = decoder_of(self.config.sampling)
        size = self.config.sampling.batch
        found: dict[str, float] = {}

        def measure() -> None:
            pictures, real = (
                torch.cat([decode(part) for part in x.to(self.batch.x0.device).float().split(size)])
                for x in (latents, self.batch.x0)
            )
            shown = Shown(pictures, real, self.batch, self.texts)
            for name, function in self.measures.items():
                try:
                    value = function(shown)
                except Exception as error:
                    if speaks_for_itself(error):
                        raise named(name, error) from error
                    raise PlugFailed(f"validation.measures.{name} raised {described(error)}") from error
                several = value if isinstance(value, Mapping) else {"": value}
                found.update({f"{name}/{key}".rstrip("/"): float(x) for key, x in several.items()})

        unseen(measure)
        return found


def named(measure: str, error: Exception) -> Exception:
    """The error with the measure's name, and what to do if it does not say so itself."""
    if not isinstance(error, ValueError):
        return error
    what = f"validation.measures.{measure}: {error}"
    return ValueError(what if "\n" in what else f"{what}\nTake the measure out, or give it more: validation.count.")


TEXTS = "captions, and the data has none: those of `jvpgraph prepare` do, and others by a method captions()"


def digest(named: Any) -> str:
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, str]:
    """What the file says of itself; nothing, if it is not there or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def tensor_in(path: Path) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")
