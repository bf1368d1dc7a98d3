"""Names, members and columns of a dataset of pairs, or of real images.

    ROOT/run.json                                 identity, create-only
    ROOT/prompts.parquet                          the prompt table that pairs refer to, or
    ROOT/sources.parquet                          the list of the real images that are encoded
    ROOT/lease.json                               who is working on it, while somebody is
    ROOT/shards/{run8}-{shard:06d}-{sha12}.tar    plain WebDataset; members {key}.{suffix}, key = 9 digits
    ROOT/index/{shard:06d}-{sha12}.parquet        one row per sample, rejected ones included
    ROOT/commits/{shard:06d}.json                 create-only: the one point at which a shard comes to exist
    ROOT/parked/{shard:06d}.json                  a shard that failed, with its reason
    ROOT/previews/{key}.png                       some small pictures for the data card
    ROOT/events/*.jsonl  ROOT/report.json         what the runs did
    ROOT/manifest/*.parquet  ROOT/SEALED.json     all commits in one table, written when every shard is in
    ROOT/README.md  ROOT/contact_sheet.png        the data card
    ROOT/scores/{name}/*                          what was measured of the images (pipeline/scoring/score_table.py)

Shards and indices carry their content's sha256 in their names, so two writers of one shard never overwrite each
other with different bytes. The run's fingerprint leads a shard's name because readers cache shards by base name.
"""

import hashlib
from dataclasses import dataclass

RUN = "run.json"
PROMPTS = "prompts.parquet"
SOURCES = "sources.parquet"
LEASE = "lease.json"
SEALED = "SEALED.json"
REPORT = "report.json"
CARD = "README.md"
CONTACT_SHEET = "contact_sheet.png"
SHARDS_TABLE = "manifest/shards.parquet"

MAX_SAMPLES = 10**9
"""Keys have nine digits."""
MAX_SHARDS = 10**6
"""Shard numbers have six digits."""


def key(sample_id: int) -> str:
    """The WebDataset key of a sample. No dot: WebDataset cuts a member's name at its first one."""
    return f"{sample_id:09d}"


def shard_path(fingerprint: str, shard: int, sha256: str) -> str:
    """Path of a shard's tar below the root."""
    return f"shards/{fingerprint[:8]}-{shard:06d}-{sha256[:12]}.tar"


def index_path(shard: int, sha256: str) -> str:
    """Path of a shard's index below the root."""
    return f"index/{shard:06d}-{sha256[:12]}.parquet"


def commit_path(shard: int) -> str:
    """Path of a shard's commit record below the root."""
    return f"commits/{shard:06d}.json"


def parked_path(shard: int) -> str:
    """Path of the note on a shard that failed, below the root."""
    return f"parked/{shard:06d}.json"


def preview_path(sample_id: int) -> str:
    """Path of a sample's preview picture below the root."""
    return f"previews/{key(sample_id)}.png"


def samples_table(part: int) -> str:
    """Path of one part of the compacted sample index below the root."""
    return f"manifest/samples-{part:05d}.parquet"


def sha256_hex(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a shard's index says of any sample.

    Attributes:
        key: nine digits, the sample id.
        shard: number of the shard.
        row: position among the shard's stored samples; -1 for a rejected sample.
        offset: byte offset of the sample's first tar header in the shard; -1 for a rejected sample.
        length: bytes from there to the end of the sample's last member, padding included; 0 for a rejected sample.
        prompt: text of the prompt.
        status: ``ok`` or ``rejected``.
        reason: why it was rejected; empty for ``ok``.
    """

    key: str
    shard: int
    row: int
    offset: int
    length: int
    prompt: str
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class IndexRow(Row):
    """One pair in a shard's index.

    Attributes:
        prompt_id: id of the prompt in the prompt table.
        prompt_truncated: the text encoder reads only the beginning of the prompt, because it is too long.
        seed: the dataset's seed.
        noise_digest: see :func:`pipeline.noise.noise_digest`.
        guidance_scale: the dataset's guidance weight.
        made_in_float32: the first attempt was bad, and this sample was made again alone, with float32 networks.
    """

    prompt_id: str
    prompt_truncated: bool
    seed: int
    noise_digest: str
    guidance_scale: float
    made_in_float32: bool


@dataclass(frozen=True, kw_only=True)
class ImageRow(Row):
    """One real image in a shard's index.

    Attributes:
        name: of the image in its source.
        source_sha256: of the image file's bytes; empty if it could not be read.
        label: number of its class, -1 without one.
    """

    name: str
    source_sha256: str
    label: int
