"""What a dataset will cost, before a cluster is asked for anything.

Counts follow from the spec. Bytes and seconds come from a probe: three shards of one batch each, made by the very
worker of a run into a temporary folder; the first one warms up and is not timed.
"""

import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import torch

from configs.fingerprint import fingerprint
from configs.schema import GeneratePairsConfig, PairsLayout
from pipeline import teachers
from pipeline.pairs import PairWorker
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS
from pipeline.shards.records import Run
from pipeline.shards.storage import Storage

_TAR_BLOCK = 512
_PROBE_BATCHES = 3


def print_plan(config: GeneratePairsConfig, run: Run, prompts: Path) -> None:
    """Print samples, shards, teacher evaluations, bytes per field and, after a probe, device-hours."""
    spec, num = run.spec, run.spec.num_samples
    evaluations = teachers.sampler_evaluations(config.teacher, spec.sampler, spec.guidance_scale)
    num_prompts = -(-num // spec.pairs_per_prompt)
    print(f"samples              {num:,} ({spec.pairs_per_prompt} for each of {num_prompts:,} prompts)")
    print(f"shards               {run.num_shards:,} of {run.layout.samples_per_shard:,} samples")
    print(f"teacher evaluations  {num * evaluations:,} ({evaluations} a sample)")
    print(f"fingerprint          {run.fingerprint}")
    if config.runtime.gpus_per_actor > 0 and not torch.cuda.is_available():
        print("no probe: runtime.gpus_per_actor asks for a GPU and this machine has none; bytes and hours are left out")
        return
    sizes, images_per_second = _probe(config, run, prompts)
    for suffix, size in sorted(sizes.items()):
        print(f"  {suffix:<18} {size:>12,.0f} bytes a sample, {_human(size * num)} in all")
    total = sum(sizes.values())
    print(f"  {'all':<18} {total:>12,.0f} bytes a sample, {_human(total * num)} in all")
    where = torch.cuda.get_device_name() if config.runtime.gpus_per_actor > 0 else "a CPU worker of this machine"
    hours = num / images_per_second / 3600
    print(f"device-hours         {hours:,.2f} at {images_per_second:,.2f} images/s on {where}")
    workers = f"{config.runtime.actors} actors" if config.runtime.actors else "1 actor; n actors take 1/n"
    print(f"hours                {hours / (config.runtime.actors or 1):,.2f} with {workers}")


def _probe(config: GeneratePairsConfig, run: Run, prompts: Path) -> tuple[Counter[str], float]:
    """Bytes a sample by suffix, tar headers and padding included; images a second of one worker."""
    size = min(config.runtime.batch_size, run.spec.num_samples, run.layout.samples_per_shard)
    spec = run.spec.model_copy(update={"num_samples": min(_PROBE_BATCHES * size, run.spec.num_samples)})
    layout = PairsLayout(samples_per_shard=size)
    num_shards = -(-spec.num_samples // size)
    small = run.model_copy(
        update={"spec": spec, "fingerprint": fingerprint(spec), "layout": layout, "num_shards": num_shards}
    )
    sizes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(folder)
        dataset = Dataset.create_or_open(storage, small)
        storage.upload(PROMPTS, prompts)
        worker = PairWorker(storage.uri, small.fingerprint, config.teacher, config.runtime)
        results = [worker.run(shard) for shard in range(num_shards)]
        num_samples = sum(result.commit.num_samples for result in results)
        for result in results:
            with tarfile.open(Path(folder) / result.commit.path) as tar:
                for info in tar:
                    blocks = 1 + -(-info.size // _TAR_BLOCK)
                    sizes[info.name.partition(".")[2]] += blocks * _TAR_BLOCK
    timed = results[1:] or results
    seconds = sum(result.device_seconds for result in timed)
    per_sample = Counter({suffix: total // max(num_samples, 1) for suffix, total in sizes.items()})
    return per_sample, sum(len(dataset.run.sample_ids(result.commit.shard)) for result in timed) / seconds


def _human(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
