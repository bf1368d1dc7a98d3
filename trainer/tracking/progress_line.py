"""What a person sees while a run trains: a live bar on a terminal, elsewhere a line every ten seconds."""

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_PERIOD_S = 10.0


class ProgressLine:
    """Shows how far a run is. For one process of it.

    Args:
        step: steps that were done before.
        total_steps: steps that will be.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        self._first_step = self._step = self._shown_step = step
        self._total_steps = total_steps
        self._started = self._shown = time.monotonic()
        self._values: Mapping[str, float] = {}
        self._bar = tqdm(
            total=total_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def tick(self, step: int) -> None:
        """Note that ``step`` steps are done, and say so if it is time to."""
        self._bar.update(step - self._step)
        self._step = step
        if self._bar.disable and time.monotonic() - self._shown >= _PERIOD_S:
            self._print()

    def show(self, values: Mapping[str, float]) -> None:
        """Show these metrics from now on."""
        self._values = values
        self._bar.set_postfix_str(" | ".join(self._parts()), refresh=False)

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one, and after the steps that are done."""
        if self._bar.disable and self._step > self._shown_step:
            self._print()
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Show where the run has got to."""
        if self._bar.disable and self._step > self._shown_step:
            self._print()
        self._bar.close()

    def _print(self) -> None:
        self._shown, self._shown_step = time.monotonic(), self._step
        done = self._step / self._total_steps
        remaining = (self._total_steps - self._step) * self._seconds_per_step()
        eta = f"ETA {tqdm.format_interval(remaining)}" if math.isfinite(remaining) else "ETA ?"
        head = f"step {self._step:,}/{self._total_steps:,} ({done:.0%})"
        print(" | ".join([head, *self._parts(), eta]), flush=True)

    def _seconds_per_step(self) -> float:
        """As last logged: the first step of a process (memory, compilation) is no measure. Until then, the mean."""
        num_steps = self._step - self._first_step
        mean = (time.monotonic() - self._started) / num_steps if num_steps else math.inf
        return self._values.get("seconds_per_step", mean)

    def _parts(self) -> list[str]:
        parts = {
            "{:.1f} images/s": ("images_per_second",),
            "loss student {:.4g}, critic {:.4g}": ("loss/student", "loss/critic"),
            "loss student {:.4g}": ("loss/student",),
            "gradient norm {:.3g}, {:.3g}": ("grad_norm/student", "grad_norm/critic"),
            "gradient norm {:.3g}": ("grad_norm/student",),
            "data wait {:.0%}": ("data_wait_share",),
        }
        shown: dict[str, str] = {}
        for text, names in parts.items():
            if all(name in self._values for name in names):
                shown.setdefault(names[0], text.format(*(self._values[name] for name in names)))
        return list(shown.values())
