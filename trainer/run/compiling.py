"""A sign of life while graphs are compiled, which takes a minute and more where a network is large."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo.callback import callback_handler

log = logging.getLogger(__name__)

Show = Callable[[str], Any]
EVERY = 1.0  # seconds between two signs on a terminal
SHORT = 1.0  # seconds up to which nobody is told afterwards how long it took


class Compiling:
    """Follows what torch.compile does, from its first graph in a step to the end of that step.

    Args:
        show: shows words in the progress line of a terminal; None: another process says what there is to say.
    """

    def __init__(self, show: Show | None) -> None:
        self.show = show
        self.doing = ""  # for which shape of which network
        self.happened = False
        self.said: set[str] = set()
        self.begun = 0.0
        self.done = threading.Event()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        self.happened = False
        callback_handler.register_start_callback(self._start)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(self._start)
            if self.happened:
                self._end()

    def _start(self, _: Any) -> None:
        """Called for every graph; it is one of several in most steps that compile."""
        if not self.happened:
            self.happened, self.begun = True, time.perf_counter()
            self.done = threading.Event()
            if self.show is not None and sys.stderr.isatty():
                threading.Thread(target=self._tick, args=(self.show, self.done), daemon=True).start()
        if self.show is not None and self.doing not in self.said:
            self.said.add(self.doing)
            log.info("compiling %s: once per shape, a minute or more for a large network", self.doing)

    def _tick(self, show: Show, done: threading.Event) -> None:
        while not done.wait(EVERY):
            show(f"compiling {self.doing}, {time.perf_counter() - self.begun:.0f} s")

    def _end(self) -> None:
        self.done.set()
        seconds = time.perf_counter() - self.begun
        if self.show is not None and seconds > SHORT:
            log.info("compiled, and run for the first time, in %.0f s", seconds)
