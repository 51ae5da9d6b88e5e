"""DCP's own classes, with values that are pickled early, and read without running code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from jvpgraph.trainer.run.checkpoint.manifest import summary
from jvpgraph.trainer.run.checkpoint.state import Leaf, PerRank, State, per_rank, pickled, stateful, unpickled
from jvpgraph.trainer.run.ranks import Ranks


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
