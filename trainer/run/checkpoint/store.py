"""A folder of checkpoints: written, found, checked, read and deleted."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan

from jvpgraph.errors import JvpgraphError
from jvpgraph.trainer.files import sync
from jvpgraph.trainer.run.checkpoint.dcp import LoadPlanner, Reader, SavePlanner, write_plan
from jvpgraph.trainer.run.checkpoint.manifest import damage, fingerprint, read_manifest, write_manifest
from jvpgraph.trainer.run.checkpoint.state import RANK, Leaf, PerRank, State, flatten, per_rank
from jvpgraph.trainer.run.ranks import Ranks

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})(\.replaced)?")  # replaced: the older one while a step is saved for a second time


class CheckpointError(JvpgraphError, OSError):
    """A checkpoint could not be written, or none that is complete can be read."""


class NotWritten(CheckpointError):
    """A checkpoint could not be written; those before it are intact."""


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
        self.seconds = 0.0  # that the longest save took
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
            f"no checkpoint in {self.folder} is whole; the warnings say what is wrong with each.\n"
            "Restore one of them from a copy; or begin anew with --fresh, which moves this run aside, or in another "
            "folder."
        )

    def has(self, step: int) -> bool:
        return (self.folder / f"step-{step:08d}").is_dir()

    def at(self, step: int) -> Path:
        """The checkpoint of one step.

        Raises:
            FileNotFoundError: there is none; the message names the steps there are.
        """
        if not self.has(step):
            steps = ", ".join(str(int(p.name[5:])) for p in reversed(self._candidates()) if not p.suffix)
            raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}, only of {steps or 'none'}")
        return self.folder / f"step-{step:08d}"

    def load(
        self,
        state: State,
        path: Path | None = None,
        *,
        partial: bool = False,
        whole: Collection[str] = (),
        optional: Collection[str] = (),
    ) -> int | None:
        """Restores `state` in place from `path`, by default from the newest checkpoint that is whole.

        Args:
            state: as it was saved, from any number of ranks.
            partial: `state` may ask for less than was saved,
            whole: but below these dotted names for all of it.
            optional: dotted names in `state` that keep what they hold if nothing was saved for them.

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
        self._read(state, path, whole if partial else [""], optional)
        return int(self.ranks.agree(lambda: read_manifest(path)["step"]))

    def load_newest(self, state: State, **how: Any) -> int | None:
        """`load`, with its options, of a folder that another process writes to, and deletes old checkpoints from.

        Where one disappears while it is read, the next complete one is.

        Raises:
            ValueError, CheckpointError: as `load`.
        """
        while True:
            before = self._candidates()
            try:
                return self.load(state, **how)
            except OSError:  # CheckpointError is one
                if self._candidates() == before:
                    raise

    def trim(self, newest: Path) -> None:
        """Deletes all but `keep` whole checkpoints now, and not after the next one: which makes room for that."""
        self.wait()
        self.ranks.on_first(lambda: self._prune(newest))

    def _write(self, step: int, plan: SavePlanner) -> None:
        """All of a save that touches the disk; in the writer's thread."""
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        begun = time.monotonic()
        try:
            self.ranks.on_first(lambda: _make_empty(partial))
            files = write_plan(plan, partial, self.ranks)
            self.ranks.on_first(lambda: self._complete(step, partial, final, files))
            self.seconds = max(self.seconds, time.monotonic() - begun)
        except Exception as error:
            # Only what was being written is thrown away, which leaves room for what comes next.
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise NotWritten(self._explain(error, final, plan.bytes)) from error

    def _complete(self, step: int, partial: Path, final: Path, files: dict[str, dict[str, int]]) -> None:
        write_manifest(partial, step, self.ranks.size, files)
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
            free = shutil.disk_usage(self.folder).free
            room = f"{free / 1e6:,.1f} MB are free"
        except OSError:
            free, room = 0, "the free space is unknown"
        fewer = self._fewer(needed * self.ranks.size - free)
        advice = "choose another folder (`out`, to which the run can be moved)"
        if fewer is not None:
            advice = f"go on with checkpoint.keep={fewer}, which deletes the oldest first; or {advice}"
        return (
            f"the checkpoint {final} could not be written: {_root(error)}; it takes {needed / 1e6:,.1f} MB on this "
            f"rank, and {room}. Checkpoints before it are intact.\n"
            f"Free some space; or {advice}."
        )

    def _fewer(self, missing: float) -> int | None:
        """As many of the checkpoints as leave room for `missing` bytes more, at least one; None: none can go."""
        there = [path for path in self._candidates() if path.suffix != ".replaced"]
        sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in there]
        fits = [keep for keep in range(1, len(there)) if sum(sizes[keep:]) >= missing]
        return max(fits) if fits else 1 if len(there) > 1 else None

    def _candidates(self, warn: bool = False) -> list[Path]:
        """Folders that have the name of a checkpoint, newest first."""
        names = [p for p in self.folder.iterdir() if NAME.fullmatch(p.name)] if self.folder.is_dir() else []
        if warn:
            for path in sorted(self.folder.glob("step-*.partial")):
                log.warning("skipping %s: the run ended before it was complete", path)
        return sorted(names, key=_order, reverse=True)

    def _fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; ranks share the reading. Remembered until a file changes."""
        key = self.ranks.agree(lambda: fingerprint(path))
        if self._verified.get(path, (None, None))[0] != key:
            share = (self.ranks.rank, self.ranks.size)
            faults = self.ranks.gather(lambda: damage(path, checksums=True, share=share))
            self._verified[path] = (key, next((f for f in faults if f), None))
        return self._verified[path][1]

    def _read(self, state: State, path: Path, whole: Collection[str], optional: Collection[str]) -> None:
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
        wanted = {name: leaf for name, leaf in wanted.items() if name in saved or name not in optional}
        wrong = _differences(wanted, saved, whole)
        for name, leaf in leaves.items():
            if isinstance(leaf.value, PerRank) and name not in anyone:
                wrong.append(f"missing in the checkpoint: {name}")
        if "" in whole:
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


def _differences(wanted: Mapping[str, Leaf], saved: Mapping[str, Any], whole: Collection[str]) -> list[str]:
    below = tuple(f"{name}." if name else "" for name in whole)
    wrong = [f"missing in the checkpoint: {name}" for name in wanted if name not in saved]
    wrong += [
        f"unexpected in the checkpoint: {name}" for name in saved if name not in wanted and name.startswith(below)
    ]
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


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
