"""What a case of the zoo is, and the helpers its definition needs.

A case is a function named like the model class. It draws the forward's keyword arguments for variant 0 or 1;
the decorator carries the constructor's arguments:

    @case("dit", num_layers=2, num_attention_heads=2, ...)
    def DiTTransformer2DModel(draw, variant):
        B, H = pick(variant, (2, 8), (3, 4))
        return {"hidden_states": draw.normal(B, 4, H, H), "timestep": draw.time(B), ...}
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "diffusers.models.transformers"

# What the models themselves warn about in float64 on a CPU, for pytest.mark.filterwarnings.
QUIET = (
    "ignore:.* is deprecated and will be removed in version:FutureWarning",
    "ignore:Mismatch dtype between input and weight:UserWarning",
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:`torch.jit.script:DeprecationWarning",
    "ignore:_compile flag on create_block_mask:DeprecationWarning",
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
)
CASES: dict[str, "Case"] = {}


class Draw:
    """Seeded random inputs, all in float64."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def time(self, *shape: int, high: float = 1000.0) -> Tensor:
        """Uniform in (0.1, 0.9) * high: away from both ends, where schedules and embeddings are special."""
        return high * (0.1 + 0.8 * torch.rand(shape, generator=self.generator, dtype=torch.float64))

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def pick(variant: int, first: Any, second: Any) -> Any:
    """Of sizes, batch first, or of lengths of each sample. Variant 2 is the second's batch with the first's sizes."""
    if variant < 2:
        return (first, second)[variant]
    sizes = isinstance(first, tuple) and len(first) == len(second) and all(isinstance(n, int) for n in first)
    return (second[0], *first[1:]) if sizes else second


def padding(length: int, *valid: int) -> Tensor:
    """A boolean key mask (B, length) whose row b has valid[b] leading True."""
    return torch.arange(length)[None] < torch.tensor(valid)[:, None]


def grid_ids(*sizes: int) -> Tensor:
    """Position ids (T*H*W, 3) of a patch grid, float64; two sizes mean one frame."""
    axes = [torch.arange(n, dtype=torch.float64) for n in ((1,) * (3 - len(sizes)) + sizes)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@functools.cache
def modules() -> dict[str, str]:
    """Class name -> module for all classes of diffusers.models.transformers; imports none of them."""
    root = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    return {
        node.name: f"{PACKAGE}.{file.stem}"
        for file in sorted(root.glob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


def model_class(name: str) -> type[nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that diffusers imports
        return getattr(importlib.import_module(modules()[name]), name)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every constant or unset parameter small random values: no gate stays closed.

    Matrices become normal with std fan_in**-0.5; vectors (biases, norm weights) keep their constant and get
    noise of 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        unset = not p.isfinite().all()
        if unset or p.numel() == 1 or (p == p.flatten()[0]).all():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() >= 2 and max(p.shape[:-1]) > 1:
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_((0.0 if unset else p) + 0.1 * noise)


class Cast(nn.Module):
    """A linear layer that takes its input in any dtype."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@dataclass(frozen=True)
class Case:
    """One model class: how to build it, how to call it, and which of its inputs carry a tangent.

    Attributes:
        name: the class name in diffusers.
        family: models that share blocks share a family.
        config: the constructor's arguments.
        draw: (Draw, variant) -> the forward's keyword arguments.
        tangents: paths into those arguments: "timestep", or "x.0" for an item of a list.
        note: what is peculiar about the model.
        cast: linear layers that the model feeds with float32 whatever its dtype; they get a cast in front.
        tolerance: how far, relative to the largest element, two right evaluations of the tangent may differ,
            because even a float64 model computes sines of times and rotary factors in float32.
        prepare: what else the model needs once built.
    """

    name: str
    family: str
    config: dict[str, Any]
    draw: Callable[[Draw, int], dict[str, Any]]
    tangents: tuple[str, ...]
    note: str = ""
    cast: tuple[str, ...] = ()
    tolerance: float = 2e-4
    prepare: Callable[[nn.Module], None] = lambda model: None

    def build(self, seed: int = 0) -> nn.Module:
        """A float64 model in eval mode; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.use_deterministic_algorithms(True)  # fills torch.empty parameters with NaN, see randomise
            try:
                model = model_class(self.name)(**self.config)
            finally:
                torch.use_deterministic_algorithms(False)
        model = model.double().eval()
        randomise(model, seed)
        for name in self.cast:
            model.set_submodule(name, Cast(model.get_submodule(name)))
        self.prepare(model)
        return model

    def inputs(self, variant: int = 0, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for forward, which returns a plain tuple; variants 0 and 1 differ in every size."""
        kwargs = self.draw(Draw(1000 * seed + variant), variant)
        takes_flag = "return_dict" in inspect.signature(model_class(self.name).forward).parameters
        return kwargs | ({"return_dict": False} if takes_flag else {})


def case(
    family: str,
    *,
    tangents: tuple[str, ...] = ("hidden_states", "timestep"),
    note: str = "",
    cast: tuple[str, ...] = (),
    tolerance: float = 2e-4,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    **config: Any,
) -> Callable[[Callable], Callable]:
    """Register the decorated function as the case of the class it is named after."""

    def register(draw: Callable[[Draw, int], dict[str, Any]]) -> Callable:
        name = draw.__name__
        assert name not in CASES or CASES[name].draw.__module__ != draw.__module__, f"{name} is defined twice"
        CASES[name] = Case(name, family, config, draw, tangents, note, cast, tolerance, prepare)
        return draw

    return register
