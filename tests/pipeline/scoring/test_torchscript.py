import numpy as np
import pytest
import torch
from cleanfid import fid
from PIL import Image
from support.pictures import pictures, save_pictures

from configs.errors import UserError
from configs.evaluate_schema import TorchscriptFeaturesConfig
from pipeline.metrics.frechet import Statistics, frechet_distance, kernel_distance
from pipeline.scoring.build import build_scorer
from pipeline.scoring.resizing import middle_square

CPU = torch.device("cpu")


class Pooled(torch.nn.Module):
    """Mean colours of a 2x2 grid, and their squares: 24 features."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1) / 255
        return torch.cat([means, means.square()], 1)


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "pooled.pt"
    torch.jit.script(Pooled()).save(path)
    return path


def scorer_of(path, **settings):
    return build_scorer(TorchscriptFeaturesConfig(path=str(path), **settings), CPU)


def test_fid_and_kid_of_folders_are_what_clean_fid_says(network, tmp_path):
    images = [pictures(40, seed=1), pictures(32, height=30, seed=2)]
    folders = [str(save_pictures(tmp_path / str(at), some)) for at, some in enumerate(images)]
    direct = fid.compute_fid(
        *folders, custom_feat_extractor=Pooled(), num_workers=0, device=CPU, verbose=False, use_dataparallel=False
    )
    scorer = scorer_of(network, input_size=299, input_range=(0, 255))
    ours = [scorer(some, [""] * len(some))["features"] for some in images]
    assert frechet_distance(*map(Statistics.of, ours)) == pytest.approx(direct, abs=1e-6, rel=0)
    assert direct > 0.01
    theirs = [fid.get_folder_features(folder, Pooled(), 0, device=CPU, verbose=False) for folder in folders]
    assert [a.tobytes() for a in ours] == [b.tobytes() for b in theirs]
    assert kernel_distance(*ours) == kernel_distance(*theirs)


def test_black_and_white_are_what_the_network_was_told(network):
    scorer = scorer_of(network, input_size=4, input_range=(-1, 3))
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    features = scorer([black, white], ["", ""])["features"]
    assert features[:, :12] == pytest.approx(np.array([[-1] * 12, [3] * 12]) / 255)


def test_batches_and_repetition_change_nothing(network):
    images = pictures(7)
    scorer = scorer_of(network, input_size=16)
    whole = scorer(images, [""] * 7)["features"]
    parts = [scorer(images[at : at + 2], [""] * 2)["features"] for at in range(0, 6, 2)]
    assert np.concatenate(parts).tobytes() == whole[:6].tobytes()
    assert scorer.columns == {"features": 24}
    assert (whole.dtype, whole.shape) == (np.float32, (7, 24))


def test_the_identity_is_the_content_and_every_setting(network, tmp_path):
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(network.read_bytes())
    identity = scorer_of(network, input_size=8).identity
    assert scorer_of(copy, input_size=8).identity == identity
    for other in ({"input_size": 9}, {"input_size": 8, "input_range": (0, 1)}, {"input_size": 8, "resize": 8}):
        assert scorer_of(network, **other).identity != identity


def test_what_is_no_network_of_images_is_refused_in_one_line(tmp_path):
    path = tmp_path / "network.pt"
    with pytest.raises(UserError, match="there is no file"):
        scorer_of(path, input_size=8)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a TorchScript file"):
        scorer_of(path, input_size=8)
    torch.jit.script(torch.nn.Linear(3, 2)).save(path)
    with pytest.raises(UserError, match="does not take images of input_size 8") as refused:
        scorer_of(path, input_size=8)
    assert "\n" not in str(refused.value)
    torch.jit.script(torch.nn.Identity()).save(path)
    with pytest.raises(UserError, match=r"gives \(2, 3, 8, 8\) for 2 images"):
        scorer_of(path, input_size=8)


def test_the_middle_square_is_torchvisions_centre_crop_and_pils_lanczos():
    from torchvision.transforms.functional import center_crop

    for height, width in ((20, 33), (33, 20), (23, 20), (20, 23), (20, 20)):
        image = pictures(1, height, width)[0]
        cropped = center_crop(Image.fromarray(image), 20).resize((8, 8), Image.Resampling.LANCZOS)
        assert np.array_equal(middle_square(image, 8), np.asarray(cropped))
    assert middle_square(image, None) is image


def test_resize_comes_before_the_networks_own(network):
    images = pictures(3, 20, 33)
    resized = scorer_of(network, input_size=16, resize=8)(images, [""] * 3)["features"]
    by_hand = scorer_of(network, input_size=16)([middle_square(image, 8) for image in images], [""] * 3)["features"]
    assert np.array_equal(resized, by_hand)
    assert not np.array_equal(resized, scorer_of(network, input_size=16)(images, [""] * 3)["features"])
