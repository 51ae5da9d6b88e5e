"""Settings: strict types, every problem at once with its place, exact round trips, documentation from comments."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import PydanticUserError

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.plug import Plug, PlugError, PlugFailed
from jvpgraph.trainer.settings import (
    SettingsError,
    Variants,
    comments,
    describe,
    differences,
    from_dict,
    load,
    save,
    to_dict,
)


@dataclass(frozen=True)
class Shape(Variants):
    """Base of shapes."""


@dataclass(frozen=True)
class Circle(Shape):
    """Round."""

    name: ClassVar[str] = "circle"
    radius: float = 1.0  # metres; from the paper


@dataclass(frozen=True)
class Box(Shape):
    """Not round."""

    name: ClassVar[str] = "box"
    sides: tuple[float, float] = (1.0, 2.0)  # metres
    inner: Circle = field(default_factory=Circle)  # what it holds


@dataclass(frozen=True)
class Ring(Circle):
    """A hole in it."""

    name: ClassVar[str] = "ring"
    width: float = 0.5

    def __post_init__(self) -> None:
        if self.width >= self.radius:
            raise ValueError(f"width {self.width} is not below radius {self.radius}")


@dataclass(frozen=True)
class Stage:
    steps: int  # updates
    shape: Shape = field(default_factory=Circle)  # of the stage
    lr: float = 1e-3


@dataclass(frozen=True)
class Settings:
    out: Path  # a folder
    stages: tuple[Stage, ...] = (Stage(5),)  # in a row
    flag: bool = False
    seed: int = 0
    rate: float = 1e-4  # per step
    label: str = "x"
    clip: float | None = None
    mode: Literal["fast", "slow", 3] = "fast"
    times: list[float] = field(default_factory=lambda: [1.5])
    weights: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    either: int | str = 0
    shape: Shape = field(
        default_factory=lambda: Ring(radius=4.0)  # default in the middle
    )
    maybe: Stage | None = None
    hidden: int = field(default=7, init=False)


def problems_of(data: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(SettingsError) as caught:
        from_dict(Settings, {"out": "o", **data})
    return {problem.path: problem.message for problem in caught.value.problems}


# ---- types


@pytest.mark.parametrize(
    ("key", "given_value", "expected"),
    [
        ("flag", True, True),
        ("seed", -3, -3),
        ("rate", 2, 2.0),
        ("rate", math.inf, math.inf),
        ("clip", None, None),
        ("clip", 1, 1.0),
        ("mode", 3, 3),
        ("times", [1, 2.5], [1.0, 2.5]),
        ("weights", {"a": 1}, {"a": 1.0}),
        ("options", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        ("either", 3, 3),
        ("either", "3", "3"),
        ("shape", "box", Box()),
        ("shape", {"name": "ring", "width": 0.25}, Ring(width=0.25)),
        ("shape", {"width": 0.25}, Ring(radius=4.0, width=0.25)),  # the default's kind and values
        ("shape", {"name": "box", "inner": {"radius": 3}}, Box(inner=Circle(3.0))),
        ("maybe", {"steps": 2, "shape": "box"}, Stage(2, Box())),
        ("stages", [], ()),
    ],
)
def test_values_that_fit(key, given_value, expected):
    found = getattr(from_dict(Settings, {"out": "o", key: given_value}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "given_value", "message"),
    [
        ("flag", 1, "expected bool, got 1"),
        ("flag", "yes", "expected bool, got 'yes'"),
        ("seed", "3", "expected int, got '3'"),
        ("seed", True, "expected int, got true"),
        ("seed", 3.0, "expected int, got 3.0"),
        ("seed", None, "expected int, got null"),
        ("rate", True, "expected float, got true"),
        ("rate", "fast", "expected float, got 'fast'"),
        ("rate", math.nan, "expected float, got .nan"),
        ("label", 3, "expected text, got 3"),
        ("out", 3, "expected path, got 3"),
        ("out", "", "expected path, got ''"),
        ("clip", "a", "expected float | null, got 'a'"),
        ("mode", "fats", "expected fast | slow | 3, got 'fats'; did you mean 'fast'?"),
        ("times", 3, "expected [float, ...], got 3"),
        ("weights", [1], "expected {key: float}, got [1]"),
        ("either", 1.5, "expected int | text, got 1.5"),
        ("shape", 3, "expected one of circle, ring, box, or a mapping with the key name, got 3"),
        ("stages", {"steps": 3}, "expected [Stage, ...], got {steps: 3}"),
        ("maybe", 3, "expected a mapping | null, got 3"),
    ],
)
def test_values_that_do_not_fit(key, given_value, message):
    assert problems_of({key: given_value}) == {key: message}


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ({"shape": {"name": "rng"}}, "shape.name", "expected one of circle, ring, box, got 'rng'"),
        ({"stages": [{"steps": 1, "shape": {}}, {}]}, "stages.1.steps", "missing; expected int"),
        ({"stages": [{"steps": 1, "stepz": 2}]}, "stages.0.stepz", "unknown key; did you mean 'steps'?"),
        ({"shape": {"name": "box", "sides": [1]}}, "shape.sides", "expected [float, float], got [1]"),
        ({"shape": {"name": "box", "sides": [1, "a"]}}, "shape.sides.1", "expected float, got 'a'"),
        ({"shape": {"name": "ring", "width": 2}}, "shape", "width 2.0 is not below radius 1.0"),
        ({"maybe": {"steps": 1, "lr": "a"}}, "maybe.lr", "expected float, got 'a'"),
        ({"hidden": 3}, "hidden", None),
    ],
)  # fmt: skip
def test_values_inside_that_do_not_fit(data, path, message):
    found = problems_of(data)
    assert list(found) == [path]
    assert message is None or found[path].startswith(message)


def test_a_kind_without_name_and_default_is_an_error():
    @dataclass(frozen=True)
    class Bare:
        shape: Shape

    Bare.__annotations__["shape"] = Shape
    with pytest.raises(SettingsError, match=r"shape\.name: missing; one of circle, ring, box"):
        from_dict(Bare, {"shape": {"radius": 1}})


def test_an_unsupported_field_type_is_a_bug():
    @dataclass(frozen=True)
    class Odd:
        x: io.StringIO

    with pytest.raises(PydanticUserError, match="StringIO"):
        from_dict(Odd, {"x": 1})


@dataclass(frozen=True)
class Pile(Variants):
    """Kinds that hold kinds of their own family."""

    name: ClassVar[str] = "pile"
    parts: tuple[Pile, ...] = ()
    inner: Circle | None = None


def test_a_kind_may_hold_its_own_family_and_a_subclass():
    inner = {"name": "ring", "radius": 3}  # where the field says Circle
    found = from_dict(Pile, {"parts": [{"parts": ["pile", {"inner": inner}]}], "inner": "circle"})
    assert found == Pile((Pile((Pile(), Pile(inner=Ring(3.0)))),), Circle())
    with pytest.raises(
        SettingsError, match=r"1 problem.*\n.*parts\.0\.parts\.0\.inner\.radius: expected float, got 'a'"
    ):
        from_dict(Pile, {"parts": [{"parts": [{"inner": {"name": "circle", "radius": "a"}}]}]})


# ---- files


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_all_problems_of_a_file_at_once(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "out: o\nseed: '3'\nstages:\n- steps: 3\n- stepz: 4\n  shape:\n    name: rnig\n"
        "seed: 4\nflag: on\nrates: 1e-4\n",
    )
    with pytest.raises(SettingsError) as caught:
        load(Settings, file, ["clip=a", "nonsense", "stages.7.steps=1"])
    error = caught.value
    assert {(problem.place, problem.path) for problem in error.problems} == {
        (f"{file}:8", "seed"),  # given twice
        (f"{file}:2", "seed"),  # not an integer
        (f"{file}:5", "stages.1.steps"),
        (f"{file}:5", "stages.1.stepz"),
        (f"{file}:7", "stages.1.shape.name"),
        (f"{file}:9", "flag"),
        (f"{file}:10", "rates"),
        ("override clip=a", "clip"),
        ("override nonsense", ""),
        ("override stages.7.steps=1", "stages"),
    }
    assert str(error).startswith("10 problems in the settings\n")
    assert f"{file}:8  seed: given twice; the first one is at {file}:2" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_scalars_follow_yaml_1_2(tmp_path):
    text = (
        "out: o\nrate: 1e-4\nseed: 1_000\nlabel: yes\noptions: {a: 010, b: 1:30, c: 2001-01-01, d: ~, on: 1, e: 0x10}\n"
    )
    config = load(Settings, write(tmp_path / "a.yaml", text))
    assert (config.rate, config.seed, config.label) == (1e-4, 1000, "yes")
    assert config.options == {"a": "010", "b": "1:30", "c": "2001-01-01", "d": None, "on": 1, "e": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: [1", "a.yaml:1  not YAML"),
        ("out: o\n\tseed: 3", "a.yaml:2  not YAML"),
        ("- 1", "expected a mapping of settings, got [1]"),
        ("just text", "expected a mapping of settings, got 'just text'"),
        ("? [a]\n: 3\nout: o", "a key must be text"),
        ("out: !python/name:os.system o", "unknown tag"),
        ("out: &a [*a]", "an alias inside of its own anchor"),
        ("", "out: missing; expected path"),
        ("out: o\noptions: {<<: 3}", "expected a mapping or list of mappings for merging"),
    ],
)
def test_files_that_are_not_settings(tmp_path, text, message):
    with pytest.raises(SettingsError) as caught:
        load(Settings, write(tmp_path / "a.yaml", text))
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_missing_file_names_those_that_exist(tmp_path):
    write(tmp_path / "digits.yaml", "")
    with pytest.raises(SettingsError, match=r"no such file; there is .*digits\.yaml"):
        load(Settings, tmp_path / "digit.yaml")
    with pytest.raises(SettingsError, match="is a folder"):
        load(Settings, tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"out: \xff")
    with pytest.raises(SettingsError, match="not a YAML file"):
        load(Settings, tmp_path / "b.yaml")


def test_anchors_and_merge_keys(tmp_path):
    text = "out: o\nstages:\n- &first {steps: 1, lr: 0.5}\n- {<<: *first, steps: 2}\n"
    assert load(Settings, write(tmp_path / "a.yaml", text)).stages == (Stage(1, lr=0.5), Stage(2, lr=0.5))


def test_a_file_changes_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/root.yaml", "out: o\nseed: 9\nlabel: box\nshape: {name: ring, radius: 3}\ntimes: [1, 2]\n")
    write(tmp_path / "middle.yaml", "base: sub/root.yaml\nweights: {a: 1, b: 2}\nshape: {width: 2}\n")
    top = write(tmp_path / "top.yaml", "base: middle.yaml\nweights: {b: 3}\ntimes: [4]\nseed: 10\n")
    config = load(Settings, top, ["shape.radius=5"])
    assert config.shape == Ring(radius=5.0, width=2.0)
    assert (config.weights, config.times, config.seed) == ({"a": 1.0, "b": 3.0}, [4.0], 10)
    other = write(tmp_path / "other.yaml", "base: middle.yaml\nshape: {name: box}\n")
    assert load(Settings, other).shape == Box()  # another kind: nothing of the ring's settings is left


@dataclass(frozen=True)
class Plugged:
    made: Plug


@pytest.mark.parametrize(
    ("above", "options"),
    [
        ("load: m:g", {}),
        ("load: m:g, options: {b: 2}", {"b": 2}),
        ("load: m:f", {"a": 1}),
        ("options: {b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_another_function_takes_none_of_the_options_of_the_one_below(tmp_path, above, options):
    write(tmp_path / "root.yaml", "made: {load: m:f, options: {a: 1}}\n")
    top = write(tmp_path / "top.yaml", f"base: root.yaml\nmade: {{{above}}}\n")
    assert load(Plugged, top).made.options == options


def test_problems_of_a_base_have_its_name(tmp_path):
    write(tmp_path / "root.yaml", "out: o\nseed: a\n")
    top = write(tmp_path / "top.yaml", "base: root.yaml\nrate: b\n")
    with pytest.raises(SettingsError) as caught:
        load(Settings, top)
    assert [p.place for p in caught.value.problems] == [f"{tmp_path}/root.yaml:2", f"{top}:2"]
    faults = {"base: gone.yaml": "no such file", "base: top.yaml": "each other's base", "base: 3": "path of a file"}
    for text, message in faults.items():
        with pytest.raises(SettingsError, match=message):
            load(Settings, write(top, text))


# ---- overrides


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("seed=4", "seed", 4),
        ("rate=1e-5", "rate", 1e-5),
        ("clip=", "clip", None),
        ("label='3'", "label", "3"),
        ("label=a=b", "label", "a=b"),
        ("options.a.b.c=[1, {d: 2}]", "options", {"a": {"b": {"c": [1, {"d": 2}]}}}),
        ("stages.0.steps=6", "stages", (Stage(6),)),  # of the default
        ("stages.0.shape.radius=6", "stages", (Stage(5, Circle(6.0)),)),
        ("stages=[{steps: 1}]", "stages", (Stage(1),)),
        ("times.0=2", "times", [2.0]),
        ("shape.radius=6", "shape", Ring(radius=6.0)),
        ("shape=box", "shape", Box()),
        ("maybe.steps=3", "maybe", Stage(3)),
    ],
)
def test_overrides(override, key, expected):
    assert getattr(load(Settings, None, overrides=["out=o", override]), key) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("seed.x=3", "seed: is 0 and has no key 'x'"),
        ("times.1=2", "times: a list of 1: expected an index below that, got '1'"),
        ("times.x=2", "got 'x'"),
        ("seed=[1", "not YAML"),
        ("sed=3", "sed: unknown key; did you mean 'seed'?"),
        ("stages.0.shape.side=3", "stages.0.shape.side: unknown key; allowed: radius"),
    ],
)
def test_overrides_that_do_not_fit(override, message):
    with pytest.raises(SettingsError) as caught:
        load(Settings, None, ["out=o", override])
    assert message in str(caught.value)
    assert all(problem.place == f"override {override}" for problem in caught.value.problems)


def test_an_override_of_a_scalar_in_the_file_is_an_error(tmp_path):
    file = write(tmp_path / "a.yaml", "out: o\nseed: 3\n")
    with pytest.raises(SettingsError, match="seed: is 3 and has no key 'x'"):
        load(Settings, file, ["seed.x=1"])


def test_an_override_changes_one_of_two_aliases(tmp_path):
    text = "out: o\nstages: [{steps: 1, shape: &s {name: circle, radius: 2}}, {steps: 2, shape: *s}]\n"
    config = load(Settings, write(tmp_path / "a.yaml", text), ["stages.0.shape.radius=3"])
    assert [stage.shape for stage in config.stages] == [Circle(3.0), Circle(2.0)]


def test_overrides_are_applied_in_order_and_reach_bare_names(tmp_path):
    file = write(tmp_path / "a.yaml", "out: o\nshape: ring\nstages: [{steps: 1, shape: circle}]\n")
    config = load(Settings, file, ["shape.radius=3", "shape.radius=4", "stages.0.shape.radius=2"])
    assert config.shape == Ring(radius=4.0)
    assert config.stages == (Stage(1, Circle(2.0)),)


# ---- modules with kinds


@dataclass(frozen=True)
class Tool(Variants):
    """Base of tools, which files define."""


@dataclass(frozen=True)
class WithImports:
    tool: Tool
    imports: tuple[str, ...] = ()


TOOL = f"""
from dataclasses import dataclass
from typing import ClassVar
from {__name__} import Circle, Tool

@dataclass(frozen=True)
class Saw(Tool):
    name: ClassVar[str] = "NAME"
    teeth: int = 30
    disc: Circle = Circle(5.0)
"""


def test_imports_come_before_everything_else(tmp_path):
    one, two = (write(tmp_path / f"{name}.py", TOOL.replace("NAME", name)) for name in ("saw", "jigsaw"))
    file = write(tmp_path / "a.yaml", f"tool: saw\nimports: [{one}]\n")
    found = load(WithImports, file, ["tool.disc.radius=3"])  # an override of the default of such a kind
    assert to_dict(found.tool) == {"name": "saw", "teeth": 30, "disc": {"name": "circle", "radius": 3.0}}
    above = write(tmp_path / "b.yaml", "base: a.yaml\ntool: {disc: {radius: 4}}\n")
    assert to_dict(load(WithImports, above).tool)["disc"]["radius"] == 4.0
    with pytest.raises(SettingsError, match="expected one of saw, got 'jigsaw'; did you mean 'saw'"):
        load(WithImports, file, ["tool=jigsaw"])
    assert load(WithImports, file, ["tool=jigsaw", f"imports.0={two}"]).tool.name == "jigsaw"


def test_a_module_that_is_not_there_is_the_only_problem(tmp_path):
    file = write(tmp_path / "a.yaml", "tool: hammer\nimports:\n- math\n- mahtt\n")
    with pytest.raises(SettingsError) as caught:
        load(WithImports, file)
    assert [(p.place, p.path) for p in caught.value.problems] == [(f"{file}:4", "imports.1")]
    assert "there is no module mahtt" in str(caught.value)
    with pytest.raises(SettingsError, match=r"imports: expected \[text, \.\.\.\], got 3"):
        load(WithImports, None, ["imports=3", "tool=saw"])


# ---- round trips


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(
    ["1e-4", "yes", "~", "null", "3", "010", "1:30", ".inf", "2001-01-01", "<<", " ", "a: b", "#", "- x", "0x1", "a\nb"]
)  # fmt: skip
NUMBERS = st.floats(allow_nan=False)
SHAPES = st.builds(Circle, NUMBERS) | st.builds(Box, st.tuples(NUMBERS, NUMBERS), st.builds(Circle, NUMBERS))
STAGES = st.builds(Stage, st.integers(), SHAPES, NUMBERS)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SETTINGS = st.builds(
    Settings,
    out=TEXT.filter(lambda text: text and str(Path(text)) == text).map(Path),
    stages=st.lists(STAGES, max_size=3).map(tuple),
    flag=st.booleans(),
    seed=st.integers(),
    rate=NUMBERS,
    label=TEXT,
    clip=st.none() | NUMBERS,
    mode=st.sampled_from(["fast", "slow", 3]),
    times=st.lists(NUMBERS, max_size=3),
    weights=st.dictionaries(TEXT, NUMBERS, max_size=3),
    options=st.dictionaries(TEXT, PLAIN, max_size=3),
    either=st.integers() | TEXT,
    shape=SHAPES,
    maybe=st.none() | STAGES,
)


@pytest.mark.slow
@given(config=SETTINGS)
def test_round_trips_are_exact(config, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save(config, file)
    for again in (load(Settings, file), from_dict(Settings, to_dict(config))):
        assert again == config
        assert differences(config, again) == []
        assert repr(again) == repr(config)  # 1 is not 1.0


def test_saving_replaces_the_file_at_once(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    save(Stage(1), file)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(Stage(2), file)
    assert load(Stage, file) == Stage(1)


def test_differences_are_named():
    a = Settings(Path("o"), weights={"a": 1.0})
    b = dataclasses.replace(a, seed=1, weights={"b": 2.0}, shape=Box(), stages=(Stage(6), Stage(7)))
    assert differences(a, b) == [
        "stages.0.steps: 5 -> 6",
        "stages.1: absent -> {steps: 7, shape: {name: circle, radius: 1.0}, lr: 0.001}",
        "seed: 0 -> 1",
        "weights.a: 1.0 -> absent",
        "weights.b: absent -> 2.0",
        "shape: {name: ring, radius: 4.0, width: 0.5} -> "
        "{name: box, sides: [1.0, 2.0], inner: {name: circle, radius: 1.0}}",
    ]


def test_settings_cannot_hold_what_yaml_does_not_know():
    with pytest.raises(TypeError, match="cannot hold a object"):
        to_dict(Settings(Path("o"), options={"a": object()}))


# ---- documentation


def test_comments_behind_fields_are_the_documentation():
    assert comments(Ring) == {"radius": "metres; from the paper", "width": ""}
    assert comments(Settings)["shape"] == "default in the middle"
    assert comments(Stage)["shape"] == "of the stage"
    made = dataclasses.make_dataclass("made", [("x", int)])
    assert comments(made) == {"x": ""}


def test_description_shows_every_kind_with_type_default_and_meaning():
    lines = [" ".join(line.split()) for line in describe(Settings).split("\n")]
    assert lines[0] == "key type default meaning"
    for line in (
        "out path (required) a folder",
        "steps int (required) updates",
        "rate float 0.0001 per step",
        "mode fast | slow | 3 fast",
        "name: circle Round.",
        "name: ring A hole in it.",
        "name: box Not round.",
        "sides [float, float] [1.0, 2.0] metres",
        "inner one of these circle what it holds",
        "name: ... circle, ring, box: see above",
        "radius float 4.0 metres; from the paper",  # the default of `shape`
    ):
        assert line in lines, line
    assert not any(line.startswith("hidden") for line in lines)


def test_the_settings_of_a_run_are_documented_and_round_trip(tmp_path):
    header, *rows = describe(RunConfig).split("\n")
    bare = {row.split()[0] for row in rows if len(row) <= header.index("meaning")}
    assert not bare
    stages = [{"steps": 1, "objective": name} for name in ("rcm", "scm", "dmd", "dcm", "mean_flow", "flow_matching")]
    config = from_dict(RunConfig, {"out": "o", "model": {"load": "a:b", "options": {"x": [1]}}, "stages": stages})
    save(config, tmp_path / "config.yaml")
    assert load(RunConfig, tmp_path / "config.yaml") == config


# ---- plugs


def build_it(width: int, *, depth: int = 2, seed: int = 0) -> tuple[int, int, int]:
    if width < 0:
        raise RuntimeError("the function's own words")
    return width, depth, seed


class Maker:
    @classmethod
    def make(cls, **options: int) -> dict[str, int]:
        return options


NOT_A_FUNCTION = 3
HERE = f"{Path(__file__)}:"


def test_a_plug_builds_what_its_function_returns():
    assert Plug(f"{HERE}build_it", {"width": 3}).build(seed=4) == (3, 2, 4)
    assert Plug(f"{HERE}Maker.make", {"a": 1}).build(b=2) == {"a": 1, "b": 2}
    assert Plug("builtins:dict", {"a": 1}).build() == {"a": 1}  # no signature
    assert Plug("math:hypot").build() == 0.0
    with pytest.raises(PlugFailed, match="raised RuntimeError: the function's own words"):
        Plug(f"{HERE}build_it", {"width": -3}).build()


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        ("math", {}, "expected package.module:function"),
        (":f", {}, "expected package.module:function"),
        ("math:", {}, "expected package.module:function"),
        (".relative:f", {}, "expected the full name of a module"),
        ("jvpgraph.trainer.dti:DiT", {}, "there is no module jvpgraph.trainer.dti; did you mean dit?; modules of"),
        ("no_such_package_at_all.x:f", {}, "there is no module no_such_package_at_all; it is neither installed nor in"),
        ("jvpgraph.trainer.plug:Plugg", {}, "has no Plugg; did you mean Plug?; functions there: Plug, PlugError"),
        (f"{HERE}Maker.mak", {}, "has no mak"),
        (f"{HERE}NOT_A_FUNCTION", {}, "NOT_A_FUNCTION is a int, not a function"),
        ("folder/model.py:f", {}, "no such file"),
        (f"{Path(__file__).with_name('test_setting.py')}:f", {}, "did you mean test_settings.py?"),
        (f"{HERE}build_it", {}, "missing options: width"),
        (f"{HERE}build_it", {"widht": 3}, "missing options: width\n  unknown option widht; did you mean width?"),
        (f"{HERE}build_it", {"width": 1, "seed": 3}, "the trainer itself gives seed"),
    ],
)  # fmt: skip
def test_plugs_that_do_not_fit(load, options, message):
    with pytest.raises(PlugError) as caught:
        Plug(load, options).build(seed=0)
    assert message in str(caught.value)


def test_a_file_is_a_module_that_finds_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    write(tmp_path / "neighbour_of_model.py", "WIDTH = 5\n")
    source = "import neighbour_of_model as n\ncalls = []\ndef f(): calls.append(1); return len(calls), n.WIDTH\n"
    write(tmp_path / "model.py", source)
    plug = Plug(f"{tmp_path}/model.py:f")
    assert plug.build() == (1, 5)
    assert plug.build() == (2, 5)  # one module per process
    write(tmp_path / "broken.py", "import no_such_module_anywhere\n")
    for _ in range(2):  # a module that failed is not left behind half made
        with pytest.raises(PlugFailed, match=r"ModuleNotFoundError.*no_such_module_anywhere"):
            Plug(f"{tmp_path}/broken.py:f").build()
    monkeypatch.chdir(tmp_path)
    assert Plug("model:f").build() == (1, 5)  # a module of the working folder
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        Plug("broken:f").build()
