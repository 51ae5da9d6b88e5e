"""What `jvpgraph prepare` wrote, as a data set: a bucket of shards for each shape, described by a card."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.data.prompts import prompts
from jvpgraph.trainer.data.sample import BadShard, Dataset, Sample
from jvpgraph.trainer.data.shards import OnBadShard, webdataset

log = logging.getLogger("jvpgraph.trainer.data")

CARD, INDEX, CAPTIONS = "card.json", "index.json", "captions.json"
LATENTS = "latents.safetensors"


def prepared(path: str | Path, *, guidance: float | None = None, on_bad_shard: OnBadShard = "stop") -> Prepared:
    """The samples of a folder that `jvpgraph prepare` wrote; shift, scale and names of conditions are the card's.

    Args:
        path: the folder.
        guidance: of a network that is told its guidance scale, instead of the one in the card.
        on_bad_shard: as in `webdataset`.

    Raises:
        ValueError: the folder is not one, or is not complete.
        BadShard: a shard cannot be used.
    """
    folder = Path(path)
    card = read_card(folder)
    index = json.loads((folder / INDEX).read_text())
    constants = dict(card["constants"])
    if guidance is not None:
        if "guidance" not in constants:
            raise ValueError(f"guidance={guidance}: the network of {folder} takes none. Leave it out.")
        constants["guidance"] = guidance * card["guidance_scale"]
    fields = {f"{name}.safetensors": name for name in card["conditions"]}
    latents = card["latents"]
    parts: list[Dataset] = []
    sizes: list[dict[str, Any]] = []
    for bucket in card["buckets"]:
        shards = [str(folder / shard["name"]) for shard in index["shards"] if shard["bucket"] == bucket["name"]]
        try:
            if latents["field"] is None:
                parts.append(prompts(shards, conditions=fields, shape=bucket["latents"], on_bad_shard=on_bad_shard))
            else:
                more = {"scale": latents["scale"], "shift": latents["shift"], "on_bad_shard": on_bad_shard}
                parts.append(webdataset(shards, latents=latents["field"], conditions=fields, **more))
        except BadShard as error:
            if on_bad_shard == "stop" or (not parts and bucket is card["buckets"][-1]):
                raise
            log.warning("%s\n  left out: all samples of %s", error, bucket["name"])
            continue
        sizes.append(_tensors(bucket["sizes"]))
    return Prepared(folder, parts, sizes, constants, card, on_bad_shard)


def read_card(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a folder that is not complete."""
    if not (folder / CARD).is_file() or not (folder / INDEX).is_file():
        begun = (folder / "plan.json").is_file()
        what = "was not prepared to the end" if begun else f"holds no {CARD} of `jvpgraph prepare`"
        do = "Run the same `jvpgraph prepare` again: it goes on." if begun else "Give the folder named by its --out."
        raise ValueError(f"{folder} {what}. {do}")
    return json.loads((folder / CARD).read_text())


class Prepared:
    """The buckets one after the other; the fingerprint covers shards, names and normalisation.

    `meaning` is what the card says of all buckets, whichever of their shards can be read.
    """

    def __init__(
        self,
        folder: Path,
        parts: list[Dataset],
        sizes: list[dict[str, Tensor]],
        constants: dict[str, Any],
        card: dict[str, Any],
        on_bad_shard: OnBadShard,
    ) -> None:
        self.folder = folder
        self.parts, self.card, self.on_bad_shard = parts, card, on_bad_shard
        self.has_latents = card["latents"]["field"] is not None
        self.constants = _tensors(constants)
        self.sizes = sizes  # conditions that tell them, of each part
        self._ends = list(accumulate(len(part) for part in parts))
        self.buckets = [range(start, end) for start, end in pairwise([0, *self._ends])]
        named = [[getattr(part, "fingerprint", "") for part in parts], card["latents"], constants]
        self.fingerprint = _digest(named)
        told = [[bucket["name"], bucket["sizes"]] for bucket in card["buckets"]]
        self.meaning = _digest([card["latents"], card["conditions"], constants, told])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`. BadShard if it cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        sample = self.parts[number][index - self.buckets[number].start]
        return Sample(sample.key, sample.x0, {**sample.cond, **self.sizes[number], **self.constants})

    def captions(self) -> dict[str, str]:
        """Of every sample, by key; of what `jvpgraph synthesize` made, as far as its data had some."""
        if (self.folder / CAPTIONS).is_file():
            of_it: dict[str, str] = json.loads((self.folder / CAPTIONS).read_text(encoding="utf-8"))
            return of_it
        plan = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        return {entry["key"]: entry["caption"] for shard in plan["shards"] for entry in shard["entries"]}


def _digest(named: Any) -> str:
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def _tensors(numbers: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}
