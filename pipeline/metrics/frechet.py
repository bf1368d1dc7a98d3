"""How far two sets of images are apart, by the features of a network: clean-fid's own arithmetic, and checks around it.

    FID = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))       mu, S: mean and covariance of the features
    KID = unbiased squared MMD with the kernel k(f, g) = (f . g / dim + 1)^3, mean over random subsets

The formulas are ``cleanfid.fid.frechet_distance`` and ``kernel_distance``, called as they are. The mean is taken in the
features' own precision and the covariance in float64, as clean-fid does: a float64 mean would move FID by some 1e-6,
and published numbers do without.

*Not* assumed: that features are Inception's, or that both sets have one size. FID is biased by the number of images:
compare only numbers with the same counts. KID is not.

References:
    Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500 (FID).
    Binkowski et al. 2018, Demystifying MMD GANs, arXiv 1801.01401 (KID).
    Parmar et al. 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation, arXiv 2104.11222 (clean-fid).
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.downloads import NotPublished, downloaded
from pipeline.shards.members import decode_array

MAX_NPZ_BYTES = 4 << 30
"""Of the arrays of a file of statistics: half a million images' features, 2048 wide."""
_NO_NPZ = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What zipfile makes of a damaged file."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set's features.

    Attributes:
        mu: (D,), float64.
        sigma: (D, D), float64, normalized by count - 1.
        count: number of images; None when a file does not say.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    count: int | None

    @classmethod
    def of(cls, features: NDArray[np.float32]) -> "Statistics":
        """Statistics of features, (N, D) with N at least 2."""
        if len(features) < 2:
            raise UserError(f"{len(features)} images have no covariance; at least 2 are needed")
        mu = features.mean(0).astype(np.float64)
        return cls(mu, np.atleast_2d(np.cov(features, rowvar=False)), len(features))

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Read an ``.npz`` with mu, sigma and perhaps count: clean-fid's files, EDM's, or those of :meth:`write`.

        Raises:
            UserError: it is not there, or no such file.
        """
        arrays = read_npz(path, ("mu", "sigma"))
        mu, sigma = (arrays[key].astype(np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean and covariance")
        count = arrays.get("count")
        if count is not None and count.size != 1:
            raise UserError(f"{path}: count {count.shape} is no number of images")
        return cls(mu, sigma, None if count is None else int(count.item()))

    def write(self, path: Path) -> None:
        """Write what :meth:`read` reads. A count that is not known is left out."""
        count = {} if self.count is None else {"count": self.count}
        np.savez(path, mu=self.mu, sigma=self.sigma, **count)


def frechet_distance(a: Statistics, b: Statistics, *, allow_few: bool = False) -> float:
    """FID of two sets.

    Args:
        a: one set.
        b: the other, with features of the same network.
        allow_few: take sets too small for their covariance to have full rank. The number depends on the count then
            more than on the images.

    Raises:
        UserError: features differ in width, or a set is too small.
    """
    from cleanfid import fid

    _check_widths(len(a.mu), len(b.mu))
    for statistics in (a, b):
        if statistics.count is not None and statistics.count <= len(statistics.mu) and not allow_few:
            raise UserError(
                f"{statistics.count} images are too few for FID with {len(statistics.mu)} features: the covariance is "
                f"singular below {len(statistics.mu) + 1}; take more images, fewer features, or allow_few"
            )
    return float(fid.frechet_distance(a.mu, a.sigma, b.mu, b.sigma))


def kernel_distance(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    *,
    seed: int = 0,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
) -> float:
    """KID of two sets, in float64.

    Args:
        a: features, (N, D) with N at least 2.
        b: features of the other set, (M, D), likewise.
        seed: of the subsets. clean-fid draws them from numpy's global generator, which is as before afterwards.
        num_subsets: how many the mean is over.
        max_subset_size: images of a subset; fewer when a set has fewer.

    Raises:
        UserError: features differ in width, or a set is too small.
    """
    from cleanfid import fid

    _check_widths(a.shape[1], b.shape[1])
    if min(len(a), len(b)) < 2:
        raise UserError(f"{min(len(a), len(b))} images are too few for KID; at least 2 are needed")
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(seed % 2**32)  # noqa: NPY002
        return fid.kernel_distance(a.astype(np.float64), b.astype(np.float64), num_subsets, max_subset_size)
    finally:
        np.random.set_state(state)  # noqa: NPY002


def named_statistics(name: str, resolution: int | str, split: str, mode: str) -> Statistics:
    """Statistics of a well-known dataset that clean-fid's authors computed, such as cifar10, 32, train, clean.

    Args:
        name: cifar10, ffhq, lsun_church, ... (https://github.com/GaParmar/clean-fid has the list).
        resolution: of its images; ``na`` for statistics made with clean-fid's ``make_custom_stats``.
        split: train, test, trainfull, or custom.
        mode: clean, legacy_pytorch or legacy_tensorflow; must be that of the other set.

    Raises:
        UserError: they are neither in clean-fid's cache nor can be downloaded.
    """
    otherwise = "put it there, or check name, resolution, split and mode"
    return Statistics.read(_named_file(f"{name}_{mode}_{split}_{resolution}.npz", otherwise))


def named_features(name: str, resolution: int | str, split: str, mode: str) -> NDArray[np.float32] | None:
    """Features of a well-known dataset, (N, 2048), for KID; None where none are published, as of most datasets.

    Arguments and errors as of :func:`named_statistics`: a server that cannot be asked has not said that there are none.
    """
    otherwise = "put it there, or do without KID: name the file of statistics beside it as the reference"
    try:
        path = _named_file(f"{name}_{mode}_{split}_{resolution}_kid.npz", otherwise)
    except NotPublished:
        return None
    return read_npz(path, ("feats",))["feats"]


def _named_file(name: str, otherwise: str) -> Path:
    """The file in the folder where clean-fid keeps them; its own download may leave half of one."""
    import cleanfid

    url = f"https://www.cs.cmu.edu/~clean-fid/stats/{name.lower()}"
    path = Path(cleanfid.__file__).parent / "stats" / name.lower()
    return downloaded(url, path, "reference statistics", otherwise)


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` by name, ``keys`` among them.

    Raises:
        UserError: there is no such file, or it is none, larger than MAX_NPZ_BYTES when unpacked, or lacks a key.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (num_bytes := sum(member.file_size for member in members)) > MAX_NPZ_BYTES:
                raise UserError(f"{path}: {num_bytes:,} bytes when unpacked, more than the {MAX_NPZ_BYTES:,} allowed")
            decoded = {member.filename.removesuffix(".npy"): decode_array(archive.read(member)) for member in members}
        arrays: dict[str, NDArray[Any]] = {name: a for name, a in decoded.items() if a.dtype.kind in "fiu"}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file of reference statistics") from None
    except _NO_NPZ as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not an .npz file of arrays ({cause})") from error
    if missing := [key for key in keys if key not in arrays]:
        raise UserError(f"{path}: has no {' and no '.join(missing)}, only {', '.join(sorted(arrays)) or 'none'}")
    return arrays


def _check_widths(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"features of {a} and of {b} numbers are of different networks; give both sets the same one")
