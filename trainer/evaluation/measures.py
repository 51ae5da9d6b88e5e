"""Figures for `validation.measures`: each is a function here, or one of yours, that gives a measure.

    @dataclass
    class Brightness:
        needs: ClassVar = ()                       # of "real" and "texts": what it cannot do without
        def __call__(self, shown: Shown) -> float:   # or several figures by name
            return shown.pictures.mean().item()

A measure is asked on the first process, after no update was under way, and may draw random numbers: the run's own are
put back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.evaluation.distances import FeatureSpace, compare, frechet_distance
from jvpgraph.trainer.pictures import frames_of
from jvpgraph.trainer.plug import Plug


@dataclass(frozen=True)
class Shown:
    """What is measured, on the device of the run.

    Attributes:
        pictures: [N, C, H, W] or videos [N, C, T, H, W] in [0, 1]; latents, if sampling.decode is not set.
        real: the data's own for the same conditions, likewise; None: the data holds prompts only.
        batch: the conditions [N, ...].
        texts: the captions; None: the data has none.
    """

    pictures: Tensor
    real: Tensor | None
    batch: Batch
    texts: tuple[str, ...] | None


Measure = Callable[[Shown], "Mapping[str, float] | float"]


def needed(package: str, extra: str) -> Any:
    """A module that need not be installed. Raises ValueError."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"validation.measures: {package} cannot be imported: {error}\n{extra}, or take the measure out."
        ) from error


def still(pictures: Tensor) -> Tensor:
    """Pictures [N, C, H, W], or all frames of videos [N, C, T, H, W] as [N T, C, H, W]; C = 1 becomes 3."""
    if pictures.dim() == 5:
        pictures = pictures.transpose(1, 2).flatten(0, 1)
    if pictures.dim() != 4 or pictures.shape[1] not in (1, 3):
        raise ValueError(
            f"expected pictures [N, 1 or 3, H, W] or videos, got {list(pictures.shape)}\nSet sampling.decode, which "
            "makes them of latents."
        )
    return pictures.expand(-1, 3, -1, -1).clamp(0, 1)


# ---------------------------------------------------------------- distances from the data


@dataclass
class Distances:
    """Frechet distance, precision, recall, diversity, and accuracy where the space has classes."""

    space: FeatureSpace
    neighbours: int
    needs: ClassVar[tuple[str, ...]] = ("real",)

    def __call__(self, shown: Shown) -> dict[str, float]:
        assert shown.real is not None, "checked before the first step"
        labels = shown.batch.cond.get("labels")
        found, real = self.space(shown.pictures), self.space(shown.real)
        near: dict[str, Any] = {"neighbours": self.neighbours, "space": self.space}
        if labels is not None and int(labels.unique(return_counts=True)[1].min()) > 1:
            near |= {"labels": labels.to(found.device), "real_labels": labels.to(found.device)}
        return {name: value for name, value in asdict(compare(found, real, **near)).items() if value is not None}


def distances(features: dict[str, Any], neighbours: int = 3) -> Distances:
    """In a feature space by its plug, as in evaluation.features: {load: jvpgraph.trainer.features:pixels}."""
    return Distances(Plug(features["load"], features.get("options", {})).build(), neighbours)


@dataclass
class FID:
    """Frechet distance of torch-fidelity's Inception features; of videos, all frames count."""

    network: Any
    batch: int
    needs: ClassVar[tuple[str, ...]] = ("real",)

    def __call__(self, shown: Shown) -> float:
        assert shown.real is not None, "checked before the first step"
        network = self.network.to(shown.pictures.device)

        def embed(x: Tensor) -> Tensor:
            return network((x * 255).round().to(torch.uint8))[0]

        space = FeatureSpace("inception", embed, batch=self.batch)
        figure = frechet_distance(space(still(shown.pictures)), space(still(shown.real)))
        self.network.cpu()
        return figure


def fid(weights: str | None = None, batch: int = 32) -> FID:
    """`weights`: file of the Inception network; None: torch-fidelity downloads it. Of few samples FID is biased."""
    module = "torch_fidelity.feature_extractor_inceptionv3"
    extractor = needed(module, 'pip install "jvpgraph[validation]"').FeatureExtractorInceptionV3
    network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    return FID(network.eval().requires_grad_(False), batch)


# ---------------------------------------------------------------- pictures and their texts


@dataclass
class CLIPScore:
    """100 max(0, cos) of CLIP's embeddings of a picture and its text (Hessel et al. 2021), the mean over all frames."""

    path: str
    batch: int
    needs: ClassVar[tuple[str, ...]] = ("texts",)

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        library = needed("transformers", 'pip install "jvpgraph[models]"')
        try:
            model, processor = (getattr(library, n).from_pretrained(self.path) for n in ("CLIPModel", "CLIPProcessor"))
        except OSError as error:
            raise ValueError(
                f"validation.measures: no CLIP model in {self.path}: {' '.join(str(error).split())}\n"
                "Give the folder of one, or a name on the Hub where there is a network: options: {model: FOLDER}."
            ) from error
        return model.eval().requires_grad_(False), processor

    @torch.no_grad()
    def __call__(self, shown: Shown) -> float:
        assert shown.texts is not None, "checked before the first step"
        model, processor = self.parts
        device = shown.pictures.device
        model.to(device)
        scores = []
        for frames, texts in batches(shown, self.batch):
            inputs = processor(text=texts, images=frames, return_tensors="pt", padding=True, truncation=True).to(device)
            output = model(**inputs)
            cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
            scores.append(100 * cosines.clamp(min=0))
        model.cpu()
        return torch.cat(scores).mean().item()


def clip_score(model: str = "openai/clip-vit-base-patch16", batch: int = 32) -> CLIPScore:
    """By a CLIP of transformers: a folder, or a name on the Hub."""
    measure = CLIPScore(str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model, batch)
    _ = measure.parts  # found now, not at the first validation
    return measure


@dataclass
class Scorer:
    """The mean of what a model's `score(text, picture)` says of each frame."""

    model: Any
    needs: ClassVar[tuple[str, ...]] = ("texts",)

    def __call__(self, shown: Shown) -> float:
        scores = [float(self.model.score(text, frame)) for [frame], [text] in batches(shown, 1)]
        return sum(scores) / len(scores)


def image_reward(model: str = "ImageReward-v1.0") -> Scorer:
    """ImageReward (Xu et al. 2023): a name that it knows, which it downloads, or a file."""
    return Scorer(needed("ImageReward", "pip install image-reward").load(model))


def batches(shown: Shown, size: int) -> Iterator[tuple[list[Any], list[str]]]:
    """Frames as PIL images, each with the text of its picture or video."""
    assert shown.texts is not None, "checked before the first step"
    frames = still(shown.pictures)
    each = len(frames) // len(shown.texts)
    texts = [text for text in shown.texts for _ in range(each)]
    for i in range(0, len(frames), size):
        yield [frames_of(frame)[0] for frame in frames[i : i + size]], texts[i : i + size]
