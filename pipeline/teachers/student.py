"""A student out of a Stable Diffusion teacher's folder, and back into a folder that diffusers runs.

    network  = the teacher's UNet, trainable, float32
    pipeline = the student's UNet, a scheduler of one step, and every other part as the teacher has it

The scheduler makes ``StableDiffusionPipeline`` compute the one-step generator: x0 from unit noise, at one timestep. It
is DDIM over the teacher's noise levels 0 .. timestep, the later ones cut off, so that its longest stride starts at
``timestep`` and ends at x0. An offset would be shorter to write, but the pipeline resets every scheduler's
``steps_offset`` to 1.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import DiffusersSampler, Dtype, StableDiffusionTeacherConfig
from pipeline.safetensors_errors import system_errors
from pipeline.teachers.base import StudentUsage
from pipeline.teachers.folder import PARTS, UNUSED_PARTS, WEIGHTS, PipelineFolder, open_folder
from pipeline.teachers.stable_diffusion import read_network

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

MARKERS = ("model_index.json",)
"""The files by one of which a student's folder is known."""


def load_network(config: StableDiffusionTeacherConfig) -> nn.Module:
    """The teacher's UNet to be trained, on the CPU; its weights are the files', whatever ``config.dtype`` is.

    Dropout is off (Yin et al. 2024, App. B): the student is a function of its noise, and the scores are compared.

    Raises:
        UserError: the folder is missing, incomplete or not of the family.
    """
    from diffusers import UNet2DConditionModel

    network: nn.Module = read_network(UNet2DConditionModel, open_folder(config), "unet", torch.float32)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.train().requires_grad_(True)


def save_student(
    config: StableDiffusionTeacherConfig, state_dict: Mapping[str, Tensor], folder: Path, *, timestep: float
) -> None:
    """Write a diffusers pipeline folder; see :func:`pipeline.teachers.save_student`."""
    teacher = open_folder(config)
    for part in WEIGHTS:
        (folder / part).mkdir(parents=True)
        _write_json(folder / part / "config.json", _without_dtype(teacher.config(part)))
        # One float32 file without a variant, whatever the teacher has, so that the folder loads without being told.
        tensors = _unet_weights(teacher, state_dict) if part == "unet" else _stored_weights(teacher, part)
        path = folder / part / f"{WEIGHTS[part]}.safetensors"
        with system_errors(path):
            save_file(tensors, path, metadata={"format": "pt"})
    shutil.copytree(teacher.path / "tokenizer", folder / "tokenizer")
    _one_step_scheduler(teacher, int(timestep)).save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", _model_index())


def as_system(folder: Path, dtype: Dtype) -> tuple[StableDiffusionTeacherConfig, DiffusersSampler]:
    """A student's folder as a teacher, and the sampler that takes its one step."""
    return (
        StableDiffusionTeacherConfig(path=str(folder), dtype=dtype),
        DiffusersSampler(scheduler="DDIMScheduler", steps=1),
    )


def usage(folder: str) -> StudentUsage:
    """How to run what :func:`save_student` wrote at ``folder``."""
    return StudentUsage(
        metadata="library_name: diffusers\npipeline_tag: text-to-image",
        about="Images from noise and a prompt",
        parts="The text encoder and the decoder are the teacher's.",
        code=f'''import torch
from diffusers import DiffusionPipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
pipeline = DiffusionPipeline.from_pretrained("{folder}").to(device)
image = pipeline("a lighthouse on a cliff", num_inference_steps=1, guidance_scale=0).images[0]
image.save("image.png")''',
        where="with diffusers",
    )


def _unet_weights(teacher: PipelineFolder, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights, every name and shape checked: diffusers makes up what a folder lacks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(teacher.config("unet"))
    network.load_state_dict(state_dict, assign=True)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _stored_weights(teacher: PipelineFolder, part: str) -> dict[str, Tensor]:
    stored = (item for path in teacher.weights(part) for item in load_file(path).items())
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored}


def _without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """Config of a network without a precision: transformers 5 obeys it, whatever the pipeline's other parts are in."""
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}


def _one_step_scheduler(teacher: PipelineFolder, timestep: int) -> "DDIMScheduler":
    """DDIM whose single step goes from ``timestep`` to x0."""
    from diffusers import DDIMScheduler, DDPMScheduler

    own_config = teacher.config("scheduler")
    betas = DDPMScheduler.from_config(own_config).betas[: timestep + 1]  # any beta schedule, to the bit; DDIM knows few
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=own_config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,  # without effect on trailing steps; the pipeline warns of any other value
    )


def _model_index() -> dict[str, Any]:
    """Which class reads each part: those the teacher was read with, and no safety checker, since we have none."""
    import diffusers

    library = {"text_encoder": "transformers", "tokenizer": "transformers"}
    kinds = {part: kinds[0] for part, kinds in PARTS.items() if kinds} | {"scheduler": "DDIMScheduler"}
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        **{part: [library.get(part, "diffusers"), kind] for part, kind in kinds.items()},
        **{part: [None, None] for part in sorted(UNUSED_PARTS)},
        "requires_safety_checker": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
