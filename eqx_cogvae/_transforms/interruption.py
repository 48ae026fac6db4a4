"""Ctrl-C at a moment when it does no harm."""

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """A block in which SIGINT is only noted: `raise_pending` hands it on afterwards.

    A second one is not held back. Threads other than the main one are never interrupted.
    """

    def __init__(self):
        self._handler: Any = None
        self._pending: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    @property
    def is_pending(self) -> bool:
        """True while a signal was noted and not handed on."""
        return self._pending is not None

    def raise_pending(self) -> None:
        """Does what the signal would have done."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._handler(*pending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            self._handler(number, frame)
        self._pending = number, frame


__all__ = ["Interruption"]
