"""Checkpoints that survive kill -9, full disks and flipped bits, in the format of torch.distributed.checkpoint (DCP).

    step-00000123.partial/   while it is written
    step-00000123/           complete: renamed after everything in it is on the disk
        __0_0.distcp ...     DCP: one file of tensors and values per rank
        .metadata            DCP: which tensor lies where, so that another number of ranks can read it
        manifest.json        ours, written last: size and CRC-32 of every file

Planning, deduplication, the files and resharding are DCP's own classes; this module takes the place of its
`save`/`async_save`/`load`, which know nothing of complete, damaged or older checkpoints.

Security: values are read with `torch.load(weights_only=True)`, and DCP's `.metadata`, a pickle, with an unpickler
that builds nothing but DCP's own records. So a checkpoint cannot run code. A checksum is no signature: weights from
an untrusted source are still untrusted weights.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from jvpgraph.errors import JvpgraphError
from jvpgraph.trainer.files import sync
from jvpgraph.trainer.run.ranks import Ranks

T = TypeVar("T")
State = dict[str, Any]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHUNK = 16 * 2**20  # bytes read at a time for a checksum
NAME = re.compile(r"step-(\d{8,})(\.replaced)?")  # replaced: the older one while a step is saved for a second time


class CheckpointError(JvpgraphError, OSError):
    """A checkpoint could not be written, or none that is complete can be read."""


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


class Checkpoints:
    """The checkpoints of a run, in one folder.

    The state is a dictionary, nested at will with string keys. Its leaves:

    * tensors, sharded ones (DTensor) included. `load` writes into them. Where ranks hold the same plain tensor,
      one of them writes it.
    * objects with `state_dict` and `load_state_dict`, whose state is treated likewise.
    * `PerRank`.
    * any other value: numbers, strings, None, lists and tuples (also of tensors), sets, numpy arrays and scalars. It
      is the first rank's, and has to be what `torch.load(weights_only=True)` accepts, which `save` checks. `load`
      puts the saved value in the dictionary in place of the one that is there.

    With an initialised process group every method is a collective: call it on all ranks, in the same order. Writing
    uses a gloo group of its own, so that it does not meet the collectives of training. The folder has to be one that
    all ranks see.

    Args:
        folder: made if it is not there.
        keep: how many complete checkpoints to keep; the oldest go after a new one is complete.
        asynchronous: `save` returns once the state is copied to the CPU; a thread writes.
        timeout: how long ranks wait for each other, also while one of them writes; torch's if not given.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(
        self, folder: Path, *, keep: int = 3, asynchronous: bool = True, timeout: timedelta | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least the newest checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self.asynchronous = asynchronous
        self.ranks = Ranks(timeout)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._verified: dict[Path, tuple[Any, str | None]] = {}

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copies `state` and writes it in the background, once the save before is done.

        Raises:
            ValueError: a key or a value cannot be stored.
            CheckpointError: this save, if not asynchronous, or the one before could not be written.
        """
        self.wait()
        plans: list[SavePlanner] = []
        self.ranks.gather(lambda: plans.append(SavePlanner(flatten(state), self.ranks)))
        self._in_flight = self._writer.submit(self._write, step, plans.pop())
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: the last save could not be written.
        """
        future, self._in_flight = self._in_flight, None
        if future is not None:
            future.result()

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, every byte of it checked; logs a warning for each that is not.

        Returns:
            None if there is no checkpoint yet.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        self.wait()
        candidates = self.ranks.agree(lambda: self._candidates(warn=True))
        for path in candidates:
            fault = self._fault(path)
            if fault is None:
                return path
            if self.ranks.first:
                log.warning("skipping the checkpoint %s: %s", path, fault)
        if not candidates:
            return None
        raise CheckpointError(
            f"no checkpoint in {self.folder} is whole; the warnings say what is wrong with each. "
            "Restore one of them from a copy, or start in another folder."
        )

    def at(self, step: int) -> Path:
        """The checkpoint of one step.

        Raises:
            FileNotFoundError: there is none; the message names the steps there are.
        """
        path = self.folder / f"step-{step:08d}"
        if not path.is_dir():
            steps = ", ".join(str(int(p.name[5:])) for p in reversed(self._candidates()) if not p.suffix)
            raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}, only of {steps or 'none'}")
        return path

    def load(self, state: State, path: Path | None = None, *, partial: bool = False) -> int | None:
        """Restores `state` in place from `path`, by default from the newest checkpoint that is whole.

        Args:
            state: as it was saved, from any number of ranks.
            partial: `state` may ask for less than was saved.

        Returns:
            The step, or None if there is no checkpoint yet.

        Raises:
            ValueError: names, shapes or dtypes are not those saved; the message lists all, and nothing was changed.
            CheckpointError: there are checkpoints, but none is whole, or the one at `path` is not.
        """
        if path is None:
            path = self.latest()
            if path is None:
                return None
        else:
            path = Path(path)
            self.wait()
            fault = self._fault(path)
            if fault is not None:
                raise CheckpointError(f"the checkpoint {path} cannot be read: {fault}")
        self._read(state, path, partial)
        return int(self.ranks.agree(lambda: read_manifest(path)["step"]))

    def _write(self, step: int, plan: SavePlanner) -> None:
        """All of a save that touches the disk; in the writer's thread."""
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        try:
            self.ranks.on_first(lambda: _make_empty(partial))
            files = write_plan(plan, partial, self.ranks)
            self.ranks.on_first(lambda: self._complete(step, partial, final, files))
        except Exception as error:
            # Only what was being written is thrown away, which leaves room for what comes next.
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._explain(error, final, plan.bytes)) from error

    def _complete(self, step: int, partial: Path, final: Path, files: dict[str, dict[str, int]]) -> None:
        body = {"format": 1, "step": step, "ranks": self.ranks.size, "files": files}
        with (partial / MANIFEST).open("w") as file:
            json.dump({**body, "crc32": _json_checksum(body)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(partial)
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            final.rename(replaced)
        partial.rename(final)
        sync(self.folder)
        try:
            self._prune(final)
        except OSError as error:
            log.warning("%s is complete, but older files could not be deleted: %s", final, error)

    def _prune(self, newest: Path) -> None:
        """Deletes leftovers, and all but the last `keep` whole checkpoints; files that are damaged do not count."""
        for path in self.folder.glob("step-*.partial"):
            shutil.rmtree(path)
        whole = [newest]
        for path in self._candidates():
            superseded = path.suffix == ".replaced" and path.with_suffix("") in whole
            if len(whole) < self.keep and path != newest and not superseded and self._looks_whole(path):
                whole.append(path)
        oldest = min(_order(path) for path in whole)
        for path in self._candidates():
            if path not in whole and (_order(path) < oldest or path.suffix == ".replaced"):
                shutil.rmtree(path)

    def _looks_whole(self, path: Path) -> bool:
        known = self._verified.get(path)
        return damage(path, checksums=False) is None and (known is None or known[1] is None)

    def _explain(self, error: Exception, final: Path, needed: int) -> str:
        try:
            free = f"{shutil.disk_usage(self.folder).free / 1e6:,.1f} MB are free"
        except OSError:
            free = "the free space is unknown"
        return (
            f"the checkpoint {final} could not be written: {_root(error)}\n"
            f"  It takes {needed / 1e6:,.1f} MB on this rank, and {free}. Checkpoints before it are intact.\n"
            f"  Free some space, or keep fewer checkpoints (now {self.keep}), or choose another folder, and save again."
        )

    def _candidates(self, warn: bool = False) -> list[Path]:
        """Folders that have the name of a checkpoint, newest first."""
        names = [p for p in self.folder.iterdir() if NAME.fullmatch(p.name)] if self.folder.is_dir() else []
        if warn:
            for path in sorted(self.folder.glob("step-*.partial")):
                log.warning("skipping %s: the run ended before it was complete", path)
        return sorted(names, key=_order, reverse=True)

    def _fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; ranks share the reading. Remembered until a file changes."""
        key = self.ranks.agree(lambda: _fingerprint(path))
        if self._verified.get(path, (None, None))[0] != key:
            share = (self.ranks.rank, self.ranks.size)
            faults = self.ranks.gather(lambda: damage(path, checksums=True, share=share))
            self._verified[path] = (key, next((f for f in faults if f), None))
        return self._verified[path][1]

    def _read(self, state: State, path: Path, partial: bool) -> None:
        reader = Reader(path)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, self.ranks.first)
        live: list[tuple[Any, State]] = []
        leaves = flatten(state, live)
        # A leaf of a PerRank is one value whatever it holds; others are values unless they are tensors.
        wanted = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf.value, PerRank)}
        own = {}
        for name, leaf in leaves.items():
            if isinstance(leaf.value, PerRank):
                saved_as = per_rank(name, self.ranks.rank)
                if saved_as in metadata.state_dict_metadata:
                    own[saved_as] = leaf
                else:
                    log.warning("%s has no %s of rank %d, which keeps its own", path, name, self.ranks.rank)
        anyone = {name.rpartition(RANK)[0] for name in metadata.state_dict_metadata if RANK in name}
        saved = {n: m for n, m in metadata.state_dict_metadata.items() if RANK not in n}
        wrong = _differences(wanted, saved, partial)
        for name, leaf in leaves.items():
            if isinstance(leaf.value, PerRank) and name not in anyone:
                wrong.append(f"missing in the checkpoint: {name}")
        if not partial:
            mine = {name for name, leaf in leaves.items() if isinstance(leaf.value, PerRank)}
            wrong += [f"unexpected in the checkpoint: {name}" for name in sorted(anyone - mine)]
        problems = self.ranks.gather(lambda: wrong)
        if any(problems):
            lines = sorted({line for lines in problems for line in lines})
            raise ValueError(f"the checkpoint {path} is of another state\n  " + "\n  ".join(lines))
        # Values first, and aside: whatever is wrong with them shows before a tensor is written to.
        planner = LoadPlanner({**{n: leaf.value for n, leaf in wanted.items()}, **dict.fromkeys(own)})
        planner.set_up_planner(planner.targets, metadata, self.ranks.first)
        items = planner.create_local_plan().items
        for kind in (LoadItemType.BYTE_IO, LoadItemType.TENSOR):
            plan = LoadPlan([item for item in items if item.type == kind])
            reader.read_data(plan, planner).wait()
            self.ranks.gather(lambda: None)
        for name, leaf in {**wanted, **own}.items():
            if name in planner.values:
                leaf.restore(planner.values[name])
        for thing, own_state in live:
            thing.load_state_dict(own_state)


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


class SavePlanner(DefaultSavePlanner):
    """DCP's plan of the live state, and a copy of its data on the CPU that stays as it is.

    Values are pickled right away. Those that all ranks have are the first rank's to write.
    """

    def __init__(self, leaves: Mapping[str, Leaf], ranks: Ranks) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged: dict[str, Tensor | bytes] = {}
        planned: State = {}
        for name, leaf in leaves.items():
            value = leaf.value
            if isinstance(value, PerRank):
                name = per_rank(name, ranks.rank)
                inner = value.value.state_dict() if stateful(value.value) else value.value
                planned[name] = None
                self.staged[name] = pickled(name, inner)
            elif isinstance(value, Tensor):
                local = value.detach()
                local = local.to_local() if isinstance(local, DTensor) else local
                planned[name] = value
                self.staged[name] = local.to("cpu", copy=True, memory_format=torch.contiguous_format)
            elif ranks.first:
                planned[name] = None
                self.staged[name] = pickled(name, value)
        self.set_up_planner(planned, is_coordinator=ranks.first)
        self.local_plan = self.create_local_plan()
        self.state_dict = {}  # holds on to no live tensor
        self.bytes = sum(len(v) if isinstance(v, bytes) else v.nbytes for v in self.staged.values())

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.staged[index.fqn]

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return io.BytesIO(object) if write_item.type == WriteItemType.BYTE_IO else object


class LoadPlanner(DefaultLoadPlanner):
    """DCP's plan; values are kept in `values` instead of being unpickled into the state without any check."""

    def __init__(self, targets: State) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.targets = targets
        self.values: State = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.values[read_item.dest_index.fqn] = unpickled(value.read())


class Reader(FileSystemReader):
    """DCP's reader, whose metadata cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"the metadata is a {type(metadata).__name__}")
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's records, torch's sizes and dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.split(".")[0] in ("torch", "pathlib") else None
        records = module == "torch.distributed.checkpoint.metadata" and isinstance(found, type)
        named = (module, name) in {
            ("torch", "Size"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
            ("pathlib._local", "WindowsPath"),
        }
        if records or named or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"the metadata of a checkpoint asks for {module}.{name}")


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


def write_plan(planner: SavePlanner, folder: Path, ranks: Ranks) -> dict[str, dict[str, int]]:
    """Writes what all ranks planned into `folder`; returns size and checksum of each file, on the first rank."""
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(ranks.first, rank=ranks.rank, use_collectives=True)
    local = ranks.gather(lambda: writer.prepare_local_plan(planner.local_plan))
    # Each rank makes the same global plan of the same local ones, instead of waiting for the first rank's.
    plans, metadata = planner.create_global_plan(local)
    mine = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])

    def write() -> list[Any]:
        results = writer.write_data(mine, planner).wait()
        ends: dict[str, int] = {}
        for result in results:
            where = result.storage_data
            ends[where.relative_path] = max(ends.get(where.relative_path, 0), where.offset + where.length)
        for name, end in ends.items():
            if (folder / name).stat().st_size != end:
                raise OSError(f"{name} has {(folder / name).stat().st_size} bytes of {end}: the disk took no more")
        return [results, {name: summary(folder / name) for name in ends}]

    written = ranks.gather(write)
    if not ranks.first:
        return {}
    writer.finish(metadata, [results for results, _ in written])
    return {name: s for _, files in written for name, s in files.items()} | {".metadata": summary(folder / ".metadata")}


def summary(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises:
    ValueError: it is not what was written.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _json_checksum(manifest):
        raise ValueError("the checksum does not match")
    return manifest


def damage(path: Path, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, or None. `share` (i, n): compute the checksums of every n-th file only."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never complete"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    faults = []
    for i, (name, wanted) in enumerate(sorted(manifest["files"].items())):
        try:
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                faults.append(f"{name} has {size} bytes of {wanted['bytes']}")
            elif checksums and i % share[1] == share[0] and summary(path / name) != wanted:
                faults.append(f"{name} has other content than was written (checksum)")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error})")
    return "; ".join(faults) or None


def _differences(wanted: Mapping[str, Leaf], saved: Mapping[str, Any], partial: bool) -> list[str]:
    wrong = [f"missing in the checkpoint: {name}" for name in wanted if name not in saved]
    if not partial:
        wrong += [f"unexpected in the checkpoint: {name}" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        there, here = _kind(saved[name]), _kind(wanted[name].value)
        if there != here:
            wrong.append(f"{name}: {there} in the checkpoint, {here} here")
    return sorted(wrong)


def _kind(value: Any) -> str:
    if isinstance(value, TensorStorageMetadata):
        return f"{str(value.properties.dtype).removeprefix('torch.')}{list(value.size)}"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "a value"


def _root(error: BaseException) -> BaseException:
    """What the system said: torch's writer fails for a second time over the first error and shows only that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _order(path: Path) -> tuple[int, bool]:
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), match[2] is None


def _fingerprint(path: Path) -> Any:
    try:
        stats = [(p.name, p.stat()) for p in sorted(path.iterdir())]
    except OSError:
        return None
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]


def _json_checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
