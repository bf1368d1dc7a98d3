from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_edm
from support.tiny_sd import build
from torch import Tensor

from configs.schema import (
    DiffusersSampler,
    EdmHeunSampler,
    EdmTeacherConfig,
    MixtureTeacherConfig,
    StableDiffusionTeacherConfig,
)
from pipeline import teachers
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.noise import noise as derived_noise
from pipeline.teachers.base import Teacher
from trainer.sample_grid import GridInputs, SampleGrid, draw_grid

PROMPTS = ["a red circle", "", "a blue ring", "yellow", "a green\ncross"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionTeacherConfig:
    return StableDiffusionTeacherConfig(path=str(build(tmp_path_factory.mktemp("sd"))))


@pytest.fixture(scope="module")
def teacher(config: StableDiffusionTeacherConfig) -> Teacher:
    return teachers.load(config, CPU)


@pytest.fixture(scope="module")
def student(config: StableDiffusionTeacherConfig, teacher: Teacher) -> OneStepGenerator:
    """The teacher after a blow; it records gradients, as a network in training does."""
    network = teachers.load_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.3
    one = teacher.denoiser
    denoiser = Denoiser(partial(teacher.call, network), one.schedule, one.parametrization)
    return OneStepGenerator(denoiser, one.schedule, torch.tensor(999))


def inputs(teacher: Teacher, **changes: object) -> GridInputs:
    settings = {"seed": 3, "guidance_scale": 2.0, "negative_prompt": "ugly", "steps": 4}
    return GridInputs.from_teacher(teacher, PROMPTS, **(settings | changes))


def read(path: Path) -> Tensor:
    """A picture, (3, H, W), levels 0 to 255."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float()


def tiles(grid: Tensor, rows: int, columns: int, tile: int) -> Tensor:
    """The tiles of a grid, (rows, columns, 3, tile, tile): found by where they differ from the white between them."""
    ink = (grid < 250).any(0)

    def starts(is_inked: Tensor) -> list[int]:
        """Where runs of exactly the tile's length begin."""
        edges = torch.diff(torch.cat([torch.tensor([0]), is_inked.int(), torch.tensor([0])]))
        runs = zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True)
        return [start for start, end in runs if end - start == tile]

    tops, lefts = starts(ink.float().mean(1) > 0.5), starts(ink.float().mean(0) > 0.5)
    assert (len(tops), len(lefts)) == (rows, columns)
    return torch.stack([torch.stack([grid[:, y : y + tile, x : x + tile] for x in lefts]) for y in tops])


def check_column(found: Tensor, images: Tensor) -> None:
    """Every tile shows its image, each pixel as a block of equal ones, to one 8-bit level."""
    factor = found.shape[-1] // images.shape[-1]
    levels = ((images + 1) * 127.5).clamp(0, 255)
    expected = levels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    assert (found - expected).abs().max() <= 1


def z_of(grid_inputs: GridInputs) -> Tensor:
    return grid_inputs.noise.float()


@torch.no_grad()
def test_every_tile_is_what_its_column_says(teacher: Teacher, student: OneStepGenerator, tmp_path: Path) -> None:
    grid_inputs = inputs(teacher)
    t = torch.tensor(999)
    other = OneStepGenerator(student.denoiser, student.schedule, torch.tensor(399))
    with torch.enable_grad():
        SampleGrid(teacher, grid_inputs, t).write(tmp_path / "grids" / "a.png", {"student": student, "EMA": other})
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["a.png"]
    found = tiles(read(tmp_path / "grids" / "a.png"), rows=5, columns=4, tile=192)
    condition = teacher.encode_prompts(PROMPTS)
    one_step = OneStepGenerator(teacher.denoiser, teacher.denoiser.schedule, t)
    check_column(found[:, 0], grid_inputs.teacher_images)
    for column, generator in ((1, one_step), (2, student), (3, other)):
        check_column(found[:, column], teacher.decode(generator(z_of(grid_inputs), condition)))
    assert (found[:, 1] - found[:, 2]).abs().mean() > 2  # the columns are told apart
    assert (found[0] - found[1]).abs().mean() > 2


@torch.no_grad()
def test_inputs_are_derived_noise_and_the_teachers_default_sampler(teacher: Teacher) -> None:
    found = inputs(teacher)
    noise = np.stack([derived_noise(3, i, (4, 8, 8), "grid") for i in range(5)])
    assert found.noise.dtype == torch.float16
    assert np.array_equal(found.noise.numpy(), noise)
    assert found.prompts == PROMPTS
    assert found.teacher_title == "teacher, 4 steps"
    sampler = DiffusersSampler(scheduler="DDIMScheduler", steps=4)
    condition, unconditional = teacher.encode_prompts(PROMPTS), teacher.encode_prompts(["ugly"])
    x0 = teacher.sample(z_of(found), condition, unconditional, sampler, 2.0, seed=0, sample_ids=range(5))
    torch.testing.assert_close(found.teacher_images, teacher.decode(x0), rtol=0, atol=1e-4)
    assert not found.teacher_images.requires_grad

    mixture = teachers.load(MixtureTeacherConfig(image_size=8), CPU)
    found = inputs(mixture)
    condition, unconditional = mixture.encode_prompts(PROMPTS), mixture.encode_prompts(["ugly"])
    heun = EdmHeunSampler(steps=4)
    x0 = mixture.sample(z_of(found), condition, unconditional, heun, 2.0, seed=0, sample_ids=range(5))
    torch.testing.assert_close(found.teacher_images, x0, rtol=0, atol=1e-4)


def test_the_seed_alone_decides_and_no_global_generator_is_touched(
    teacher: Teacher, student: OneStepGenerator, tmp_path: Path
) -> None:
    pictures: list[bytes] = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(pictures))
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
        grid = SampleGrid(teacher, inputs(teacher, seed=seed), torch.tensor(999))
        grid.write(tmp_path / "a.png", {"student": student})
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_teachers_columns_are_computed_once(teacher: Teacher, student: OneStepGenerator, tmp_path: Path) -> None:
    calls: list[int] = []
    counted = OneStepGenerator(lambda *a: calls.append(1) or student.denoiser(*a), student.schedule, student.t)
    evaluations: list[int] = []
    hook = teacher._unet.register_forward_hook(lambda *_: evaluations.append(1))  # pyright: ignore
    grid = SampleGrid(teacher, inputs(teacher), torch.tensor(999))
    grid.write(tmp_path / "a.png", {"student": counted})
    after_first = len(evaluations)
    grid.write(tmp_path / "a.png", {"student": counted})
    hook.remove()
    assert len(evaluations) == after_first > 0
    assert len(calls) == 4  # five samples are two batches


def test_a_compiled_teacher_is_called_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    settings = EdmTeacherConfig(path=str(tiny_edm.build(tmp_path / "edm", label_dim=0)))
    teacher = teachers.load(settings, CPU, compile=True)
    prompts = [""] * 5
    drawn = GridInputs.from_teacher(teacher, prompts, seed=3, guidance_scale=1.0, negative_prompt="", steps=2)
    SampleGrid(teacher, drawn, torch.tensor(80.0)).write(tmp_path / "a.png", {})
    assert graphs == []
    with torch.no_grad():  # as training calls it
        teacher.denoiser(torch.zeros(1, 3, 16, 16), torch.tensor(80.0), teacher.encode_prompts([""]))
    assert graphs


def test_pairs_bring_their_own_teacher_column(teacher: Teacher, student: OneStepGenerator, tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 16, 16)
    pairs = GridInputs(inputs(teacher).noise, PROMPTS, images)
    SampleGrid(teacher, pairs, torch.tensor(999)).write(tmp_path / "a.png", {"student": student})
    picture = read(tmp_path / "a.png")
    column = picture[:, :, 8:200].float()
    for image, level in zip(images, (0, 64, 128, 191), strict=False):
        assert ((column - level).abs().amax((0, 2)) <= 1).sum() == 192, image


@pytest.mark.parametrize(("size", "tile"), [(8, 192), (16, 192), (60, 180), (192, 192), (256, 256)])
def test_small_pictures_are_drawn_larger_by_a_whole_factor(size: int, tile: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 1.8 - 1
    grid = torch.from_numpy(np.array(draw_grid({"a": images, "b": images}, ["", "x"]))).permute(2, 0, 1).float()
    found = tiles(grid, 2, 2, tile)
    check_column(found[:, 0], images)
    check_column(found[:, 1], images)


def test_titles_and_prompts_are_written_and_stay_on_the_picture() -> None:
    images = torch.zeros(1, 3, 64, 64)
    plain = draw_grid({" ": images, "  ": images}, ["x"])

    def ink(titles: list[str], prompt: str) -> Tensor:
        picture = draw_grid(dict.fromkeys(titles, images), [prompt])
        assert picture.size == plain.size
        return torch.from_numpy(np.array(picture)).float().sub(255).abs().sum(-1) > 0

    empty = ink([" ", "  "], "x")
    titled = ink(["student", "  "], "x") & ~empty
    assert titled[:26, 8:100].any()
    assert not titled[26:].any()
    for prompt in ("W" * 500, "a very long prompt " * 50, "one\nline\n" * 40):
        written = ink([" ", "  "], prompt)
        assert written[26:52].any()
        assert written[26:52, 350:400].any()  # cut no sooner than need be
        assert not written[:, -8:].any()  # and before the margin
        assert torch.equal(written[52:], empty[52:])
    assert ink([" ", "  "], "")[26:52, 50:90].any()  # an empty prompt says that it is one
