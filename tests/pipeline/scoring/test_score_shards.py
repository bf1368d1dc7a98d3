"""Every stored image is measured once, by the scorer of that name, whatever happens on the way."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import stage
from support.patience import PATIENCE_S
from support.toy import files, samples

from configs.errors import RunStopped, UserError
from configs.evaluate_schema import ClipScorerConfig
from configs.score_schema import ScoreRuntime
from pipeline.driver import StopRequest
from pipeline.scoring import score_worker
from pipeline.scoring.score_shards import score_shards, with_absolute_paths
from pipeline.scoring.score_table import read_column, read_scores
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_image
from pipeline.shards.storage import Storage
from tests.support.scorers import Brightness, Faulty

RUNTIME = ScoreRuntime(executor="in-process", batch_size=3)


def score(dataset, name="light", make=Brightness, runtime=RUNTIME, stop=None):
    score_shards(dataset, name, make, runtime, stop)


def tables(root, name="light"):
    return {path: data for path, data in files(root / "scores" / name).items() if path.endswith(".parquet")}


@pytest.fixture(scope="session")
def truth(pristine, tmp_path_factory):
    """The tables of an undisturbed run."""
    root = shutil.copytree(pristine, tmp_path_factory.mktemp("truth") / "root")
    score(Dataset.open(Storage.open(str(root))))
    return tables(root)


def test_every_stored_image_is_measured_once_and_nothing_is_rewritten(root, dataset, truth):
    before = files(root)
    score(dataset)
    after = files(root)
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"scores"}
    assert sum(len(after[name]) for name in after.keys() - before.keys()) < 5 * 5000  # bytes: tables, no images

    stored = samples(root)
    keys = [key for table in read_scores(dataset, "light") for key in table["key"].to_pylist()]
    assert keys == sorted(stored)
    pixels = np.stack([decode_image(stored[key][0]["png"]).astype(np.float32) for key in keys])
    np.testing.assert_allclose(read_column(dataset, "light", "mean"), pixels.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(read_column(dataset, "light", "channels"), pixels.mean((1, 2)), rtol=1e-5)
    words = [len(stored[key][1]["prompt"].split()) for key in keys]
    assert read_column(dataset, "light", "words").tolist() == words
    assert tables(root) == truth


@pytest.mark.parametrize("lost", [[0], [1, 4], [0, 1, 2, 3, 4]])
def test_only_what_is_missing_is_measured(root, dataset, truth, tmp_path, lost, capsys):
    score(dataset)
    for path in sorted((root / "scores/light").glob("*.parquet")):
        if int(path.name[:6]) in lost:
            path.unlink()
    log = tmp_path / "log"
    log.touch()
    score(dataset, make=partial(Brightness, log=log))
    assert sum(map(int, log.read_text().split())) == sum({0: 7, 2: 0}.get(shard, 8) for shard in lost)
    assert tables(root) == truth
    log.write_text("")
    score(dataset, make=partial(Brightness, log=log))
    assert log.read_text() == ""
    assert "all 5 shards have scores light; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [0, 1])
def test_another_scorer_needs_another_name(root, dataset, lost):
    score(dataset)
    for path in sorted((root / "scores/light").glob("*.parquet"))[:lost]:
        path.unlink()
    before = files(root)
    with pytest.raises(UserError, match=r"scale is 1.0 there, 2.0 here\); give these another name"):
        score(dataset, make=partial(Brightness, scale=2.0))
    assert files(root) == before
    score(dataset, "lighter", partial(Brightness, scale=2.0))
    if not lost:
        double = 2 * read_column(dataset, "light", "mean")
        np.testing.assert_allclose(read_column(dataset, "lighter", "mean"), double, rtol=1e-6)


@pytest.mark.parametrize("fault", ["short", "narrow", "missing", "double"])
def test_a_scorer_that_breaks_its_promise_writes_nothing(root, dataset, fault, capsys):
    with pytest.raises(RunStopped, match="4 of 5 shards could not be scored"):
        score(dataset, make=partial(Faulty, fault=fault))
    assert "the scorer gave" in capsys.readouterr().out
    assert [name[:6] for name in tables(root)] == ["000002"]  # which has no images


def test_a_value_that_is_not_finite_stops_the_run(root, dataset):
    with pytest.raises(RunStopped, match=r"light: channels of sample 0000000\d\d is not finite"):
        score(dataset, make=partial(Faulty, fault="nan"))


def test_a_damaged_shard_is_not_measured(root, dataset, capsys):
    path = next((root / "shards").glob("*-000001-*.tar"))
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunStopped, match="1 of 5 shards could not be scored"):
        score(dataset)
    assert "its sha256 is not the one recorded" in capsys.readouterr().out
    assert sorted(name[:6] for name in tables(root)) == ["000000", "000002", "000003", "000004"]
    with pytest.raises(UserError, match="1 of 5 shards have no scores, the first is 1; run score_pairs"):
        read_scores(dataset, "light")


def test_the_next_batches_are_decoded_while_the_scorer_works(dataset, monkeypatch):
    decoded, waited = threading.Semaphore(0), []

    def decode(data, size):
        decoded.release()
        return decode_image(data, size)

    class Waiting(Brightness):
        def __call__(self, images, prompts):
            if not waited:  # more images than those it was given come in while it holds the device
                waited.append(all(decoded.acquire(timeout=PATIENCE_S) for _ in range(len(images) + 3)))
            return super().__call__(images, prompts)

    monkeypatch.setattr(score_worker, "decode_image", decode)
    score_worker.ScoreWorker(dataset.storage.uri, dataset.run.fingerprint, "light", Waiting, RUNTIME).run(1)
    assert waited == [True]


def test_one_thread_at_a_time_uses_the_scorer(dataset):
    inside, most = [], []

    class Counting(Brightness):
        def __call__(self, images, prompts):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
            return super().__call__(images, prompts)

    score(dataset, make=Counting)
    assert (len(most), max(most)) == (4 * 3, 1)


def test_a_stop_request_keeps_finished_tables(root, dataset, truth):
    stop = StopRequest()

    class Stopping(Brightness):
        def __call__(self, images, prompts):
            stop.requested = True
            return super().__call__(images, prompts)

    with pytest.raises(RunStopped, match="on request; finished shards keep their scores"):
        score(dataset, make=Stopping, stop=stop)
    kept = tables(root)
    assert 1 <= len(kept) < 5
    assert kept.items() <= truth.items()
    score(dataset)
    assert tables(root) == truth


def test_what_cannot_be_scored_is_one_line(root, dataset):
    for path in (root / "commits").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has no shard yet"):
        score(dataset)
    fields = dataset.run.spec.fields.model_copy(update={"image": "none"})
    spec = dataset.run.spec.model_copy(update={"fields": fields})
    dataset.run = dataset.run.model_copy(update={"spec": spec})
    with pytest.raises(UserError, match="have no image"):
        score(dataset)


def test_paths_of_a_scorer_are_absolute_for_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("judge", "builtin"):
        (tmp_path / name).mkdir()
    (tmp_path / "w.pt").touch()
    found = [
        with_absolute_paths(scorer)
        for scorer in (
            ClipScorerConfig(model="local-dir:judge"),
            ClipScorerConfig(model="builtin"),
            ClipScorerConfig(model="ViT-B-32", weights="w.pt"),
            ClipScorerConfig(model="ViT-B-32", weights="openai"),
        )
    ]
    assert [(scorer.model, scorer.weights) for scorer in found] == [
        (f"local-dir:{tmp_path}/judge", None),
        ("builtin", None),
        ("ViT-B-32", f"{tmp_path}/w.pt"),
        ("ViT-B-32", "openai"),
    ]


def test_in_an_object_store(remote, truth, tmp_path):
    score(remote, runtime=RUNTIME.model_copy(update={"cache_dir": str(tmp_path / "cache")}))
    found = {info.path.split("/")[-1]: remote.storage.read(info.path) for info in remote.storage.list("scores/light")}
    found.pop("scorer.json")
    assert found == truth


# -------------------------------------------------------------------------------------------- processes and clusters

_RUN = """
import sys
from functools import partial
from configs.errors import exit_codes
from configs.score_schema import ScoreRuntime
from pipeline.scoring.score_shards import score_shards
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage
from tests.support.scorers import Brightness

with exit_codes():
    root, executor, hold = sys.argv[1:]
    runtime = ScoreRuntime(executor=executor, actors=1, batch_size=8)  # a batch is a shard
    scorer = partial(Brightness, hold=hold)
    score_shards(Dataset.open(Storage.open(root)), "light", scorer, runtime)
"""


@pytest.fixture
def hold(tmp_path):
    """A file that keeps scorers from what is beyond their first shard with images, while it exists."""
    path = tmp_path / "hold"
    path.touch()
    return path


def start(root, executor, hold, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, str(root), executor, str(hold)],
        cwd=stage.ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_tables(root: Path, count: int, process) -> None:
    while len(list((root / "scores").glob("light/0*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def finish(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out + err


def stopped(root, executor, hold, **environment):
    """Ask a run to stop once it has written a table, and let it go on when it has heard."""
    process = start(root, executor, hold, **environment)
    wait_for_tables(root, 1, process)
    process.send_signal(signal.SIGTERM)
    assert any("finishing the shards in flight" in line for line in process.stderr)
    hold.unlink()
    code, text = finish(process)
    assert (code, len(tables(root)) < 5, "stopped: on request" in text) == (1, True, True), text


def test_a_killed_run_is_resumed_by_the_same_command(root, truth, hold):
    process = start(root, "in-process", hold)
    wait_for_tables(root, 1, process)
    stage.kill(process)
    assert len(tables(root)) < 5
    hold.unlink()
    assert finish(start(root, "in-process", hold))[0] == 0
    assert tables(root) == truth


def test_a_stopped_run_is_resumed_by_the_same_command(root, truth, hold):
    stopped(root, "in-process", hold)
    assert finish(start(root, "in-process", hold))[0] == 0
    assert tables(root) == truth


def test_a_run_on_a_cluster_stops_and_resumes_in_the_same_way(root, truth, head, hold):
    stopped(root, "ray", hold, RAY_ADDRESS=head.address)
    code, text = finish(start(root, "ray", hold, RAY_ADDRESS=head.address))
    assert code == 0, text
    assert "all 5 shards have scores light" in text
    assert tables(root) == truth
