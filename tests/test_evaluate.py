"""Metrics against closed forms and direct sums; intervals against scipy's; feature spaces; the table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from jvpgraph.trainer.data.digits import digits
from jvpgraph.trainer.evaluation.distances import (
    FeatureSpace,
    Quality,
    compare,
    diversity,
    evaluate,
    frechet_distance,
    mean_distance,
    precision_recall,
    spread,
    squared_distances,
    summary,
    table,
)
from jvpgraph.trainer.evaluation.features import digits_classifier, pixels, torchscript, trained_classifier

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# ---------------------------------------------------------------- Frechet distance


def with_moments(mean: Tensor, std: Tensor) -> Tensor:
    """2000 points [2000, D] with exactly this mean and a diagonal covariance."""
    x = normal(2000, len(mean), seed=27)
    x = x - x.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))
    return (x @ whitening.T) * std + mean


def test_frechet_distance_of_known_gaussians() -> None:
    mean_a, mean_b = torch.tensor([[0.0, 1.0, -2.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]], dtype=torch.float64)
    a, b = with_moments(mean_a, std_a), with_moments(mean_b, std_b)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)

    rotation = torch.linalg.qr(normal(3, 3, seed=28)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    a, b = normal(500, 4, seed=1) @ normal(4, 4, seed=2), 1 + normal(300, 4, seed=3) @ normal(4, 4, seed=4)
    product = scipy.linalg.sqrtm((torch.cov(a.T) @ torch.cov(b.T)).numpy())
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item() - 2 * product.trace().real, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    a = normal(5, 20, seed=5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + 1) == pytest.approx(20, rel=1e-9)
    assert frechet_distance(a[:, :1], 3 * a[:, :1]) == pytest.approx(  # one feature
        4 * (a[:, 0].mean().square() + a[:, 0].var()).item(), rel=1e-9
    )


# ---------------------------------------------------------------- precision and recall


def test_precision_and_recall_tell_poor_quality_from_poor_coverage() -> None:
    left, right = normal(200, 4, seed=29), normal(200, 4, seed=30) + 100
    assert precision_recall(left, left, 3) == (1.0, 1.0)
    assert precision_recall(left, right, 3) == (0.0, 0.0)
    precision, recall = precision_recall(torch.cat([left, right]), left, 3)
    assert (precision, recall) == (1.0, 0.5)
    precision, recall = precision_recall(left, torch.cat([left, right]), 3)
    assert (precision, recall) == (0.5, 1.0)


def test_precision_and_recall_of_five_points_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0]])  # nearest neighbours at 1, 1, 2
    fake = torch.tensor([[-1.0], [2.5], [9.0]])  # at 3.5, 3.5, 6.5
    assert precision_recall(real, fake, 1) == pytest.approx((2 / 3, 1.0))
    assert precision_recall(real, torch.tensor([[5.1], [5.2]]), 1) == (0.0, 0.0)
    assert precision_recall(real, torch.tensor([[5.0], [5.2]]), 1) == (0.5, 0.0)  # on the border counts


def direct_precision_recall(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """By definition, from the whole matrices of differences."""

    def covered(points: Tensor, by: Tensor) -> float:
        reach = (by[:, None] - by).norm(dim=-1).sort(1).values[:, k]
        return ((points[:, None] - by).norm(dim=-1) <= reach).any(1).double().mean().item()

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_blocks_equal_the_direct_sums(rows: int) -> None:
    real, fake = 50 + normal(150, 6, seed=6), 50.9 + 1.1 * normal(113, 6, seed=7)
    blocks = {"block_bytes": rows * 8 * len(fake)}
    expected = direct_precision_recall(real, fake, 3)
    assert 0.1 < min(expected) <= max(expected) < 0.99
    assert precision_recall(real, fake, 3, **blocks) == expected
    assert mean_distance(fake, **blocks) == pytest.approx(torch.pdist(fake).mean().item(), rel=1e-12)

    whole = torch.cat([d for _, d in squared_distances(real, fake, **blocks)])
    torch.testing.assert_close(whole, (real[:, None] - fake).square().sum(-1), rtol=1e-11, atol=0)


def test_equal_points_are_at_distance_zero_wherever_they_are() -> None:
    x = 1e4 + normal(60, 300, seed=8)
    ((_, d),) = squared_distances(x, torch.cat([x[:30], x]), 2**20)
    assert d[torch.arange(60), torch.arange(30, 90)].eq(0).all()
    assert d.eq(0).sum() == 90
    copies = x[[0] * 30 + [1] * 30]  # all neighbours are copies: only equality covers
    assert precision_recall(x, copies, 3) == (1.0, 2 / 60)


# ---------------------------------------------------------------- diversity


def classes(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """[10 count, 8] around ten centres far apart, and the centre's number [10 count]."""
    labels = torch.arange(10).repeat_interleave(count)
    return 20 * normal(10, 8, seed=31)[labels] + normal(10 * count, 8, seed=seed), labels


def test_two_halves_of_the_data_are_as_diverse_as_each_other() -> None:
    (a, labels_a), (b, labels_b) = classes(100, seed=9), classes(60, seed=10)
    assert diversity(a, b, labels_a, labels_b) == pytest.approx(1, abs=0.02)
    assert diversity(a, b) == pytest.approx(1, abs=0.02)
    assert diversity(a, a, labels_a, labels_a) == 1


def test_diversity_is_a_ratio_of_mean_distances_within_conditions() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0], [14.0], [50.0]])  # condition 0: 2 on average, 1: 4
    fake = torch.tensor([[0.0], [10.0], [0.5], [11.0]])  # condition 0: 0.5, 1: 1
    labels, real_labels = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 2])
    assert diversity(fake, real, labels, real_labels) == pytest.approx((0.5 + 1) / (2 + 4))
    assert diversity(fake[::2], real, labels[::2], real_labels) == pytest.approx(0.5 / 2)  # 1 and 2 not asked for
    assert diversity(3 * fake, 3 * real) == pytest.approx(diversity(fake, real))


def test_collapsed_samples_have_no_diversity() -> None:
    real, labels = classes(50, seed=11)
    one_point = real[:1].repeat(500, 1)
    assert diversity(one_point, real, labels, labels) == 0
    assert diversity(one_point, real) == 0

    one_point_per_class = real[::50][labels]
    assert diversity(one_point_per_class, real) > 0.9  # the classes still differ
    assert diversity(one_point_per_class, real, labels, labels) == 0

    half = real[::50][labels] + 0.5 * (real - real[::50][labels])
    assert diversity(half, real, labels, labels) == pytest.approx(0.5)


# ---------------------------------------------------------------- feature spaces


def test_a_space_embeds_in_batches_without_gradients() -> None:
    seen = []

    def embed(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x.flatten(1)

    space = FeatureSpace("doubled", embed, lambda f: f[:, 0].round().long(), batch=4)
    x = torch.arange(20, dtype=torch.float32).reshape(10, 2, 1).requires_grad_()
    features = space(x)
    assert seen == [4, 4, 2]
    assert (features.dtype, features.requires_grad) == (torch.float64, False)
    assert torch.equal(features, 2 * x.detach().double().flatten(1))
    assert space.labels(features).tolist() == list(range(0, 40, 4))


def test_pixels_are_flattened_and_pooled() -> None:
    x = normal(3, 2, 5, 4, 6, seed=12)  # a video of latents
    assert torch.equal(pixels()(x), x.flatten(1))
    pooled = x.reshape(3, 2, 5, 2, 2, 3, 2).mean((4, 6)).flatten(1)
    torch.testing.assert_close(pixels(2)(x), pooled)
    with pytest.raises(ValueError, match="divisible by 4"):
        pixels(4)(x)
    with pytest.raises(ValueError, match="at least 1"):
        pixels(0)


@pytest.mark.long
def test_the_classifier_knows_the_digits_and_is_the_same_every_time() -> None:
    data = digits()
    state = torch.get_rng_state()
    space = digits_classifier(seed=1)
    assert torch.equal(torch.get_rng_state(), state)

    result = evaluate(data.x0, data.x0, space, labels=data.labels, real_labels=data.labels)
    assert result.accuracy is not None
    assert result.accuracy > 0.95
    assert result.frechet_distance == pytest.approx(0, abs=1e-9)
    assert (result.precision, result.recall, result.diversity) == (1, 1, 1)
    shifted = evaluate(data.x0, data.x0, space, labels=(data.labels + 1) % 10, real_labels=data.labels)
    assert shifted.accuracy is not None
    assert shifted.accuracy < 0.05
    with pytest.raises(ValueError, match=r"takes images \[N, 1, 8, 8\], not \[4, 1, 9, 9\]"):
        space(torch.zeros(4, 1, 9, 9))

    short = digits_classifier(seed=1, steps=20)
    features = short(data.x0[:9])
    trained_classifier.cache_clear()
    torch.rand(3)
    assert torch.equal(digits_classifier(seed=1, steps=20)(data.x0[:9]), features)
    assert not torch.equal(digits_classifier(seed=2, steps=20)(data.x0[:9]), features)


@pytest.mark.long
def test_blurred_digits_are_worse_and_three_images_of_each_class_less_diverse() -> None:
    data, space = digits(), digits_classifier(seed=1)
    odd, even = slice(1, None, 2), slice(0, None, 2)
    floor = evaluate(data.x0[odd], data.x0[even], space, labels=data.labels[odd], real_labels=data.labels[even])
    blurred = nn.functional.avg_pool2d(data.x0[odd], 3, stride=1, padding=1)
    worse = evaluate(blurred, data.x0[even], space, labels=data.labels[odd], real_labels=data.labels[even])
    assert floor.diversity == pytest.approx(1, abs=0.05)
    assert worse.frechet_distance > 5 * floor.frechet_distance
    assert worse.precision < floor.precision

    first = torch.stack([data.x0[(data.labels == c).nonzero()[:3, 0]] for c in range(10)])  # three images of each
    few = first[data.labels[odd], torch.arange(len(blurred)) % 3]
    narrow = evaluate(few, data.x0[even], space, labels=data.labels[odd], real_labels=data.labels[even])
    assert narrow.diversity < 0.8 * floor.diversity
    assert narrow.recall < 0.5 * floor.recall


# ---------------------------------------------------------------- networks from files


class Network(nn.Module):
    """Images [B, 3, 8, 8] -> [B, 5, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


def saved(network: nn.Module, path: Path) -> Path:
    example = torch.zeros(2, 3, 8, 8)
    if path.suffix == ".pt2":
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
    else:
        torch.jit.save(torch.jit.trace(network, example), path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_network_from_a_file(tmp_path: Path, suffix: str) -> None:
    network = Network().eval()
    space = torchscript(saved(network, tmp_path / f"inception{suffix}"), size=8, batch=4)
    x = torch.randn(10, 3, 8, 8, generator=seeded(13))
    assert space.name == "inception"
    torch.testing.assert_close(space(x), network(x).flatten(1).double())

    large = torch.randn(3, 3, 20, 16, generator=seeded(14))
    small = nn.functional.interpolate(large, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(space(large), network(small).flatten(1).double())

    with pytest.raises(ValueError, match=r"does not take images \[2, 1, 8, 8\]"):
        space(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="frame by frame"):
        space(torch.zeros(2, 3, 5, 8, 8))


@pytest.mark.parametrize("name", ["words.pt", "words.pt2"])
def test_a_file_that_is_no_network(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no feature network at .*{name}"):
        torchscript(tmp_path / name)
    (tmp_path / name).write_text("not a network")
    with pytest.raises(ValueError, match=r"is not a .* file that this torch"):
        torchscript(tmp_path / name)


# ---------------------------------------------------------------- several seeds


def test_half_widths_are_students_interval() -> None:
    values = normal(5, seed=15).tolist()
    low, high = scipy.stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=scipy.stats.sem(values))
    found = spread(values)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-12)
    assert found.n == 5
    assert spread([1.0, 3.0]).half_width == pytest.approx(12.7062047362, rel=1e-9)  # t(0.975, 1), printed tables
    assert math.isnan(spread([2.0]).half_width)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = normal(2000, 3, seed=16).tolist()
    covered = sum(abs(s.mean) <= s.half_width for s in map(spread, draws)) / len(draws)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_the_table_shows_means_and_half_widths() -> None:
    first = Quality(frechet_distance=3.0, precision=0.9, recall=0.8, diversity=1.0)
    second = replace(first, frechet_distance=3.2, recall=0.7)
    assert summary([first, second]).keys() == {"frechet_distance", "precision", "recall", "diversity"}
    assert summary([replace(first, accuracy=0.5)])["accuracy"].mean == 0.5

    text = table({"rCM, 4 steps": [first, second], "teacher": [replace(first, accuracy=0.97)]})
    header, rcm, teacher, _, note = text.splitlines()
    assert header.split() == ["sampler", "n", "frechet", "distance", "precision", "recall", "diversity", "accuracy"]
    assert rcm.split("  ")[0] == "rCM, 4 steps"
    assert "2  " in rcm
    assert "3.10 ± 1.27" in rcm
    assert rcm.endswith("-")  # no accuracy
    assert "3.00 ± -" in teacher
    assert "0.97 ± -" in teacher
    assert "95 %" in note
    assert max(map(len, text.splitlines())) <= 120
    assert "accuracy" not in table({"rCM": [first]})


# ---------------------------------------------------------------- errors


def test_errors_say_what_is_wrong() -> None:
    x, labels = normal(10, 3, seed=17), torch.arange(10) % 5
    broken = x.clone()
    broken[[4, 7], 1] = math.nan
    for metric in (frechet_distance, diversity, compare):
        with pytest.raises(ValueError, match="2 of 10 samples are not finite, the first is 4"):
            metric(broken, x)
    with pytest.raises(ValueError, match=r"\[10, 3\] and \[10, 2\]"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="at least 2"):
        compare(x[:1], x)
    with pytest.raises(ValueError, match="10 neighbours among 10 real"):
        precision_recall(x, x, 10)
    with pytest.raises(ValueError, match="both or neither"):
        compare(x, x, labels=labels)
    with pytest.raises(ValueError, match=r"samples are \[9\], expected \[10\]"):
        diversity(x, x, labels[:9], labels)
    with pytest.raises(ValueError, match=r"2 of 5 conditions .* 3 \(2, 1\), 4 \(2, 1\)"):
        diversity(x, x[:8], labels, labels[:8])
    with pytest.raises(ValueError, match="nothing to compare"):
        diversity(x, torch.ones(4, 3))
    with pytest.raises(ValueError, match="no label classifier"):
        pixels().labels(x)
    with pytest.raises(ValueError, match="no samples"):
        pixels()(x[:0])
    with pytest.raises(ValueError, match=r"sums: \[10, 3\] gave \[10\], expected \[10, D\]"):
        FeatureSpace("sums", lambda x: x.sum(1))(x)
    with pytest.raises(ValueError, match="1 of 2 seeds have accuracy"):
        summary([Quality(1, 1, 1, 1), Quality(1, 1, 1, 1, 1)])
    with pytest.raises(ValueError, match="no values"):
        summary([])
