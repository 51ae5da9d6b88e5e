"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "flash-attn", "flash-attn-4", "jvp_flash_attention")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, threads and commit, for the JSON of a benchmark."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "packages": packages(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def packages() -> dict[str, str]:
    """Versions of what is compared and of what it runs on, where it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """JVPGRAPH_COMMIT, for sources that were copied here; else the repository's commit, -dirty behind it if files
    differ."""
    if named := os.environ.get("JVPGRAPH_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"
