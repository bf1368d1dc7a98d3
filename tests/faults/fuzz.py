"""Hostile files at random: whatever reads them takes them, or refuses them in a line.

    python tests/faults/fuzz.py --seed 0 --rounds 1000 [--targets prompts index]

A round is decided by its target and number alone, so that a failure is repeated by ``--seed NUMBER --rounds 1``. It
fails when anything but a UserError or a RunStopped of one line comes out of it, or when a file appears outside of its
output. Address space is limited, so that a file that asks for too much fails too.
"""

import argparse
import io
import json
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from random import Random
from shutil import copytree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import yaml  # noqa: E402
from support.forge import members, recommit, record, reindexed, tar_of  # noqa: E402
from support.mutations import VALUES, of_bytes, of_tree  # noqa: E402
from support.prompt_tables import save  # noqa: E402
from support.real_images import image_files, write_parquet, write_tars  # noqa: E402
from support.toy import toy_config  # noqa: E402

from configs.encode_schema import ParquetSource, WebDatasetSource  # noqa: E402
from configs.errors import RunStopped, UserError  # noqa: E402
from configs.evaluate_schema import EvaluateConfig  # noqa: E402
from configs.load import parse  # noqa: E402
from configs.schema import GeneratePairsConfig, PromptsConfig, StableDiffusionTeacherConfig, StatusConfig  # noqa: E402
from configs.train_schema import TrainConfig  # noqa: E402
from pipeline.evaluation.reference import Reference  # noqa: E402
from pipeline.generate import generate_pairs  # noqa: E402
from pipeline.images.source import listed, open_source  # noqa: E402
from pipeline.images.source_table import SourceImage, SourceTable, write_source_table  # noqa: E402
from pipeline.inspect_dataset import status  # noqa: E402
from pipeline.prompts import PromptTable, prepare_prompts  # noqa: E402
from pipeline.shards.dataset import Dataset  # noqa: E402
from pipeline.shards.layout import sha256_hex  # noqa: E402
from pipeline.shards.reader import PairReader  # noqa: E402
from pipeline.shards.selection import read_selection, write_selection  # noqa: E402
from pipeline.shards.storage import Storage  # noqa: E402
from pipeline.shards.verify import verify  # noqa: E402

ADDRESS_SPACE = 12 << 30
"""Bytes; the libraries alone map several gigabytes."""


@cache
def dataset() -> Path:
    """Two shards of four toy pairs."""
    folder = Path(tempfile.mkdtemp())
    sections = {"spec": {"pairs_per_prompt": 2, "num_samples": 8}, "layout": {"samples_per_shard": 4}}
    with redirect_stdout(io.StringIO()):
        generate_pairs(toy_config(folder / "root", folder, **sections))
    return folder / "root"


@cache
def pipeline_folder() -> Path:
    """A Stable Diffusion pipeline of a few thousand weights."""
    from support.tiny_sd import build

    return build(Path(tempfile.mkdtemp()) / "sd")


def look(root: Path) -> None:
    """Everything that reads a dataset; raises what the last of them refuses it with."""
    refused: UserError | RunStopped | None = None
    for read in (_status, _verify, _train):
        try:
            read(root)
        except (UserError, RunStopped) as error:
            refused = error
            _check_line(error)
    if refused is not None:
        raise refused


def _status(root: Path) -> None:
    with redirect_stdout(io.StringIO()):
        status(StatusConfig(root=str(root)))


def _verify(root: Path) -> None:
    if problems := verify(Dataset.open(Storage.open(str(root)))).problems:
        raise RunStopped(max(problems, key=lambda line: line.count("\n")))


def _train(root: Path) -> None:
    options = {"seed": 0, "window": 1, "holdout": 1, "selection": None, "cache_folder": root, "cache_bytes": 0}
    reader = PairReader(str(root), allow_partial=True, **options)
    reader.held_out()
    reader.read(range(reader.num_samples))


def _check_line(error: Exception) -> None:
    assert str(error).strip(), f"{type(error).__name__} without a word"
    assert "\n" not in str(error), f"{type(error).__name__} of several lines: {error}"


# -------------------------------------------------------------------------------------- targets: (random, folder)


def configs(random: Random, folder: Path) -> None:
    """YAML: mistakes of a configuration are a line each."""
    models = {"toy/pairs": GeneratePairsConfig, "sd15/train": TrainConfig, "sd15/evaluate": EvaluateConfig}
    source = random.choice(list(models))
    data = (ROOT / f"configs/{source}.yaml").read_bytes()
    if random.random() < 0.5:
        data = yaml.dump(of_tree(random, yaml.safe_load(data)), allow_unicode=True).encode("utf-8", "surrogatepass")
    else:
        data = of_bytes(random, data)
    (folder / "config.yaml").write_bytes(data)
    try:
        parse(models[source], argv=["--config", str(folder / "config.yaml"), "--output", str(folder / "out")])
    except UserError as error:
        raise UserError(str(error).splitlines()[0]) from None


def prompts(random: Random, folder: Path) -> None:
    """Prompt files of every format, and prompts that are no words."""
    texts = [
        "a cat",
        "a \u202edog",
        "\0x",
        None,
        "../../etc/passwd",
        "x" * random.choice([1, 3000]),
        "e\u0301",
        "\ufeff",
    ]
    source = folder / f"prompts.{random.choice(['txt', 'csv', 'jsonl', 'parquet'])}"
    save(source, random.sample(texts, len(texts)))
    source.write_bytes(of_bytes(random, source.read_bytes()))
    blocklist = str(source) if random.random() < 0.1 else None
    prepare_prompts(PromptsConfig(path=str(source), blocklist=blocklist), folder / "out" / "table.parquet")


@cache
def list_of_images() -> bytes:
    """A list of eight images."""
    path = Path(tempfile.mkdtemp()) / "list.parquet"
    images = [SourceImage(f"{number}.png", 9, sha256="0" * 64, prompt="a cat") for number in range(8)]
    write_source_table(path, images)
    return path.read_bytes()


@cache
def real_images() -> tuple[bytes, bytes]:
    """Four images with classes and prompts: a tar, and a Parquet table of two row groups."""
    folder, files = Path(tempfile.mkdtemp()), image_files(4)
    write_tars(folder / "tars", files)
    return (folder / "tars/00000.tar").read_bytes(), write_parquet(folder / "table.parquet", files).read_bytes()


def image_tars(random: Random, folder: Path) -> None:
    """A tar of images: damage anywhere, or one field of a header whose checksum is right."""
    data = bytearray(real_images()[0])
    if random.random() < 0.5:
        data = bytearray(of_bytes(random, bytes(data)))
    else:
        start = random.choice([at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"])
        fields = {0: b"../x.png", 124: random.choice([b"\xff" * 12, b"\x80" + random.randbytes(11), b"0" * 11, b"-1"])}
        at, value = random.choice([*fields.items(), (156, random.choice([b"1", b"2", b"6", b"S", b"x", b"L", b"Z"]))])
        data[start + at : start + at + len(value)] = value
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    (folder / "images.tar").write_bytes(data)
    list(listed(open_source(WebDatasetSource(kind="webdataset", path=str(folder / "images.tar")))))


def image_tables(random: Random, folder: Path) -> None:
    """A Parquet table of images."""
    (folder / "images.parquet").write_bytes(of_bytes(random, real_images()[1]))
    columns = {"label_column": "label", "caption_column": "caption"} if random.random() < 0.7 else {}
    list(listed(open_source(ParquetSource(kind="parquet", path=str(folder / "images.parquet"), **columns))))


def table(random: Random, folder: Path) -> None:
    """A prompt table."""
    _verify_table(PromptTable, of_bytes(random, (dataset() / "prompts.parquet").read_bytes()), folder)


def sources(random: Random, folder: Path) -> None:
    """A list of images."""
    _verify_table(SourceTable, of_bytes(random, list_of_images()), folder)


def _verify_table(kind: type[PromptTable] | type[SourceTable], data: bytes, folder: Path) -> None:
    """Read a table whole: OSError where a page of it is damaged, with its name."""
    (folder / "table.parquet").write_bytes(data)
    try:
        kind.open(Storage.open(str(folder)), "table.parquet").verify()
    except OSError as error:
        if "table.parquet: row group" not in str(error):
            raise
        raise UserError(str(error)) from None


def records(random: Random, folder: Path) -> None:
    """The JSON records of a dataset."""
    root = copytree(dataset(), folder / "root")
    path = random.choice([root / "run.json", root / "SEALED.json", *sorted((root / "commits").iterdir())])
    if random.random() < 0.3:
        path.write_bytes(of_bytes(random, path.read_bytes()))
    else:
        path.write_text(json.dumps(of_tree(random, json.loads(path.read_bytes()))))
    look(root)


def lease(random: Random, folder: Path) -> None:
    """The lease of a dataset that is not finished."""
    (folder / "root").mkdir()
    (folder / "root/run.json").write_bytes((dataset() / "run.json").read_bytes())
    about = {"id": "x", "host": "h", "pid": 1, "process": "a-b-1-2", "period_s": 0.001, "beat": 3}
    data = json.dumps(of_tree(random, about)).encode()
    (folder / "root/lease.json").write_bytes(of_bytes(random, data) if random.random() < 0.5 else data)
    _status(folder / "root")


def tars(random: Random, folder: Path) -> None:
    """A tar whose record says that it is right: damage of headers, or of one member."""
    root = copytree(dataset(), folder / "root")
    (root / "SEALED.json").unlink()
    if random.random() < 0.5:
        recommit(root, tar=of_bytes(random, (root / record(root, 1)["path"]).read_bytes()), shard=1)
    else:
        entries = members(root, 1)
        at = random.randrange(len(entries))
        entries[at] = (entries[at][0], of_bytes(random, entries[at][1]))
        forged = tar_of(entries)
        recommit(root, tar=forged, index=reindexed(root, forged, 1), shard=1)
    look(root)


def index(random: Random, folder: Path) -> None:
    """An index whose record says that it is right: damaged bytes, or other values of the right types."""
    root = copytree(dataset(), folder / "root")
    (root / "SEALED.json").unlink()
    about = record(root, 1)
    data = (root / about["index_path"]).read_bytes()
    if random.random() < 0.5:
        data = of_bytes(random, data)
    else:
        found = pq.read_table(io.BytesIO(data))
        rows = found.to_pylist()
        row, column = random.choice(rows), random.choice(found.column_names)
        row[column] = random.choice([value for value in VALUES if _fits(value, found.schema.field(column).type)])
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, found.schema), sink)
        data = sink.getvalue()
    (root / about["index_path"]).write_bytes(data)
    (root / "commits/000001.json").write_text(json.dumps(about | {"index_sha256": sha256_hex(data)}))
    look(root)


def _fits(value: object, kind: pa.DataType) -> bool:
    try:
        return value is not None and pa.array([value], kind) is not None
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return False


def manifest(random: Random, folder: Path) -> None:
    """The tables of the manifest."""
    root = copytree(dataset(), folder / "root")
    path = random.choice(sorted((root / "manifest").iterdir()))
    path.write_bytes(of_bytes(random, path.read_bytes()))
    look(root)


def selection(random: Random, folder: Path) -> None:
    """A selection."""
    path = folder / "selection.parquet"
    write_selection(str(path), np.arange(0, 40, 2), fingerprint="0" * 64, query="")
    path.write_bytes(of_bytes(random, path.read_bytes()))
    read_selection(str(path), "0" * 64)


def safetensors(random: Random, folder: Path) -> None:
    """Weights: what identifies a teacher, and what a checkpoint is read with."""
    import torch
    from safetensors.torch import save_file

    from pipeline.teachers.digest import weights_digest
    from trainer.checkpoints.tensor_file import load_network

    network, path = torch.nn.Linear(4, 3), folder / "weights.safetensors"
    save_file(network.state_dict(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.5:
        data = of_bytes(random, data)
    else:
        header = json.dumps(of_tree(random, json.loads(data[8 : 8 + length]))).encode()
        said = random.choice([len(header)] * 9 + [2**63])
        data = said.to_bytes(8, "little") + header + data[8 + length :]
    path.write_bytes(data)
    try:
        weights_digest({"network": [path]}, {})
    except UserError as error:
        _check_line(error)
    load_network(path, network)


def reference(random: Random, folder: Path) -> None:
    """Statistics of real images."""
    path = folder / "reference.npz"
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "count": np.array(10), "features": np.zeros((10, 4), np.float32)}
    if random.random() < 0.3:
        arrays[random.choice(list(arrays))] = np.asarray(random.choice([0, "x", [[1.0]], [], 2**70, [1j]]))
    np.savez(path, **arrays)
    path.write_bytes(of_bytes(random, path.read_bytes()) if random.random() < 0.7 else path.read_bytes())
    Reference.read(path, "")


def teacher(random: Random, folder: Path) -> None:
    """The files of a pipeline folder, and the networks that are built of them."""
    import torch

    from pipeline import teachers

    root = copytree(pipeline_folder(), folder / "sd")
    path = random.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    if path.suffix == ".json" and random.random() < 0.7:
        path.write_text(json.dumps(of_tree(random, json.loads(path.read_bytes()))))
    else:
        path.write_bytes(of_bytes(random, path.read_bytes()))
    config = StableDiffusionTeacherConfig(path=str(root))
    teachers.identify(config)
    teachers.load(config, torch.device("cpu"))


Target = Callable[[Random, Path], None]
TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        *(configs, prompts, table, sources, image_tars, image_tables, records, lease, tars, index, manifest, selection),
        *(safetensors, reference, teacher),
    )
}


def run(target: str, number: int) -> str | None:
    """One round: ``taken`` or ``refused``. Raises AssertionError when it was neither."""
    with tempfile.TemporaryDirectory() as name:
        folder, outcome = Path(name), "taken"
        (folder / "out").mkdir()
        try:
            TARGETS[target](Random(f"{target} {number}"), folder)
        except (UserError, RunStopped) as error:
            outcome = "refused"
            _check_line(error)
        except Exception as error:
            raise AssertionError(f"{target} {number}: {type(error).__name__}: {error}") from error
        return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, default=200, help="of each target")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    failed = 0
    for target in options.targets:
        outcomes: Counter[str | None] = Counter()
        for number in range(options.seed, options.seed + options.rounds):
            try:
                outcomes[run(target, number)] += 1
            except AssertionError:
                outcomes["FAILED"] += 1
                traceback.print_exc()
        failed += outcomes["FAILED"]
        print(f"{target:<12} {dict(outcomes)}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
