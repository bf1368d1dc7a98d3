from email.message import Message
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from cleanfid import fid
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from pipeline.metrics.frechet import Statistics, frechet_distance, kernel_distance, named_features, named_statistics


def features(count, width, seed=0, shift=0.0):
    draws = np.random.default_rng(seed)
    return (np.maximum(draws.standard_normal((count, width)), 0) + shift).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    a=st.lists(st.floats(0.1, 4), min_size=3, max_size=3),
    b=st.lists(st.floats(0.1, 4), min_size=3, max_size=3),
    shift=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_gaussians_with_equal_axes_have_the_closed_form(a, b, shift):
    # Commuting covariances R diag(a^2) R' and R diag(b^2) R': |shift|^2 + sum of (a - b)^2.
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    std_a, std_b, difference = map(np.array, (a, b, shift))
    first = Statistics(np.ones(3), rotation @ np.diag(std_a**2) @ rotation.T, None)
    second = Statistics(1 + difference, rotation @ np.diag(std_b**2) @ rotation.T, None)
    closed_form = difference @ difference + np.square(std_a - std_b).sum()
    assert frechet_distance(first, second) == pytest.approx(closed_form, abs=1e-6)


def test_covariances_that_do_not_commute_have_the_closed_form_of_two_dimensions():
    # tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det A det B)) for 2x2 matrices.
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    distance = frechet_distance(Statistics(np.zeros(2), a, None), Statistics(np.zeros(2), b, None))
    assert distance == pytest.approx(np.trace(a + b) - 2 * root, abs=1e-9)


def test_features_give_what_clean_fid_gives():
    a, b = features(300, 16), features(500, 16, seed=1, shift=0.1)
    ours = frechet_distance(Statistics.of(a), Statistics.of(b))
    assert ours == pytest.approx(fid.fid_from_feats(a, b), abs=1e-6)
    assert ours > 0.1


def test_kid_is_clean_fids_and_leaves_the_global_generator_alone():
    a, b = features(60, 8), features(90, 8, seed=1, shift=0.2)
    np.random.seed(7)  # noqa: NPY002
    expected = fid.kernel_distance(a.astype(np.float64), b.astype(np.float64))
    np.random.seed(3)  # noqa: NPY002
    next_draw = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert kernel_distance(a, b, seed=7) == expected
    assert np.random.random() == next_draw  # noqa: NPY002
    assert kernel_distance(a, b, seed=8) != expected


def test_kid_of_equal_distributions_is_zero_on_average():
    # The estimator is unbiased: the mean over independent pairs of sets is within three standard errors of 0.
    kids = [kernel_distance(features(40, 4, 2 * s), features(40, 4, 2 * s + 1), num_subsets=1) for s in range(200)]
    assert abs(np.mean(kids)) < 3 * np.std(kids) / np.sqrt(len(kids))


def test_kid_of_sets_without_subsets_is_its_closed_form():
    a, b = features(12, 3), features(12, 3, seed=1, shift=0.5)
    kernel = lambda x, y: (x @ y.T / 3 + 1.0) ** 3  # noqa: E731
    within = sum(kernel(x, x)[~np.eye(12, dtype=bool)].mean() for x in (a.astype(float), b.astype(float)))
    assert kernel_distance(a, b) == pytest.approx(
        within - 2 * kernel(a.astype(float), b.astype(float)).mean(), rel=1e-9
    )


def test_too_few_images_are_refused_unless_meant():
    enough, few = Statistics.of(features(9, 8)), Statistics.of(features(8, 8))
    frechet_distance(enough, enough)
    with pytest.raises(UserError, match="8 images are too few for FID with 8 features"):
        frechet_distance(enough, few)
    assert frechet_distance(few, few, allow_few=True) == pytest.approx(0, abs=1e-3)
    with pytest.raises(UserError, match="1 images have no covariance"):
        Statistics.of(features(1, 8))
    with pytest.raises(UserError, match="1 images are too few for KID"):
        kernel_distance(features(1, 8), features(5, 8))


def test_features_of_two_networks_do_not_compare():
    with pytest.raises(UserError, match="of 4 and of 5 numbers"):
        frechet_distance(Statistics.of(features(9, 4)), Statistics.of(features(9, 5)))
    with pytest.raises(UserError, match="of 4 and of 5 numbers"):
        kernel_distance(features(9, 4), features(9, 5))


def test_statistics_come_back_as_they_were_written(tmp_path):
    for count in (20, None):
        statistics = Statistics(features(9, 4).mean(0).astype(np.float64), np.eye(4) / 3, count)
        statistics.write(tmp_path / "reference.npz")
        read = Statistics.read(tmp_path / "reference.npz")
        assert (read.mu.tobytes(), read.sigma.tobytes(), read.count) == (
            statistics.mu.tobytes(),
            statistics.sigma.tobytes(),
            count,
        )


def test_files_that_are_no_statistics_are_refused_in_one_line(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match="no such file"):
        Statistics.read(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"not an \.npz file"):
        Statistics.read(path)
    np.savez(path, mu=np.array([{}]), sigma=np.eye(2))  # an object: only a pickle could hold it
    with pytest.raises(UserError, match=r"not an \.npz file"):
        Statistics.read(path)
    np.savez(path, mu=np.zeros(2))
    with pytest.raises(UserError, match="has no sigma, only mu"):
        Statistics.read(path)
    np.savez(path, mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(UserError, match="no mean and covariance"):
        Statistics.read(path)


def test_named_statistics_are_read_from_clean_fids_folder_and_missed_with_their_address(tmp_path, monkeypatch):
    import cleanfid

    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "stats").mkdir()
    Statistics(np.zeros(2), np.eye(2), 5).write(tmp_path / "stats" / "ffhq_clean_train_256.npz")
    assert named_statistics("FFHQ", 256, "train", "clean").count == 5

    def unreachable(url, path):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(
        UserError,
        match=r"cifar10_clean_train_32\.npz is not there .*no network.*get https://www.*put it there",
    ):
        named_statistics("cifar10", 32, "train", "clean")


def test_only_a_server_that_has_no_features_says_that_there_are_none(tmp_path, monkeypatch):
    import cleanfid

    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "__init__.py"))

    def answer(error):
        def download(url, path):
            raise error

        monkeypatch.setattr("torch.hub.download_url_to_file", download)

    def status(code, reason):
        return HTTPError("https://there", code, reason, Message(), None)

    answer(status(404, "Not Found"))
    assert named_features("cifar10", 32, "train", "clean") is None
    with pytest.raises(UserError, match=r"Not Found.*check name"):
        named_statistics("cifar10", 32, "train", "clean")
    for error in (status(503, "Busy"), URLError("no network"), PermissionError("read-only")):
        answer(error)
        with pytest.raises(UserError, match=r"train_32_kid\.npz is not there .*do without KID: name the file"):
            named_features("cifar10", 32, "train", "clean")
    kept = features(2, 3)
    (tmp_path / "stats").mkdir(exist_ok=True)
    np.savez(tmp_path / "stats" / "cifar10_clean_train_32_kid.npz", feats=kept)
    np.testing.assert_array_equal(named_features("cifar10", 32, "train", "clean"), kept)
