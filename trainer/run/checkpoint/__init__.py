"""Checkpoints that survive kill -9, full disks and flipped bits, in the format of torch.distributed.checkpoint (DCP).

    step-00000123.partial/   while it is written
    step-00000123/           complete: renamed after everything in it is on the disk
        __0_0.distcp ...     DCP: one file of tensors and values per rank
        .metadata            DCP: which tensor lies where, so that another number of ranks can read it
        manifest.json        ours, written last: size and CRC-32 of every file

Planning, deduplication, the files and resharding are DCP's own classes; `Checkpoints` takes the place of its
`save`/`async_save`/`load`, which know nothing of complete, damaged or older checkpoints. `async_save` also stages on
each rank by itself, so that one which fails there leaves the others waiting, and warns at every save of one process.

Security: values are read with `torch.load(weights_only=True)`, and DCP's `.metadata`, a pickle, with an unpickler
that builds nothing but DCP's own records. So a checkpoint cannot run code. A checksum is no signature: weights from
an untrusted source are still untrusted weights.
"""

from jvpgraph.trainer.run.checkpoint.state import OnePiece, PerRank
from jvpgraph.trainer.run.checkpoint.store import CheckpointError, Checkpoints, NotWritten

__all__ = ["CheckpointError", "Checkpoints", "NotWritten", "OnePiece", "PerRank"]
