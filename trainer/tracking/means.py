"""Weighted means of tensors, collected where the tensors are and read once.

For each name two float64 numbers are kept on the device, sum_i n_i x_i and sum_i n_i. Adding launches a few small
kernels and never waits for the device; :meth:`Means.take` sums the numbers over all processes by one all-reduce and
reads them together. The result is the same on every process, and the same whenever the same is added.

A mean over nothing (all n_i are 0) is absent; x_i with n_i = 0 does not count, not even if it is not finite. Any other
value that is not finite makes its mean so: a number is never left out in silence.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Means:
    """Means and totals by name.

    Args:
        device: where the tensors are that will be added.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._roots: set[str] = set()

    def add(self, name: str, values: Tensor | float, count: Tensor | float = 1, *, root: bool = False) -> None:
        """Add values to a mean.

        Args:
            name: of the mean. All processes must add the same names between two calls of :meth:`take`.
            values: any shape and dtype; a graph is left alone.
            count: how many things each value stands for, of a shape that broadcasts to that of ``values``.
            root: the mean's square root is wanted: the root of a mean square.
        """
        values, count = self._on_device(values), self._on_device(count)
        weighted = torch.where(count > 0, values * count, 0.0)
        self._accumulate(self._sums, name, torch.stack((weighted.sum(), count.expand_as(weighted).sum())))
        if root:
            self._roots.add(name)

    def add_binned(self, name: str, values: Tensor, bins: Tensor, num_bins: int) -> None:
        """Add each of ``values``, (B,), to the mean ``NAME/bucketN`` of its bin N.

        Args:
            name: of the means.
            values: any dtype, (B,).
            bins: whole numbers in [0, num_bins), (B,), of any dtype.
            num_bins: how many means there are.
        """
        for number in range(num_bins):  # compared, not scattered: in floating point, scattering has no fixed order
            self.add(f"{name}/bucket{number}", values, bins == number)

    def add_total(self, name: str, number: Tensor | float) -> None:
        """Add a tensor's sum, or a number, to a total."""
        self._accumulate(self._totals, name, self._on_device(number).sum())

    def take(self, accelerator: "Accelerator") -> dict[str, float]:
        """All means and totals over all processes since the last call, by name. Every process must call it."""
        means, totals = sorted(self._sums), sorted(self._totals)
        numbers = [self._sums[name] for name in means] + [self._totals[name].unsqueeze(0) for name in totals]
        if not numbers:
            return {}
        reduced = accelerator.reduce(torch.cat(numbers), "sum")
        assert isinstance(reduced, Tensor)
        read = reduced.tolist()
        values = {
            name: math.sqrt(total / count) if name in self._roots else total / count
            for name, total, count in zip(means, read[0::2], read[1::2], strict=False)
            if count > 0
        }
        values |= dict(zip(totals, read[2 * len(means) :], strict=True))
        self._sums.clear()
        self._totals.clear()
        return values

    def _on_device(self, number: Tensor | float) -> Tensor:
        if isinstance(number, Tensor):
            return number.detach().to(self._device, torch.float64)
        return torch.full((), number, dtype=torch.float64, device=self._device)  # a kernel, where a copy would wait

    @staticmethod
    def _accumulate(numbers: dict[str, Tensor], name: str, number: Tensor) -> None:
        numbers[name] = numbers[name] + number if name in numbers else number
