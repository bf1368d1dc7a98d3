"""Stopping between two steps when the system asks for it.

Schedulers send SIGTERM (some SIGUSR1) a while before they kill; a person presses Ctrl-C. The handler notes it and does
nothing else: a step that has begun is finished, on every process, and the loop saves and ends. A signal reaches the
processes at different moments, or one of them alone, so whether to stop is agreed on: after the same step, all or none.

Launchers differ. ``torchrun``, and ``accelerate launch`` with several processes, pass SIGTERM and SIGINT on and kill
after 30 seconds (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says otherwise); SIGUSR1 they do not pass on.
``accelerate launch`` with one process passes nothing on: it ends, as any launcher does that is killed with -9. Its
processes would train on alone and keep the run directory from whoever wants to go on, so that the end of a launcher
asks for a stop as well.
"""

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SET_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # a shell may end, and its command go on


class StopSignal:
    """A context in which these signals ask for a stop. Python allows handlers in the main thread only.

    A second SIGINT raises KeyboardInterrupt: whoever presses Ctrl-C twice does not want to wait for the step.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that this process has got, or what else asked for a stop."""
        self._launcher = os.getppid() if any(name in os.environ for name in _SET_BY_LAUNCHERS) else None
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
        """Whether any process is asked to stop: the same answer on all of them. All must ask, after the same step."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.received = self.received or "the end of its launcher"
        if self.received is not None:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts == 2:
                raise KeyboardInterrupt
