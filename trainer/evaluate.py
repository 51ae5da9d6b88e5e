"""Sample quality and diversity, in the feature space of a small classifier trained on the real digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from jvpgraph.trainer.config import ClassifierConfig
from jvpgraph.trainer.data import Batch, Digits


class Classifier(nn.Module):
    """Two convolutions, a 64-dim feature layer, and class logits."""

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

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] -> features [B, 64], float64."""
        return self.body(x.float()).double()


def train_classifier(data: Digits, config: ClassifierConfig, classes: int, rng: torch.Generator) -> Classifier:
    classifier = Classifier(config.features, classes)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=config.lr)
    for _ in trange(config.steps, desc="classifier", unit="step"):
        batch = data.draw(config.batch, rng)
        loss = F.cross_entropy(classifier(batch.x0), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


@dataclass(frozen=True)
class Quality:
    """How close samples are to the real images."""

    frechet_distance: float  # squared, in units of the features
    precision: float  # share of samples inside the real images' manifold
    recall: float  # share of real images inside the samples' manifold
    accuracy: float  # share of samples that the classifier takes for the digit asked for


def evaluate(samples: Batch, real: Tensor, classifier: Classifier, neighbours: int) -> Quality:
    """samples: images and the labels asked for; real: images [N, 1, 8, 8]."""
    fake_features, real_features = classifier.features(samples.x0), classifier.features(real)
    precision, recall = precision_recall(real_features, fake_features, neighbours)
    with torch.no_grad():
        predicted = classifier(samples.x0.float()).argmax(1)
    return Quality(
        frechet_distance=frechet_distance(real_features, fake_features),
        precision=precision,
        recall=recall,
        accuracy=(predicted == samples.labels).double().mean().item(),
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to a [N, D] and b [M, D].

    Heusel et al. 2017. The trace of (A B)^1/2 is the sum of the square roots of the eigenvalues of the
    symmetric A^1/2 B A^1/2.
    """
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def precision_recall(real: Tensor, fake: Tensor, neighbours: int) -> tuple[float, float]:
    """Shares of fake [M, D] covered by real [N, D] and the reverse (Kynkaanniemi et al. 2019).

    A set covers a point that is no further from one of its members than that member's k-th nearest neighbour.
    """
    between = torch.cdist(real, fake)

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself

    precision = (between <= radii(real)[:, None]).any(0).double().mean().item()
    recall = (between <= radii(fake)[None, :]).any(1).double().mean().item()
    return precision, recall
