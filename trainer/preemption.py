"""Stopping between two steps when the system asks for it.

Schedulers send SIGTERM (some SIGUSR1) a while before they kill; a person presses Ctrl-C. The handler notes it and does
nothing else: a step that has begun is finished, on every process, and the loop saves and ends. A signal reaches the
processes at different moments, or one of them alone, so whether to stop is agreed on: after the same step, all or none.

Launchers differ. ``torchrun``, and ``accelerate launch`` with several processes, pass SIGTERM and SIGINT on and kill
after 30 seconds (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says otherwise); SIGUSR1 they do not pass on.
``accelerate launch`` with one process passes nothing on.
"""

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """A context in which these signals ask for a stop. Python allows handlers in the main thread only.

    A second SIGINT raises KeyboardInterrupt: whoever presses Ctrl-C twice does not want to wait for the step.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that this process has got."""
        self._previous: dict[signal.Signals, Any] = {}
        self._num_interrupts = 0

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def should_stop(self, accelerator: "Accelerator") -> bool:
        """Whether any process has got a signal: the same answer on all of them. All must ask, after the same step."""
        if self.received is not None:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts == 2:
                raise KeyboardInterrupt
