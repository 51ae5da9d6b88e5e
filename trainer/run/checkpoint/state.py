"""The state as leaves by dotted name, and values as bytes that can be read again without running code."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


@dataclass
class PerRank:
    """A value that each rank has for itself: a random generator's state, the position of a data loader.

    The value is any that could stand in the state by itself; it is stored as one piece, so that its structure may
    differ from save to save. `load` hands it to the object's `load_state_dict`, or sets `value`, also if that is a
    tensor. A rank that did not exist when the checkpoint was saved keeps what it has.
    """

    value: Any


class OnePiece:
    """A value that all ranks have alike, stored as one piece, so that its structure may differ from save to save.

    Args:
        value: with `state_dict` and `load_state_dict`; the first rank's is saved, and loaded on any number of ranks.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> State:
        return {"value": [self.value.state_dict()]}  # a list is a leaf, whatever is in it

    def load_state_dict(self, state: State) -> None:
        self.value.load_state_dict(state["value"][0])


@dataclass
class Leaf:
    """A leaf of the state, and the dictionary that holds it."""

    holder: State
    key: str
    value: Any

    def restore(self, value: Any) -> None:
        if not isinstance(self.value, PerRank):
            self.holder[self.key] = value
        elif stateful(self.value.value):
            self.value.value.load_state_dict(value)
        else:
            self.value.value = value


def stateful(thing: Any) -> bool:
    return not isinstance(thing, type) and hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def flatten(state: Mapping[str, Any], live: list[tuple[Any, State]] | None = None) -> dict[str, Leaf]:
    """Leaves by dotted name. Objects with a state, and the dictionary of theirs that is filled, go to `live`.

    Raises:
        ValueError: a key is no string, or two leaves have the same dotted name.
    """
    leaves: dict[str, Leaf] = {}

    def visit(prefix: str, holder: Any) -> None:
        for key, value in holder.items():
            if not isinstance(key, str) or RANK in key:
                raise ValueError(f"the key {key!r} in {prefix or 'the state'}: keys are strings without {RANK!r}")
            name = f"{prefix}.{key}" if prefix else key
            if stateful(value):
                own = _copied_dicts(value.state_dict())
                if live is not None:
                    live.append((value, own))
                visit(name, own)
            elif isinstance(value, Mapping):
                visit(name, value)
            elif name in leaves:
                raise ValueError(f"two values of the state have the dotted name {name}: rename one of them")
            else:
                leaves[name] = Leaf(holder, key, value)

    visit("", state)
    return leaves


def _copied_dicts(state: Any) -> Any:
    """The same leaves in new dictionaries, so that filling them changes nothing before load_state_dict."""
    if not isinstance(state, Mapping):
        return state
    copied: Any = OrderedDict() if isinstance(state, OrderedDict) else {}
    copied.update((key, _copied_dicts(value)) for key, value in state.items())
    if hasattr(state, "_metadata"):  # versions of an nn.Module's state
        copied._metadata = state._metadata
    return copied


RANK = "@rank"


def per_rank(name: str, rank: int) -> str:
    return f"{name}{RANK}{rank}"


# What torch.load(weights_only=True) accepts beside its own: numpy arrays and scalars, as in the state of a generator.
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
    *(np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]),
]


def pickled(name: str, value: Any) -> bytes:
    """`value` as torch.save writes it, after making sure that it can be read again.

    Raises:
        ValueError: it cannot be pickled, or not be read without running code.
    """
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        unpickled(stream.getvalue())
    except Exception as error:  # pickling runs code of the value, which may raise anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the state's {name}, of type {type(value).__name__}, cannot be saved: {reason}\n"
            "  Save tensors, numbers, strings, and dictionaries, lists or tuples of them instead."
        ) from error
    return stream.getvalue()


def unpickled(data: bytes) -> Any:
    with torch.serialization.safe_globals(_NUMPY):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
