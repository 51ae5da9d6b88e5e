"""One endless shuffled stream of batches whose order is a pure function of (seed, position).

Epoch e is the permutation that (seed, e) gives; the stream is the epochs one after the other.  A position counts
samples of that stream.  At position p, rank r of R reads samples p + r * B to p + (r + 1) * B - 1, and then all ranks
go on at p + R * B: every batch is full, every epoch visits every sample exactly once, and a batch may hold the end of
one epoch and the start of the next.  The state of a loader is therefore one number, the same on every rank, whatever
the number of workers; with it a run may even go on with another batch size or number of ranks.

A data set of several shapes (`buckets`) has such a stream for each of them, and a batch of all ranks comes from one.
By the end of epoch e a bucket of n samples has given floor((e + 1) n / step) batches of `step` samples, what is left
over goes into the next epoch, and the order of an epoch's batches is the permutation that (seed, e) gives: all samples
come equally often.  The position still counts samples; its meaning then depends on the batch size too.
"""

from __future__ import annotations

import itertools
import logging
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.data.sample import BadShard, Dataset, Sample, collate

log = logging.getLogger("jvpgraph.trainer.data")


def loader(
    dataset: Dataset, batch: int, seed: int, *, workers: int = 0, rank: int = 0, ranks: int = 1
) -> StatefulDataLoader:
    """An endless loader of full batches of `batch` samples for this rank, read by `workers` processes (0: this one).

    `iter()` goes on where the loader stands; `state_dict()` names the next batch, `load_state_dict()` goes there and
    holds for the next `iter()`.  Where the data set skips bad samples, each is replaced by the sample at its place in
    the next batch of all ranks, or in the first one behind that where it is good (it comes again in its own turn); so
    the replacements are the same for any number of ranks, and no two of a batch are at the same position of the
    stream.  Each bad sample is logged once.

    ValueError for numbers out of range, for a data set smaller than a batch of all ranks, for samples that cannot be
    stacked, and for a state of another data set or seed; BadShard for a sample that cannot be read.
    """
    if batch < 1 or workers < 0 or seed < 0 or not 0 <= rank < ranks:
        raise ValueError(
            f"batch={batch}, seed={seed}, workers={workers}, rank={rank}, ranks={ranks}: "
            "batch and ranks start at 1; seed, workers and rank at 0; rank stays below ranks"
        )
    if len(dataset) < batch * ranks:
        raise ValueError(
            f"the data set has {len(dataset)} samples, fewer than one batch of {batch} on {ranks} rank(s). "
            "Take a smaller batch or more data."
        )
    return _Loader(_Stream(dataset, batch, seed, rank, ranks), workers)


class _Stream:
    """Position -> this rank's batch there, and the problem of each bad sample that was replaced in it."""

    def __init__(self, dataset: Dataset, batch: int, seed: int, rank: int, ranks: int) -> None:
        self.dataset, self.batch, self.seed, self.rank, self.ranks = dataset, batch, seed, rank, ranks
        self.samples = len(dataset)
        self.step = batch * ranks
        self.skips = getattr(dataset, "on_bad_shard", "stop") == "skip"
        buckets: Sequence[Sequence[int]] = getattr(dataset, "buckets", [range(self.samples)])
        self.buckets = [_Bucket(members, (seed, i)[: len(buckets)]) for i, members in enumerate(buckets)]

    def __getitem__(self, position: int) -> tuple[Batch, dict[int, str]]:
        bucket, start = self.place_of(position)
        start += self.rank * self.batch
        index = [bucket.sample_at(p) for p in range(start, start + self.batch)]
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch(torch.tensor(index)), {}
        samples: list[Sample] = []
        bad: dict[int, str] = {}
        for place, i in enumerate(index, start):
            # Not the next spare that nobody has taken: that would depend on what the other ranks find.
            spares = itertools.count(place + self.step, self.step)
            while (sample := self._read(i, bad)) is None:
                if len(bad) == len(bucket):
                    which = f"all {self.samples} samples" if len(self.buckets) == 1 else f"all {len(bucket)} of a shape"
                    raise BadShard(f"{which} are bad, the last one:\n{bad[i]}")
                i = bucket.sample_at(next(spares))
            samples.append(sample)
        return collate(samples), bad

    def _read(self, index: int, bad: dict[int, str]) -> Sample | None:
        """Sample `index`, or None with its problem added to `bad`."""
        if index in bad:
            return None
        try:
            return self.dataset[index]
        except BadShard as error:
            if not self.skips:
                raise
            bad[index] = str(error)
        return None

    def place_of(self, position: int) -> tuple[_Bucket, int]:
        """Whose turn it is at a position of the whole stream, and the position in that bucket's own."""
        if len(self.buckets) == 1:
            return self.buckets[0], position
        turn = position // self.step
        epoch = position // self.samples  # never too late: whole batches lag behind the samples
        while self.turns_before(epoch + 1).sum() <= turn:
            epoch += 1
        before = self.turns_before(epoch)
        order = np.repeat(np.arange(len(self.buckets)), self.turns_before(epoch + 1) - before)
        order = np.random.default_rng((self.seed, epoch)).permutation(order)
        place = turn - before.sum()
        number = int(order[place])
        return self.buckets[number], int(before[number] + (order[:place] == number).sum()) * self.step

    def turns_before(self, epoch: int) -> np.ndarray:
        """Batches that each bucket gives before an epoch begins [buckets], int64."""
        return epoch * self.sizes // self.step

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array([len(bucket) for bucket in self.buckets], dtype=np.int64)

    @property
    def origin(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        return {
            "samples": self.samples,
            "fingerprint": getattr(self.dataset, "fingerprint", ""),
            "seed": self.seed,
            **({"batch": self.step} if len(self.buckets) > 1 else {}),
        }


class _Bucket:
    """Samples of one shape, and the endless stream of their permutations."""

    def __init__(self, members: Sequence[int], seed: tuple[int, ...]) -> None:
        self.members, self.seed = members, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epochs": {}}  # a worker makes its own permutations

    def __len__(self) -> int:
        return len(self.members)

    def sample_at(self, position: int) -> int:
        """The number in the data set of the sample at a position of the stream."""
        epoch, place = divmod(position, len(self))
        if epoch not in self._epochs:
            # A batch and its replacements touch two epochs; an older permutation would only take memory.
            self._epochs = {e: order for e, order in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = np.random.default_rng((*self.seed, epoch)).permutation(len(self))
        return int(self.members[self._epochs[epoch][place]])


class _Positions(Sampler[int]):
    """The positions from `start` on, each a batch of all ranks behind the last."""

    def __init__(self, step: int) -> None:
        self.start, self.step = 0, step

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield position
            position += self.step


class _Loader(StatefulDataLoader):
    """Counts what it has handed out: torchdata's own state depends on the number of workers, a position does not."""

    def __init__(self, stream: _Stream, workers: int) -> None:
        self._stream, self._positions = stream, _Positions(stream.step)
        self._reported: set[int] = set()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)  # torchdata 0.11, torch 2.13
            super().__init__(
                stream,  # type: ignore[arg-type]
                batch_size=None,
                sampler=self._positions,
                collate_fn=_unchanged,
                num_workers=workers,
                worker_init_fn=deaf_to_signals,
                generator=torch.Generator(),  # else every iter() would draw from the global one
            )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        source = super().__iter__()
        try:
            for batch, bad in source:
                self._positions.start += self._stream.step
                self._report(bad)
                yield batch
        except (EOFError, ConnectionError) as error:
            if "DataLoader worker" in str(error):  # one of the dataset's, told by a worker
                raise
            traceback.clear_frames(error.__traceback__)  # which hold open files
            raise RuntimeError("a DataLoader worker exited unexpectedly, in the middle of a batch") from error
        finally:
            # Left to the garbage collector, which an error's traceback delays, workers end late or in a later fork.
            if self.num_workers:
                _let_go(source)

    def _report(self, bad: dict[int, str]) -> None:
        for index, problem in bad.items():
            if index not in self._reported:
                self._reported.add(index)
                log.warning(
                    "%s\n  left out: %d of %d samples so far", problem, len(self._reported), self._stream.samples
                )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._positions.start, **self._stream.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError if the state belongs to another data set or seed."""
        here = self._stream.origin
        if missing := [name for name in ("position", *here) if name not in state]:
            raise ValueError(f"not the state of a loader: it has no {', '.join(missing)}")
        if state["seed"] != here["seed"]:
            raise ValueError(f"the state was saved with seed {state['seed']}, this loader has seed {here['seed']}")
        if changed := [name for name in ("samples", "fingerprint") if state[name] != here[name]]:
            differences = ", ".join(f"{name} {state[name]} then, {here[name]} now" for name in changed)
            raise ValueError(
                f"the data set changed since the state was saved: {differences}. "
                "Put the same shards back, or start a new loader without this state."
            )
        if state.get("batch", self._stream.step) != self._stream.step and "batch" in here:
            raise ValueError(
                f"the state was saved with batches of {state['batch']} samples, this loader has {self._stream.step}; "
                "the order of a data set of several shapes depends on it. Go on with the same batch."
            )
        self._positions.start = state["position"]


def _let_go(source: Any) -> None:
    """Ends the workers of an iterator whose batches nobody waits for any more.

    PyTorch raises wherever Python is once a worker dies. One that dies in leaving, as where a thread of it is still in
    C++ when the interpreter ends, takes nothing with it: neither the run nor the error that ends it may be lost to it.
    """
    try:
        source._shutdown_workers()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        log.warning("%s It was leaving; no batch is lost.", str(error).strip())
        for worker, queue in zip(source._workers, source._index_queues, strict=True):
            source._clean_up_worker(worker)
            queue.cancel_join_thread()
            queue.close()


def deaf_to_signals(worker: int) -> None:
    """Whoever stops a run signals all of its processes, and the last update needs its data.

    A worker ends when the training process lets it, or is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(item: tuple[Batch, dict[int, str]]) -> tuple[Batch, dict[int, str]]:
    return item
