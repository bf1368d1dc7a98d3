"""Systems timed on one device, one after the other, each pipeline loaded once for all its step counts."""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from configs.evaluate_schema import LatencyConfig
from configs.schema import PairsRuntime, TeacherConfig
from pipeline import teachers
from pipeline.evaluation.results import Timing
from pipeline.evaluation.systems import System
from pipeline.metrics.latency import device_name, measure_latency
from pipeline.prompts import PromptTable
from pipeline.shards.layout import PROMPTS
from pipeline.teachers.base import Teacher


class Stopwatch:
    """Times systems with the device, the settings and the number of threads that workers have.

    Args:
        config: batch sizes and repeats.
        runtime: of the workers.
        go_on: called before each batch; raises when timing is to stop.
    """

    def __init__(self, config: LatencyConfig, runtime: PairsRuntime, go_on: Callable[[], None]) -> None:
        self._config = config
        self._runtime = runtime
        self._go_on = go_on
        self._load = cache(self._load_anew)
        self._device = torch.device("cuda" if runtime.gpus_per_actor > 0 else "cpu")
        self._is_here = self._device.type == "cpu" or torch.cuda.is_available()
        torch.set_num_threads(max(1, round(runtime.cpus_per_actor)))

    def has_timed(self, timings: Sequence[Timing]) -> bool:
        """Whether times that are kept will do: there are some, and no other device or preparation of the network here.

        Where workers have GPUs and this process has not, any will do: it has none to put in their place.
        """
        # Without the precision, which is the system's.
        names = {timing.device.rpartition(", ")[0] for timing in timings}
        return bool(names) and (not self._is_here or names == {self._name()})

    def time(self, system: System) -> tuple[Timing, ...]:
        """One timing a batch size, of its first prompt; none where workers have GPUs and this process has not."""
        if not self._is_here:
            print(f"{system.title}: not timed, runtime.gpus_per_actor asks for a GPU and this machine has none")
            return ()
        spec = system.pairs.spec
        prompt = PromptTable.open(system.dataset.storage, PROMPTS).rows(0, 1)[1][0]
        found: list[Timing] = []
        for batch_size in self._config.batch_sizes:
            latency = measure_latency(
                self._load(system.pairs.teacher),
                spec.sampler,
                spec.guidance_scale,
                evaluations_per_image=system.evaluations,
                batch_size=batch_size,
                prompt=prompt,
                negative_prompt=spec.negative_prompt,
                warm_up=self._config.warmup,
                repetitions=self._config.repeats,
                go_on=self._go_on,
            )
            total = latency.total
            found.append(
                Timing(
                    batch_size=batch_size,
                    device=f"{self._name()}, {latency.dtype}",
                    total=(total.lower, total.median, total.upper),
                    text_encoder=latency.text_encoder.median,
                    network=latency.network.median,
                    decoder=latency.decoder.median,
                )
            )
        return tuple(found)

    def _name(self) -> str:
        """The device and what makes a network faster on it: times that differ in it do not compare."""
        prepared = {"compiled": self._runtime.compile, "channels last": self._runtime.channels_last}
        return ", ".join([device_name(self._device), *(name for name, is_so in prepared.items() if is_so)])

    def _load_anew(self, config: TeacherConfig) -> Teacher:
        runtime = self._runtime
        return teachers.load(config, self._device, compile=runtime.compile, channels_last=runtime.channels_last)
