"""What is said when a command fails: a line of what, and a line of what to do."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError

from jvpgraph.errors import JvpgraphError
from jvpgraph.trainer.plug import USER_FILES, PlugError, described
from jvpgraph.trainer.run.checkpoint import NotWritten
from jvpgraph.trainer.run.stopping import Stopped
from jvpgraph.trainer.settings import SettingsError

__all__ = ["EXPECTED", "GOES_ON", "RESUMES", "WRONG_USE", "Stopped", "explain", "explain_other"]

EXPECTED = (
    JvpgraphError,
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
    torch.OutOfMemoryError,
    SafetensorError,
)
"""Failures with a message that says what to do; of others, `explain_other` knows some, and the rest are bugs."""

WRONG_USE = (SettingsError, PlugError)
GOES_ON = "The same command goes on from there."
RESUMES = "The same command resumes from the last checkpoint."
LOST = re.compile(r"closed by peer|reset by peer|[Tt]imed out|Broken pipe|remote process|heartbeat|NCCL")


def explain(error: Exception, command: str, out: Path | None = None) -> str:
    """The message of a failure, and what to do about it where the message cannot know.

    Args:
        error: one of EXPECTED.
        command: whose failure it is.
        out: where it was writing to, for errors of libraries that do not say.
    """
    number, reason, file = system_error(error)
    where = file or (None if out is None else str(out))
    if number in (errno.ENOSPC, errno.EDQUOT):
        advice = f"Free some space. {RESUMES}" if command == "train" else "Free some space and try again."
        return f"the disk is full{f' ({where})' if where else ''}: {reason}\n{advice}"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        option = {"train": "`out`", "evaluate": "RUN, a copy of the folder"}.get(command, "--out")
        return f"{where or 'a file'}: {reason}\nMake it readable and writable, or choose another place by {option}."
    if isinstance(error, torch.OutOfMemoryError) and command == "train":
        advice = (
            "a smaller stages.N.batch with more stages.N.accumulate, student.checkpoint_blocks=true or student.lora; "
            "`jvpgraph plan` says what helps most"
        )
        return f"{error}\nTry {advice}."
    if number is not None and where:
        return f"{where}: {reason}\nLook whether the path is right, and give another one if not."
    if isinstance(error, NotWritten) and command == "train":
        return f"{error}\n{RESUMES}"
    return str(error) or type(error).__name__


def system_error(error: Exception) -> tuple[int | None, str, str | None]:
    """Number, words and file of an error of the system, also of one that a Rust library tells in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or str(error), error.filename
    match = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return (int(match[1]), os.strerror(int(match[1])), None) if match else (None, "", None)


def explain_other(error: Exception, command: str) -> str | None:
    """A failure that is none of EXPECTED and no bug: in a file of the user's, or of another process of the run."""
    go_on = f"\n{RESUMES}" if command == "train" else ""
    if any(frame.filename in USER_FILES for frame in traceback.extract_tb(error.__traceback__)):
        return f"{described(error)}{go_on}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)):
        first = str(error).strip().splitlines()[0]
        return (
            f"another process of this run is gone or hangs ({first}).\nIts own message says why; without one it was "
            f"killed, often for its memory.{go_on}"
        )
    return None
