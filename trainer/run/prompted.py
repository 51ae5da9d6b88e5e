"""Prompts of the user's own for previews: encoded once, before the networks are built, by the checkpoint's encoders."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import Dataset, first_samples
from jvpgraph.trainer.files import draft_of
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.prepare.checkpoint import Encoder, pipeline_of, read_checkpoint
from jvpgraph.trainer.run.origin import digest_of_values

log = logging.getLogger(__name__)

FILE = "prompts.safetensors"
DECODER = "jvpgraph.trainer.prepare:decoder"


@dataclass(frozen=True)
class Prompted:
    """Prompts with their conditions; the latents of `batch` only lend their shape."""

    texts: tuple[str, ...]
    batch: Batch
    decode: Plug  # of their latents
    key: str  # what the conditions follow from

    def save(self, folder: Path) -> None:
        """For when the run goes on: then no encoder is loaded."""
        tensors = {name: x.contiguous() for name, x in self.batch.cond.items()}
        with draft_of(folder / FILE) as draft:
            save_file(tensors, draft, {"key": self.key})


def prompted_of(config: RunConfig, dataset: Dataset, device: torch.device) -> Prompted | None:
    """The prompts of log.prompts; None: there are none.

    Conditions that do not come from a prompt, such as a guidance scale or a size, are those of the data's first sample.

    Raises:
        ValueError: no pipeline to encode with, or it gives other conditions than the data has.
    """
    texts = config.log.prompts
    if not texts:
        return None
    pipeline = config.log.prompts_pipeline or pipeline_of(config.model.options)
    if pipeline is None:
        raise ValueError(
            "log.prompts: the teacher does not come from the folder of a whole pipeline, whose text encoders would be "
            "needed\nName one: log.prompts_pipeline, a folder with a model_index.json; or leave log.prompts out."
        )
    sample = first_samples(dataset, 1)
    length = getattr(dataset, "card", {}).get("settings", {}).get("text_length")
    named = json.dumps([texts, str(Path(pipeline).resolve()), length, digest_of_values(sample.cond)], sort_keys=True)
    key = hashlib.sha256(named.encode()).hexdigest()[:16]
    decode = config.sampling.decode or Plug(DECODER, {"checkpoint": str(pipeline)})
    cond = saved(config.out / FILE, key)
    if cond is None:
        cond = encoded(Path(pipeline), texts, sample.cond, device, length)
    x0 = torch.zeros(len(texts), *sample.x0.shape[1:])
    return Prompted(tuple(texts), Batch(x0, cond, tuple(texts)), decode, key)


def saved(path: Path, key: str) -> dict[str, Tensor] | None:
    """Conditions that were saved for the same prompts."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # not there, or damaged: encoded anew
        return None
    return None


def encoded(
    pipeline: Path, texts: tuple[str, ...], like: Condition, device: torch.device, length: int | None
) -> dict[str, Tensor]:
    """The conditions of prompts, [B, ...] on the CPU; the encoders are gone afterwards, and no random number drawn."""
    log.info("encoding %d prompts for previews with %s", len(texts), pipeline)
    known = read_checkpoint(pipeline)
    with torch.random.fork_rng(devices=[]):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoder: Any = Encoder(known, device, dtype, length)
        each = [encoder.prompt(text) for text in texts]
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    wrong = [
        f"{name} is {list(x.shape[1:])}, and {list(like[name].shape[1:]) if name in like else 'missing'} in the data"
        for name, x in found.items()
        if name not in like or x.shape[1:] != like[name].shape[1:]
    ]
    if wrong:
        raise ValueError(
            f"log.prompts: {pipeline} gives other conditions than the data has: {'; '.join(wrong)}\n"
            "Name the pipeline that the data was encoded with: log.prompts_pipeline; or leave log.prompts out."
        )
    found = {name: x.to(like[name].dtype) for name, x in found.items()}
    rest = {name: x.expand(len(texts), *x.shape[1:]).clone() for name, x in like.items() if name not in found}
    return {**found, **rest}
