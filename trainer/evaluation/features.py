"""Feature spaces that a configuration can name, as in `jvpgraph.trainer.features:digits_classifier`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from tqdm import trange

from jvpgraph.trainer.data.digits import digits
from jvpgraph.trainer.evaluation.distances import FeatureSpace

# ---------------------------------------------------------------- the digits


class Classifier(nn.Module):
    """Two convolutions, a feature layer of which every metric is taken, and class logits."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] -> logits [B, classes]."""
        return self.head(self.body(x))


def digits_classifier(
    seed: int = 0, steps: int = 400, features: int = 64, batch: int = 128, lr: float = 2e-3
) -> FeatureSpace:
    """The penultimate layer [N, features] of a small classifier of the digits; takes images [N, 1, 8, 8].

    Trained here on all 1797 images, in seconds: `steps` steps of `batch` images with Adam at `lr`. The same seed
    gives the same space on the same machine; the process keeps it, and its random state is left as it was.
    """
    classifier = trained_classifier(seed, steps, features, batch, lr)

    def embed(x: Tensor) -> Tensor:
        if x.shape[1:] != (1, 8, 8):
            raise ValueError(f"the digits' classifier takes images [N, 1, 8, 8], not {list(x.shape)}")
        return classifier.body(x.float().cpu())

    def classify(found: Tensor) -> Tensor:
        return classifier.head(found.float()).argmax(1)

    return FeatureSpace("digits classifier", embed, classify)


@cache
def trained_classifier(seed: int, steps: int, features: int, batch: int, lr: float) -> Classifier:
    data = digits()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = Classifier(features, classes=int(data.labels.max()) + 1)
        rng = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
        for _ in trange(steps, desc="classifier", unit="step", leave=False):
            index = torch.randint(len(data.labels), (batch,), generator=rng)
            loss = F.cross_entropy(classifier(data.x0[index]), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval().requires_grad_(False)


# ---------------------------------------------------------------- any data


def pixels(pool: int = 1) -> FeatureSpace:
    """The latents or pixels [N, ..., H, W] themselves, averaged over squares of pool x pool and flattened."""
    if pool < 1:
        raise ValueError(f"pool = {pool} pixels: expected at least 1")

    def embed(x: Tensor) -> Tensor:
        if pool == 1:
            return x.flatten(1)
        if x.dim() < 4 or x.shape[-1] % pool or x.shape[-2] % pool:
            raise ValueError(
                f"pool = {pool}: expected [N, ..., H, W], H and W divisible by {pool}, not {list(x.shape)}"
            )
        return F.avg_pool2d(x.flatten(1, -3).double(), pool).flatten(1)

    return FeatureSpace("pixels" if pool == 1 else f"pixels, pooled by {pool}", embed)


def torchscript(path: str | Path, size: int | None = None, batch: int = 64, device: str = "cpu") -> FeatureSpace:
    """A network from a file, Inception for instance: TorchScript (.pt, .ts, .jit) or torch.export (.pt2).

    It gets float32 images [B, C, H, W], B up to `batch`, as they are: decode latents before, and let the network do
    its own normalisation. It returns features [B, D, ...], which are flattened. With `size`, images are resized to
    size x size first, bilinear with antialiasing (without it figures are off: Parmar et al. 2022, arXiv 2104.11222).
    A torch.export file needs a dynamic batch dim. Both kinds can run code: open only files that you trust.

    Raises FileNotFoundError; ValueError for a file of another kind and for images that the network does not take.
    """
    path = Path(path)
    network = load_network(path, device)

    def embed(x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"{path} takes images [N, C, H, W], not {list(x.shape)}; evaluate a video frame by frame")
        x = x.float().to(device)
        if size is not None and x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        try:
            found = network(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a guard of torch.export is an AssertionError, other misfits are anything
            raise ValueError(f"the network in {path} does not take images {list(x.shape)}, float32: {error}") from error
        return found.flatten(1) if isinstance(found, Tensor) else found

    return FeatureSpace(path.stem, embed, batch=batch)


def load_network(path: Path, device: str) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"no feature network at {path}: save one with torch.export.save or torch.jit.save")
    try:
        if path.suffix == ".pt2":
            return move_to_device_pass(torch.export.load(path), device).module()
        return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # what a file of another kind raises depends on its first bytes
        kind = "torch.export file" if path.suffix == ".pt2" else "TorchScript file"
        raise ValueError(f"{path} is not a {kind} that this torch ({torch.__version__}) reads: {error}") from error
