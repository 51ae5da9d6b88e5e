"""Where and with what a figure was measured."""

from __future__ import annotations

import platform
import subprocess

import torch


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Device, versions, threads and commit, for the JSON of a benchmark."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }
