"""What is said when a command fails."""

from __future__ import annotations

import errno

import torch

from jvpgraph.errors import JvpgraphError
from jvpgraph.trainer.plug import PlugError
from jvpgraph.trainer.run.checkpoint import NotWritten
from jvpgraph.trainer.run.stopping import Stopped as Stopped
from jvpgraph.trainer.settings import SettingsError

EXPECTED = (JvpgraphError, ValueError, OSError, FloatingPointError, ImportError, torch.OutOfMemoryError)
"""Failures with a message that says what to do; anything else is a bug and keeps its traceback."""

WRONG_USE = (SettingsError, PlugError)
GOES_ON = "The same command goes on from there."
RESUMES = "The same command resumes from the last checkpoint."


def explain(error: Exception, command: str) -> str:
    """The message of a failure, and what to do about it where the message cannot know."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        advice = f"Free some space. {RESUMES}" if command == "train" else "Free some space and try again."
        return f"the disk is full{where}: {error.strerror}\n{advice}"
    if isinstance(error, torch.OutOfMemoryError) and command == "train":
        advice = (
            "a smaller stages.N.batch with more stages.N.accumulate, student.checkpoint_blocks=true or student.lora"
        )
        return f"{error}\nTry {advice}."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, NotWritten) and command == "train":
        return f"{error}\n{RESUMES}"
    return str(error) or type(error).__name__
