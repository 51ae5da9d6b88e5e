"""Data sets with random access, and the one endless stream of batches that a training run reads from them."""

from jvpgraph.trainer.data.digits import Digits, digits
from jvpgraph.trainer.data.loader import loader
from jvpgraph.trainer.data.sample import BadShard, Dataset, Sample, collate
from jvpgraph.trainer.data.shards import Shards, safetensors_folder, webdataset

__all__ = [
    "BadShard",
    "Dataset",
    "Digits",
    "Sample",
    "Shards",
    "collate",
    "digits",
    "loader",
    "safetensors_folder",
    "webdataset",
]
