"""No pickle is loaded from data or weights, and no text is executed: the sources are searched, and it is tried."""

import ast
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.forge import members, recommit, reindexed, tar_of
from support.mutations import Exploit, pickled
from support.tiny_sd import build
from support.toy import toy_config

from configs.errors import RunStopped, UserError
from configs.evaluate_schema import InceptionFeaturesConfig, TorchscriptFeaturesConfig
from configs.schema import PromptsConfig, StableDiffusionTeacherConfig
from configs.yaml_file import read_layers
from pipeline import teachers
from pipeline.evaluation.reference import Reference
from pipeline.generate import generate_pairs
from pipeline.prompts import prepare_prompts
from pipeline.scoring.build import build_scorer
from pipeline.shards.dataset import Dataset
from pipeline.shards.reader import PairReader
from pipeline.shards.selection import read_selection
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify
from trainer.checkpoints.tensor_file import load_network, tensor_names

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for name in ("configs", "pipeline", "stages", "trainer") for path in (ROOT / name).rglob("*.py"))

INERT = ROOT / "pipeline/teachers/edm/inert_pickle.py"
"""The one file that reads pickles: through a table of harmless names."""

# --------------------------------------------------------------------------------------------------- what is searched

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EXECUTORS = {"eval", "exec", "compile", "__import__"}
NEEDED = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "np.save": ("allow_pickle", "False"),
    "np.lib.format.read_array": ("allow_pickle", "False"),
}
"""Calls -> the keyword that they must have."""
FORBIDDEN_NAMES = ("extractall", "extract", "unpack_archive", "read_pickle", "unsafe_load", "full_load", "load_all")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_executes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) and path != INERT:
            assert not {alias.name.partition(".")[0] for alias in node.names} & UNPICKLERS
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            assert {alias.name for alias in node.names} == {"UnpicklingError"}
        if isinstance(node, ast.ImportFrom) and "read_pickle" in {alias.name for alias in node.names}:
            assert node.module == "pipeline.teachers.edm.inert_pickle"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in EXECUTORS
        assert called == "read_pickle" or called.rpartition(".")[2] not in FORBIDDEN_NAMES
        assert keywords.get("trust_remote_code", "False") == "False"
        assert keywords.get("shell", "False") == "False"
        if called == "yaml.load":
            assert [ast.unparse(argument) for argument in node.args][1:] == ["_Loader"]
        if called in NEEDED:
            keyword, value = NEEDED[called]
            assert keywords.get(keyword) == value


def test_the_one_reader_of_pickles_decides_on_every_name():
    tree = ast.parse(INERT.read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.Unpickler", "pickle.UnpicklingError"}
    (reader,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases and "Unpickler" in ast.unparse(node)
    )
    assert {"find_class", "persistent_load"} == {node.name for node in reader.body if isinstance(node, ast.FunctionDef)}


# ------------------------------------------------------------------------------------------------------ what is tried


@pytest.fixture
def exploit(tmp_path):
    """A pickle, and a check that nobody has loaded it."""
    canary = tmp_path / "canary"
    yield Exploit(canary), pickled(canary)
    assert not canary.exists()


def test_the_exploit_works(tmp_path):
    import pickle

    pickle.loads(pickled(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def saved(exploit: Exploit, *, legacy: bool = False) -> bytes:
    """As ``torch.save`` writes it."""
    buffer = io.BytesIO()
    torch.save({"weight": exploit}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def object_array(exploit: Exploit) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([exploit], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt", "x.pt", "x.pth"])
def test_a_teacher_folder_with_pickled_weights_only(exploit, tmp_path, name):
    root = build(tmp_path / "sd")
    (root / "unet/diffusion_pytorch_model.safetensors").unlink()
    (root / "unet" / name).write_bytes(saved(exploit[0]))
    config = StableDiffusionTeacherConfig(path=str(root))
    for use in (teachers.identify, lambda config: teachers.load(config, torch.device("cpu")), teachers.load_network):
        with pytest.raises(UserError, match=r"only pickled weights .* which are never loaded"):
            use(config)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_a_teacher_folder_with_a_pickle_in_the_place_of_weights(exploit, tmp_path, part):
    root = build(tmp_path / "sd")
    for content in (exploit[1], saved(exploit[0]), saved(exploit[0], legacy=True)):
        (root / f"{part}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a safetensors file"):
            teachers.load(StableDiffusionTeacherConfig(path=str(root)), torch.device("cpu"))
    (root / f"{part}.safetensors").unlink()
    (root / f"{part}.bin").write_bytes(exploit[1])
    with pytest.raises(UserError, match="only pickled weights"):
        teachers.load(StableDiffusionTeacherConfig(path=str(root)), torch.device("cpu"))


def test_code_in_a_teacher_folder_is_not_imported(exploit, tmp_path):
    root = build(tmp_path / "sd")
    canary = str(tmp_path / "canary")
    for folder in (root, root / "unet", root / "text_encoder", root / "tokenizer"):
        (folder / "modeling.py").write_text(f"open({canary!r}, 'w')\nclass Model: pass\n")
    for part, kind in (("unet", "AutoModel"), ("text_encoder", "AutoModel"), ("tokenizer", "AutoTokenizer")):
        path = root / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
        config = json.loads(path.read_text()) | {"auto_map": {kind: "modeling.Model"}}
        path.write_text(json.dumps(config))
    teachers.load(StableDiffusionTeacherConfig(path=str(root)), torch.device("cpu"))


def test_a_checkpoint_that_is_a_pickle(exploit, tmp_path):
    path = tmp_path / "student.safetensors"
    for content in (exploit[1], saved(exploit[0])):
        path.write_bytes(content)
        for read in (tensor_names, lambda path: load_network(path, torch.nn.Linear(2, 2))):
            with pytest.raises(UserError, match="not a safetensors file"):
                read(path)


def test_scorers_whose_weights_are_pickles(exploit, tmp_path):
    """Beside them: tests/pipeline/scoring/test_open_clip.py, of open_clip's."""
    path = tmp_path / "network.pt"
    for content in (exploit[1], saved(exploit[0]), saved(exploit[0], legacy=True)):
        path.write_bytes(content)
        for config in (
            TorchscriptFeaturesConfig(path=str(path), input_size=8),
            InceptionFeaturesConfig(mode="legacy_pytorch", weights=str(path)),
            InceptionFeaturesConfig(mode="clean", weights=str(path)),
        ):
            with pytest.raises(UserError, match=r"network\.pt"):
                build_scorer(config, torch.device("cpu"))


def test_statistics_that_are_pickles(exploit, tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.array([exploit[0]], dtype=object), sigma=np.eye(1), allow_pickle=True)
    contents = [path.read_bytes(), object_array(exploit[0]), exploit[1], saved(exploit[0])]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"reference\.npz"):
            Reference.read(path, "")


@pytest.mark.parametrize("suffix", ["noise.npy", "x0.npy", "png", "json", "txt"])
def test_a_shard_with_a_pickle_in_it(exploit, tmp_path, suffix):
    root = tmp_path / "root"
    spec = {"pairs_per_prompt": 1, "num_samples": 4, "fields": {"x0": "pixels"}}
    generate_pairs(toy_config(root, tmp_path, spec=spec, layout={"samples_per_shard": 4}))
    (root / "SEALED.json").unlink()
    whole = shutil.copytree(root, tmp_path / "whole")
    for content in (exploit[1], object_array(exploit[0])):
        forged = tar_of([(name, content if name.endswith(suffix) else data) for name, data in members(whole, 0)])
        recommit(root, tar=forged, index=reindexed(whole, forged, 0), shard=0)
        assert list(verify(Dataset.open(Storage.open(str(root)))).damaged) == [0]
        options = {"seed": 0, "window": 1, "holdout": 0, "selection": None, "cache_folder": root, "cache_bytes": 0}
        reader = PairReader(str(root), allow_partial=True, **options)
        if suffix.endswith(".npy"):  # the others are not the trainer's
            with pytest.raises(RunStopped, match="shard 0: sample 000000000: "):
                reader.read([0])


def test_prompts_selections_and_configurations_that_are_pickles(exploit, tmp_path):
    for suffix in ("txt", "csv", "jsonl", "parquet", "pkl"):
        path = tmp_path / f"prompts.{suffix}"
        path.write_bytes(b"\xff" + exploit[1])
        with pytest.raises(UserError, match=rf"prompts\.{suffix}"):
            prepare_prompts(PromptsConfig(path=str(path)), tmp_path / "table.parquet")
    (tmp_path / "selection.parquet").write_bytes(exploit[1])
    with pytest.raises(UserError, match="not a selection"):
        read_selection(str(tmp_path / "selection.parquet"), "0" * 64)
    canary = tmp_path / "canary"
    for text in (f"output: !!python/object/apply:os.mkdir ['{canary}']", f"output: !!python/name:os.mkdir '{canary}'"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="could not determine a constructor"):
            read_layers(tmp_path / "config.yaml")
