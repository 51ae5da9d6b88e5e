"""Quality and diversity of samples in any feature space: Frechet distance, precision, recall, diversity.

A `FeatureSpace` turns latents or images into features; trainer/features.py has some. The metrics know nothing else
of the data. Distances are exact and computed in blocks of rows, so that 50,000 samples against 50,000 real images
need some hundred MiB besides the features.

How good a figure can get for finite data is the figure of the data against itself: evaluate one half of the real
images against the other, or images drawn again with replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import nan, sqrt
from statistics import fmean, stdev

import torch
from scipy.special import stdtrit
from torch import Tensor
from tqdm import trange

BLOCK_BYTES = 2**26  # of one block of distances; a few such blocks are alive at a time
TIE = 1e-9  # relative difference of squared distances below which two count as equal: far above rounding


@dataclass(frozen=True)
class FeatureSpace:
    """Where samples are compared.

    `embed` maps latents or images [B, ...] to features [B, D]; `classify`, where the space has a notion of labels,
    maps features [B, D] float64 to labels [B]. Neither sees more than `batch` samples at a time.
    """

    name: str
    embed: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    batch: int = 1024

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[N, ...] -> features [N, D], float64, on the device that `embed` leaves them on.

        Raises ValueError where `embed` returns anything but one vector per sample.
        """
        parts = []
        for i in trange(0, len(x), self.batch, desc=self.name, unit="batch", delay=5, leave=False):
            part = x[i : i + self.batch]
            found = self.embed(part)
            if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(part):
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"feature space {self.name}: {list(part.shape)} gave {shape}, expected [{len(part)}, D]; "
                    "let the network return one vector per sample"
                )
            parts.append(found.double())
        if not parts:
            raise ValueError(f"feature space {self.name}: no samples in {list(x.shape)}")
        return torch.cat(parts)

    @torch.no_grad()
    def labels(self, features: Tensor) -> Tensor:
        """Features [N, D] -> the most likely labels [N]. Raises ValueError where the space has no labels."""
        if self.classify is None:
            raise ValueError(f"feature space {self.name} has no label classifier")
        return torch.cat([self.classify(part) for part in features.split(self.batch)])


@dataclass(frozen=True)
class Quality:
    """How close samples are to the real data."""

    frechet_distance: float  # squared, in units of the features; 0 = the same mean and covariance
    precision: float  # share of samples inside the real data's manifold
    recall: float  # share of the real data inside the samples' manifold
    diversity: float  # mean distance between samples of one condition over that of the real data
    accuracy: float | None = None  # share of samples that the space takes for what was asked for


# ---------------------------------------------------------------- metrics


def evaluate(
    samples: Tensor,
    real: Tensor,
    space: FeatureSpace,
    *,
    neighbours: int = 3,
    labels: Tensor | None = None,
    real_labels: Tensor | None = None,
) -> Quality:
    """Samples [M, ...] against real data [N, ...]; to embed the real data only once, see `compare`.

    labels [M] are the conditions asked for and real_labels [N] those of the real data, integers: with them,
    diversity is taken within each condition, and accuracy where the space has a classifier. Raises ValueError.
    """
    return compare(
        space(samples), space(real), neighbours=neighbours, labels=labels, real_labels=real_labels, space=space
    )


def compare(
    fake: Tensor,
    real: Tensor,
    *,
    neighbours: int = 3,
    labels: Tensor | None = None,
    real_labels: Tensor | None = None,
    space: FeatureSpace | None = None,
) -> Quality:
    """`evaluate` from features: samples [M, D] against real data [N, D]; accuracy if their space is given."""
    precision, recall = precision_recall(real, fake, neighbours)
    quality = Quality(frechet_distance(real, fake), precision, recall, diversity(fake, real, labels, real_labels))
    if labels is None or space is None or space.classify is None:
        return quality
    right = space.labels(fake) == labels.to(fake.device)
    return replace(quality, accuracy=right.double().mean().item())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to features a [N, D] and b [M, D].

    Heusel et al. 2017 (arXiv 1706.08500). With A = R_a' R_a and B = R_b' R_b from QR of the centred features, the
    trace of (A B)^1/2 is the sum of the singular values of R_a R_b': no root of a rounding error is taken where a
    covariance is singular. The figure is biased upwards for few samples: compare at equal N and M only.
    """
    a, b = checked(a, b)
    mean = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = covariance_root(a), covariance_root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return (mean + root_a.square().sum() + root_b.square().sum() - 2 * cross).item()


def covariance_root(x: Tensor) -> Tensor:
    """R [min(N, D), D] with R' R the unbiased covariance of x [N, D]."""
    return torch.linalg.qr(x - x.mean(0), mode="r").R / sqrt(len(x) - 1)


def precision_recall(
    real: Tensor, fake: Tensor, neighbours: int, *, block_bytes: int = BLOCK_BYTES
) -> tuple[float, float]:
    """Shares of fake [M, D] covered by real [N, D], and the reverse.

    Kynkaanniemi et al. 2019 (arXiv 1904.06991): a set covers a point that is no further from one of its members
    than that member's k-th nearest neighbour in the set. k = `neighbours`, 3 in the paper.
    """
    real, fake = checked(real, fake)
    if not 1 <= neighbours < min(len(real), len(fake)):
        raise ValueError(
            f"{neighbours} neighbours among {len(real)} real and {len(fake)} samples: expected at least 1, and "
            "more real data and samples than neighbours"
        )

    def reach(x: Tensor) -> Tensor:
        """Squared distance to the k-th neighbour [N]; the nearest of k + 1 is the point itself."""
        blocks = squared_distances(x, x, block_bytes)
        return (1 + TIE) * torch.cat([d.topk(neighbours + 1, largest=False).values[:, -1] for _, d in blocks])

    reach_real, reach_fake = reach(real), reach(fake)
    inside = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, d in squared_distances(real, fake, block_bytes):
        inside |= (d <= reach_real[rows, None]).any(0)
        covered[rows] = (d <= reach_fake).any(1)
    return inside.double().mean().item(), covered.double().mean().item()


def diversity(
    fake: Tensor,
    real: Tensor,
    groups_fake: Tensor | None = None,
    groups_real: Tensor | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> float:
    """Mean distance of two samples of one condition over the same of the real data: 1 = as diverse, 0 = collapsed.

    Features [M, D] and [N, D], conditions [M] and [N] (labels or prompt numbers). Over all pairs of distinct
    samples of a condition, then over the conditions of the samples, each counting the same; without conditions
    over all pairs. Distances between outputs for one input are the measure of Zhu et al. 2017 (arXiv 1711.11586),
    who also report that of real data; dividing by it is what makes figures of different spaces comparable. The
    two means are free of bias in the number of samples. Bad samples far from the data raise the figure: read it
    beside precision.

    Raises ValueError where a condition has fewer than two samples or real images, or the real data no spread.
    """
    fake, real = checked(fake, real)
    if (groups_fake is None) != (groups_real is None):
        raise ValueError("conditions are known of the samples or of the real data alone; give both or neither")
    if groups_fake is None or groups_real is None:
        of_fake, of_real = mean_distance(fake, block_bytes), mean_distance(real, block_bytes)
    else:
        fake_parts, real_parts = by_condition(fake, real, groups_fake, groups_real)
        of_fake = fmean(mean_distance(part, block_bytes) for part in fake_parts)
        of_real = fmean(mean_distance(part, block_bytes) for part in real_parts)
    if of_real == 0:
        raise ValueError("the real data are all the same in this feature space: diversity has nothing to compare with")
    return of_fake / of_real


# ---------------------------------------------------------------- distances


def squared_distances(a: Tensor, b: Tensor, block_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a, and their squared distances to all of b [rows, M]; a [N, D] and b [M, D] are float64.

    |x|^2 + |y|^2 - 2 x.y, around the mean of b: a matrix product, ten times faster than differences at 2048 features.
    What is below the rounding error of this sum is set to zero, so that equal points are at distance zero.
    """
    centre = b.mean(0)
    a, b = a - centre, b - centre
    a_norm, b_norm = a.square().sum(1), b.square().sum(1)
    rounding = 4 * max(16, a.shape[1]) * torch.finfo(a.dtype).eps  # of a dot product, relative to |x|^2 + |y|^2
    rows = max(1, block_bytes // (8 * len(b)))
    for start in range(0, len(a), rows):
        part = slice(start, min(start + rows, len(a)))
        size = a_norm[part, None] + b_norm
        d = torch.addmm(size, a[part], b.T, alpha=-2)
        yield part, d.masked_fill_(d <= size.mul_(rounding), 0)


def mean_distance(x: Tensor, block_bytes: int = BLOCK_BYTES) -> float:
    """Mean distance of two distinct rows of x [N, D], N at least 2."""
    total = torch.stack([d.sqrt_().sum() for _, d in squared_distances(x, x, block_bytes)]).sum().item()
    return total / (len(x) * (len(x) - 1))


def by_condition(
    fake: Tensor, real: Tensor, groups_fake: Tensor, groups_real: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of each condition that samples were asked for, of the samples and of the real data."""
    groups_fake, groups_real = groups_fake.to(fake.device), groups_real.to(fake.device)
    for name, x, groups in (("samples", fake, groups_fake), ("real data", real, groups_real)):
        if groups.shape != (len(x),):
            raise ValueError(f"conditions of the {name} are {list(groups.shape)}, expected [{len(x)}]")
    conditions = groups_fake.unique().tolist()
    fake_parts = [fake[groups_fake == c] for c in conditions]
    real_parts = [real[groups_real == c] for c in conditions]
    few = [
        f"{c} ({len(f)}, {len(r)})" for c, f, r in zip(conditions, fake_parts, real_parts) if min(len(f), len(r)) < 2
    ]
    if few:
        raise ValueError(
            f"{len(few)} of {len(conditions)} conditions have fewer than two samples or real images: "
            f"{', '.join(few[:8])}{', ...' if few[8:] else ''} as condition (samples, real); draw more of each, or "
            "leave the conditions out to measure over everything"
        )
    return fake_parts, real_parts


def checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Features as float64. Raises ValueError unless they are [N, D] and [M, D], N and M at least 2, all finite."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features {list(a.shape)} and {list(b.shape)}: expected [N, D] and [M, D], N and M at least 2"
        )
    for x in (a, b):
        broken = (~x.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"features of {len(broken)} of {len(x)} samples are not finite, the first is {broken[0]}")
    return a.double(), b.double()


# ---------------------------------------------------------------- several seeds


@dataclass(frozen=True)
class Spread:
    """A figure over n independent seeds: its mean, and half the width of the mean's 95 % confidence interval."""

    mean: float
    half_width: float  # nan where n = 1
    n: int

    def format(self, digits: int = 2) -> str:
        """`3.98 ± 0.12`; one seed alone says nothing about the spread: `3.98 ± -`."""
        half = f"{self.half_width:.{digits}f}" if self.n > 1 else "-"
        return f"{self.mean:.{digits}f} ± {half:<{digits + 2}}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and t(0.975, n - 1) s / sqrt(n), Student's t interval; s is the sample standard deviation."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    half_width = float(stdtrit(n - 1, 0.975)) * stdev(values) / sqrt(n) if n > 1 else nan
    return Spread(fmean(values), half_width, n)


def summary(qualities: Sequence[Quality]) -> dict[str, Spread]:
    """Each metric over the seeds, by the name of Quality's field; metrics that no seed has are left out.

    Raises ValueError without seeds, or where only some of them have a metric.
    """
    result = {}
    for field in fields(Quality):
        values = [getattr(q, field.name) for q in qualities]
        known = [v for v in values if v is not None]
        if values and not known:
            continue
        if len(known) != len(values):
            raise ValueError(f"{len(known)} of {len(values)} seeds have {field.name}: evaluate all in one space")
        result[field.name] = spread(known)
    return result


def table(rows: Mapping[str, Sequence[Quality]], digits: int = 2) -> str:
    """Text: a line per name, a column per metric, `mean ± half width` of the 95 % interval over its n seeds."""
    summaries = {name: summary(qualities) for name, qualities in rows.items()}
    metrics = [f.name for f in fields(Quality) if any(f.name in s for s in summaries.values())]
    lines = [["sampler", "n", *(m.replace("_", " ") for m in metrics)]]
    for name, of in summaries.items():
        cells = [of[m].format(digits) if m in of else "-".ljust(digits + 2) for m in metrics]
        lines.append([name, str(len(rows[name])), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join(
        [*text, "", "mean ± half width of the 95 % confidence interval of the mean over n seeds (Student's t)"]
    )
