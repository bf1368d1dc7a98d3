"""The data card: what a person sees who opens the folder of a dataset.

``README.md`` says in words what the samples are and where they come from; ``contact_sheet.png`` shows some of them,
evenly spread over the dataset. Both are derived from ``run.json``, ``SEALED.json`` and ``previews/``.
"""

from typing import Any

from configs.schema import PairsSpec
from pipeline.contact_sheet import contact_sheet
from pipeline.markdown_table import markdown_row
from pipeline.prompts import PromptTable
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import CARD, CONTACT_SHEET, PROMPTS
from pipeline.shards.members import prompt_suffix

HOW_TO_READ = """To read them, in this folder:

```python
import pyarrow.parquet as pq
import webdataset as wds

shards = pq.read_table("manifest/shards.parquet")["path"].to_pylist()
for sample in wds.WebDataset(shards, shardshuffle=False).decode():
    print(sample["__key__"], sorted(sample))
```

Take the paths from the manifest, not from a listing of `shards/`: where two workers made one shard, both tars may lie
there, and only one of them counts.
"""


def write_card(dataset: Dataset, sealed: dict[str, Any]) -> None:
    """Write ``contact_sheet.png`` and ``README.md`` of a sealed dataset of pairs."""
    prompts, per_prompt = PromptTable.open(dataset.storage, PROMPTS), dataset.run.spec.pairs_per_prompt

    def prompt_of(sample_id: int) -> str:
        row = sample_id // per_prompt
        return prompts.rows(row, row + 1)[1][0]

    dataset.storage.write(CONTACT_SHEET, contact_sheet(dataset, prompt_of))
    dataset.storage.write(CARD, card(dataset, sealed).encode())


def card(dataset: Dataset, sealed: dict[str, Any]) -> str:
    """The text of the data card, in Markdown."""
    run, spec = dataset.run, dataset.run.spec
    teacher = run.teacher.model_dump(exclude_none=True)
    source = ", ".join(f"{name} {value}" for name, value in teacher.items() if name != "kind")
    rejected = ", ".join(f"{reason}: {count:,}" for reason, count in sealed["rejected_by_reason"].items()) or "none"
    num_prompts = -(-spec.num_samples // spec.pairs_per_prompt)
    negative = f", negative prompt {spec.negative_prompt!r}" if spec.negative_prompt else ""
    stored = f"{sealed['num_samples']:,} in {sealed['num_shards']:,} shards of {run.layout.samples_per_shard:,}"
    rows = {
        "teacher": f"{spec.teacher.kind} ({source})",
        "teacher weights": f"`{spec.teacher.weights_digest}`",
        "network": f"predicts {spec.teacher.parametrization}, {spec.teacher.dtype}, schedule `{spec.teacher.schedule}`",
        "sampler": _sampler(spec),
        "guidance_scale": f"{spec.guidance_scale:g}{negative}",
        "seed": f"{spec.seed} (noise recipe {spec.noise_recipe})",
        "prompts": f"{num_prompts:,}, {spec.pairs_per_prompt} pairs each, digest `{spec.prompts_digest[:16]}`",
        "samples": f"{stored}, {sealed['num_bytes'] / 1e6:,.1f} MB",
        "prompts cut short": f"{sealed['num_truncated']:,} samples whose prompt is longer than the text encoder reads",
        "rejected": f"{sealed['num_rejected']:,} ({rejected})",
        "device time": f"{sealed['device_seconds'] / 3600:.2f} h",
        "fingerprint": f"`{run.fingerprint}`",
        "content": f"`{sealed['content_sha256']}`",
        "made with": f"{run.code_revision}, first run {run.created}",
    }
    table = "\n".join(map(markdown_row, rows.items()))
    members = "\n".join(markdown_row([f"`{suffix}`", what]) for suffix, what in _members(spec).items())
    return f"""# Noise/image/prompt pairs

![some of the pairs](contact_sheet.png)

| | |
|---|---|
{table}

## A sample

Shards are plain WebDataset tars: `webdataset`, Hugging Face `datasets` and `ray.data` read them as they are.
Members of a sample, each named `KEY.SUFFIX` with a key of nine digits:

| suffix | content |
|---|---|
{members}

{HOW_TO_READ}
`index/*.parquet` has a row per sample (key, offset, prompt, noise digest, status), `manifest/` the same for all shards
at once. Only shards that `commits/` names exist; `stages/verify_shards.py` checks them, `stages/status.py` counts them.
"""


def _sampler(spec: PairsSpec) -> str:
    settings = spec.sampler.model_dump(exclude={"name"}, exclude_none=True)
    listed = ", ".join(f"{name} {value}" for name, value in settings.items() if value != {})
    return f"{spec.sampler.name} ({listed})"


def _members(spec: PairsSpec) -> dict[str, str]:
    fields = spec.fields
    shape = "x".join(map(str, spec.teacher.sample_shape))
    image = "x".join(map(str, spec.teacher.image_shape))
    members = {"json": "key, prompt id, seed, noise digest, guidance_scale, fingerprint"}
    if fields.noise:
        members["noise.npy"] = f"{shape} float16, unit variance: what the sampler started from"
    if fields.x0 == "latent":
        decoded = f"decoder input = x0 / {spec.teacher.latent_scale:g}"
        members["x0.npy"] = f"{shape} {fields.x0_dtype}, the teacher's latent ({decoded})"
    if fields.x0 == "pixels":
        members["x0.npy"] = f"{image} {fields.x0_dtype}, the teacher's image in [-1, 1], unclipped"
    if fields.text_embedding:
        members["text_embedding.npy"] = "tokens x width float16"
    if fields.prompt:
        suffix = prompt_suffix(spec)
        members[suffix] = "the class, a number from 0" if suffix == "cls" else "the prompt"
    if fields.image != "none":
        members[fields.image] = f"{image}, 8 bit"
    return members
