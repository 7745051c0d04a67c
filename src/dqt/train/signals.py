"""Ctrl-C and SIGTERM as a request: the first one ends the run in good order, the second one at once.

Before the first step there is nothing to save, and the first signal ends what is going on as soon as Python
comes to it, by KeyboardInterrupt. From `graceful` on it is only noted, and whoever asks for `name` finishes a
step and saves.

Python handles signals between two of its own steps, and the training of a tokenizer or a compiler are one
step that may take minutes. So a thread reads the signals as they come, and leaves at the second one whatever
else is going on. Nothing is half-written then either, because directories become current by one rename.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within its block, `name` is the first signal that came, or None.

    Only the main thread can receive signals; elsewhere nothing is caught.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._noted = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._watcher: threading.Thread | None = None

    def graceful(self) -> None:
        """From here on the first signal is noted, and interrupts nothing."""
        self._noted = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True)
            self._watcher.start()
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pipe and self._watcher:
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._pipe[1], b"\0")
            self._watcher.join()
            for end in self._pipe:
                os.close(end)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if not self._noted:
            raise KeyboardInterrupt

    @staticmethod
    def _watch(descriptor: int) -> None:
        """Reads a byte for each signal that this process handles."""
        seen = 0
        while number := os.read(descriptor, 1)[0]:
            seen += number in SIGNALS
            if seen == 2:
                os._exit(128 + number)
