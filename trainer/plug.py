"""Functions of the user in the settings: models, data sets, decoders, feature spaces."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


class PlugError(ValueError):
    """A function named in the settings does not exist or does not take these options."""


class PlugFailed(ValueError):
    """A function or a .py file of the settings raised an error that does not speak for itself."""


USER_FILES: set[str] = set()
"""The .py files of the settings that were imported."""


@dataclass(frozen=True)
class Plug:
    """A function by its name, and its options."""

    load: str  # package.module:function or path/to/file.py:function
    options: dict[str, Any] = field(default_factory=dict)  # its keyword arguments

    @property
    def file(self) -> Path | None:
        """The .py file that it is in, if that is no module's name."""
        source = self.load.rpartition(":")[0]
        return Path(source).expanduser() if source.endswith(".py") else None

    def function(self) -> Callable[..., Any]:
        """Imports it; modules are looked for in the working folder too. Raises PlugError."""
        source, colon, names = self.load.rpartition(":")
        if not colon or not source or not names:
            raise PlugError(f"{self.load!r}: expected package.module:function or path/to/file.py:function")
        found: Any = import_module(source)
        for name in names.split("."):
            if not hasattr(found, name):
                raise PlugError(f"{self.load}: {source} has no {name}{_functions_near(name, found)}")
            found = getattr(found, name)
        if not callable(found):
            near = _functions_near(names, import_module(source))
            raise PlugError(f"{self.load}: {names} is a {type(found).__name__}, not a function{near}")
        return found

    def build(self, **extra: Any) -> Any:
        """What the function returns for the options and `extra`, which the trainer adds.

        Raises:
            PlugError: there is no such function, or it does not take these options.
            Exception: whatever the function itself raises.
        """
        function = self.function()
        twice = sorted(self.options.keys() & extra.keys())
        if twice:
            raise PlugError(f"{self.load}: the trainer itself gives {', '.join(twice)}; leave it out of options")
        _check_options(self.load, function, {**self.options, **extra})
        try:
            return function(**self.options, **extra)
        except Exception as error:
            if speaks_for_itself(error):
                raise
            paths = [f"{key}: {value}" for key, value in self.options.items() if isinstance(value, (str, Path))]
            options = f" ({', '.join(paths)})" if paths else ""
            raise PlugFailed(f"{self.load}{options} raised {described(error)}") from error


def speaks_for_itself(error: Exception) -> bool:
    """Whether its message was written for who wrote the settings: in this package, or about a file."""
    if isinstance(error, OSError) and error.filename:
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("jvpgraph.")
    return ours or type(error).__name__ == "OutOfMemoryError"  # torch's, which a smaller network may help


def described(error: BaseException) -> str:
    """Type and message of an error, the line of the user's own file that it came through, and what to do."""
    text = f"{type(error).__name__}: {error}".strip(": ")
    if isinstance(error, SyntaxError):
        return f"{text}\nMend the file and start again."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in USER_FILES]
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    do = "Mend it" if frames else "Look whether its files are whole and its options right"
    return f"{text}{where}\n{do}; --traceback shows where it comes from."


def _check_options(load: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C without a signature: it checks its arguments itself
        return
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in options.keys() - named.keys():
            near = difflib.get_close_matches(name, named, n=1)
            allowed = f"allowed: {', '.join(named)}" if named else "it takes none"
            problems.append(f"unknown option {name}{f'; did you mean {near[0]}?' if near else ''}; {allowed}")
    missing = [name for name, p in named.items() if p.default is p.empty and name not in options]
    if missing:
        problems.append(f"missing options: {', '.join(missing)}")
    if problems:
        raise PlugError("\n".join([f"{load} does not take these options", *(f"  {line}" for line in sorted(problems))]))


def import_module(source: str) -> ModuleType:
    """A module or a .py file by its name. Raises PlugError."""
    return _module_of_file(Path(source)) if source.endswith(".py") else _module_of_name(source)


def _module_of_file(path: Path) -> ModuleType:
    """A file as a module, once per process. The folder can be imported from, as with `python file.py`."""
    path = path.expanduser().resolve()
    if not path.is_file():
        files = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise PlugError(f"{path}: no such file{_near(path.name, files, 'files next to it')}")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _import_from(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file always has a spec"
    assert spec.loader is not None, "and a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    USER_FILES.add(str(path))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception) or speaks_for_itself(error):
            raise
        raise PlugFailed(f"{path} raised {described(error)}") from error
    return module


def _module_of_name(name: str) -> ModuleType:
    _import_from(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        parent, _, last = error.name.rpartition(".")
        if parent:
            near = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(parent).__path__))
            hint = _near(last, near, f"modules of {parent}")
        else:
            hint = f"; it is neither installed nor in {os.getcwd()}"
        raise PlugError(f"{name}: there is no module {error.name}{hint}") from None
    except (TypeError, ValueError) as error:
        if name.startswith(".") or not name:
            raise PlugError(f"{name}: expected the full name of a module") from error
        raise


def _import_from(folder: str) -> None:
    """Last in the search path, so that nothing installed is hidden."""
    if folder not in sys.path:
        sys.path.append(folder)


def _functions_near(name: str, owner: Any) -> str:
    public = [n for n, value in vars(owner).items() if callable(value) and not n.startswith("_")]
    if isinstance(owner, ModuleType):
        own = [n for n in public if getattr(vars(owner)[n], "__module__", "") == owner.__name__]
        public = own or public
    return _near(name, public, "functions there")


def _near(name: str, known: list[str], what: str) -> str:
    """The closest names first, at most eight."""
    close = difflib.get_close_matches(name, known, n=8, cutoff=0.5)
    shown = [*close, *(other for other in known if other not in close)][:8]
    mean = f"; did you mean {close[0]}?" if close else ""
    return f"{mean}; {what}: {', '.join(shown)}{', ...' if len(known) > 8 else ''}" if shown else f"; no {what}"
