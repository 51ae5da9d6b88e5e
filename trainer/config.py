"""Settings of the demo: one frozen dataclass per part, each field with its unit and its source."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class DiTConfig:
    """The class-conditional diffusion transformer (Peebles & Xie 2023), at the size of an 8x8 image."""

    image_size: int = 8  # pixels per side
    patch_size: int = 2  # pixels per side: 16 tokens
    width: int = 96  # channels of a token
    depth: int = 4  # blocks
    heads: int = 4
    mlp_ratio: int = 4  # DiT
    classes: int = 10  # label `classes` (10) stands for "no label"
    max_frequency: float = 64.0  # rad per unit of s; low, so that dF/dt stays tame (sCM, section 4.1)


@dataclass(frozen=True)
class ClassifierConfig:
    """The small classifier whose penultimate layer is the feature space of every metric."""

    features: int = 64
    steps: int = 400
    batch: int = 128  # images
    lr: float = 2e-3


@dataclass(frozen=True)
class TeacherConfig:
    """Rectified flow with classifier-free guidance: what is distilled."""

    steps: int = 2500
    batch: int = 64  # images
    lr: float = 2e-3
    lr_warmup: int = 100  # steps of linear rise; cosine to zero afterwards
    weight_decay: float = 0.01
    label_dropout: float = 0.1  # share of labels replaced by "no label" (Ho & Salimans 2022)
    time_mean: float = 0.0  # logit-normal times (SD3): s = sigmoid(mean + std * normal)
    time_std: float = 1.0
    ema_sigma_rel: float = 0.05  # width of the power-function EMA as a share of the run (Karras et al. 2024)
    euler_steps: int = 50  # of the reference sampler
    guidance: float = 1.25  # more moves this teacher away from the data (distance 7 -> 17 at 1.5)


@dataclass(frozen=True)
class DistillConfig:
    """rCM: the sCM loss plus `dmd_weight` times the score regulariser (arXiv 2510.08431)."""

    steps: int = 600  # student updates
    batch: int = 64  # images
    lr: float = 3e-4  # student
    lr_fake: float = 3e-4  # fake score
    betas: tuple[float, float] = (0.0, 0.999)  # both optimisers; the paper
    weight_decay: float = 0.01  # the paper
    clip_norm: float | None = None  # L2 norm of all gradients; the paper advises against clipping
    tangent_warmup: int = 50  # student updates until r = 1; until then sCM alone
    tangent_floor: float = 0.1  # c in g / (||g|| + c); sCM
    dmd_weight: float = 0.01  # lambda; the paper's best
    fake_updates: int = 2  # fake-score updates after each student update; 4 in the paper at 1.3B
    simulation_steps: int = 4  # backward simulation cycles through 1..simulation_steps steps
    scm_log_sigma_mean: float = -0.4  # p_G: tan t is log-normal
    scm_log_sigma_std: float = 1.6
    dmd_time_shift: float = 1.0  # p_D: shifted uniform rectified-flow time; 5 in the paper, for video
    ema_sigma_rel: float = 0.1  # the paper's code


@dataclass(frozen=True)
class FewStepConfig:
    """Times of the consistency sampler, in radians of TrigFlow."""

    sigma_max: float = 80.0  # the first time is atan(sigma_max)
    middle_times: tuple[float, ...] = (1.3, 1.0, 0.6)  # n steps use the first n - 1; the paper
    steps: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True)
class DemoConfig:
    """The whole demo, from training the classifier to the table."""

    seed: int = 0
    model: DiTConfig = field(default_factory=DiTConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    few_step: FewStepConfig = field(default_factory=FewStepConfig)
    samples: int = 1797  # images per sampler: as many as there are real ones
    sampling_batch: int = 200  # images at a time; the median batch gives the time per image
    neighbours: int = 3  # k of the precision and recall manifolds (Kynkaanniemi et al. 2019)
    log_every: int = 25  # steps between looks at the losses
    out: Path = Path("out/demo")

    def quick(self) -> DemoConfig:
        """The same path with a tiny network and a few steps: shows that it runs, not that it learns."""
        return replace(
            self,
            model=replace(self.model, width=16, depth=1, heads=2),
            classifier=replace(self.classifier, steps=40),
            teacher=replace(self.teacher, steps=20, batch=32, lr_warmup=5, euler_steps=6),
            distill=replace(self.distill, steps=6, batch=16, tangent_warmup=2, fake_updates=1),
            samples=200,
            sampling_batch=100,
            log_every=2,
        )
