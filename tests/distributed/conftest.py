"""Prints the table of errors behind the results."""

from __future__ import annotations

from typing import Any

from tests.distributed.models import printed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = printed()
    if lines:
        terminalreporter.section("errors relative to one process: value, tangent, gradients")
        for line in lines:
            terminalreporter.write_line(line)
