"""A Stable Diffusion pipeline as files: where it lies, what its parts are, and whether it is of the family.

The family is told by its parts, not by the name of its pipeline class, so that community variants are taken: a UNet
from latents and text to a prediction of the same shape, a CLIP text encoder with its tokenizer, a KL autoencoder, and
a scheduler over discrete variance-preserving timesteps. A UNet with further inputs (inpainting, SDXL, distilled
guidance) is refused with the reason.

Only safetensors are read, never a pickle. Nothing here builds a network or imports torch: a login node can do it.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import UserError
from configs.json_text import parse_json
from configs.schema import StableDiffusionTeacherConfig
from pipeline.teachers import builtin

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": None,
}
"""The parts we need, and the classes that may play them."""
UNUSED_PARTS = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
"""Parts of the family that turning noise and text into pictures does without; they are not loaded."""
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Name of each network's weight file, without variant and ending."""
EXTRA_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
"""UNet config entries that, when set, ask for inputs beyond latents, timestep and text."""
PARAMETRIZATIONS: dict[str, Literal["eps", "v"]] = {"epsilon": "eps", "v_prediction": "v"}
"""The scheduler's prediction_type -> our name of it."""


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline folder that is complete and of the family; made by :func:`open_folder`.

    Attributes:
        path: the folder.
        variant: infix of the weight files' names, such as fp16.
    """

    path: Path
    variant: str | None

    def config(self, part: str) -> dict[str, Any]:
        """The config file of a network or of the scheduler."""
        return _read_json(self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of a network: one, or those its index names.

        Raises:
            UserError: there are none, one is missing, or it is not clear which ones are meant.
        """
        infix = f".{self.variant}" if self.variant else ""
        single = self.path / part / f"{WEIGHTS[part]}{infix}.safetensors"
        index = self.path / part / f"{WEIGHTS[part]}.safetensors.index{infix}.json"
        if single.exists() and index.exists():
            raise UserError(f"{single.parent}: has both {single.name} and {index.name}; remove the one not meant")
        if single.exists():
            return [single]
        if not index.exists():
            raise UserError(self._no_weights(single))
        paths = [index.parent / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        for path in paths:
            if not path.exists():
                raise UserError(f"{path}: missing, though {index.name} names it; copy or download it again")
        return paths

    def tokenizer_files(self) -> dict[str, Any]:
        """What the tokenizer's files say: parsed JSON or text, by file name."""
        files = (p for p in (self.path / "tokenizer").iterdir() if p.suffix in (".json", ".txt"))
        return {p.name: _read_json(p) if p.suffix == ".json" else p.read_text(encoding="utf-8") for p in files}

    def _no_weights(self, wanted: Path) -> str:
        """Why there are no weights: pickled only, another variant only, or none at all."""
        others = sorted(path.name for path in wanted.parent.glob("*.safetensors"))
        if others:
            return f"{wanted}: missing; the folder has {', '.join(others)}: set teacher.variant to the infix of these"
        pickles = sorted(
            path.name for path in wanted.parent.glob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth")
        )
        if pickles:
            return (
                f"{wanted.parent}: only pickled weights ({pickles[0]}), which are never loaded; convert a pipeline "
                "that you trust once: pipe = StableDiffusionPipeline.from_pretrained(OLD); "
                "pipe.save_pretrained(NEW, safe_serialization=True)"
            )
        return f"{wanted}: missing; copy or download the folder again"


def open_folder(config: StableDiffusionTeacherConfig) -> PipelineFolder:
    """Find the folder, fetching it from the hub if need be, and check that we can sample what is in it.

    Raises:
        UserError: it is not there, not complete, not in safetensors or not of the Stable Diffusion 1.x / 2.x family.
    """
    folder = PipelineFolder(_locate(config), config.variant)
    if not (folder.path / "model_index.json").exists():
        raise UserError(
            f"teacher.path: {folder.path} has no model_index.json, so it is not a diffusers pipeline folder; make one "
            "of a single-file checkpoint with StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    with as_its_files_say(folder.path):
        reason = next(_misfits(folder), None)
    if reason is not None:
        raise UserError(
            f"teacher.path: {folder.path} is not a Stable Diffusion 1.x / 2.x text-to-image pipeline: {reason}"
        )
    for part in WEIGHTS:
        folder.weights(part)
    return folder


@contextmanager
def as_its_files_say(path: Path) -> Generator[None]:
    """Read what the files of a folder say, or build the networks that they describe.

    Raises:
        UserError: they hold other things than diffusers writes there. diffusers and transformers have an exception of
            any kind for such files, and so have we, who take entries as they come.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = " ".join([f"{type(error).__name__}:", *str(error).split()])
        raise UserError(f"{path}: not as diffusers writes it ({cause[:300]}); copy or download it again") from error


def sample_shape(folder: PipelineFolder) -> tuple[int, int, int]:
    """Channels, height and width of the latents that the UNet was made for."""
    unet = folder.config("unet")
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    written_by = [int(number) for number in unet["_diffusers_version"].split(".")[:2]]
    if written_by < [0, 9] and isinstance(size, int) and size < 64:
        # StableDiffusionPipeline's own rule: configs of that time say 32 where the network was made for 64.
        height, width = 64, 64
    return (unet["in_channels"], height, width)


def image_shape(folder: PipelineFolder) -> tuple[int, int, int]:
    """Channels, height and width of a decoded image: every block of the decoder but one doubles the size."""
    _, height, width = sample_shape(folder)
    factor = 2 ** (len(folder.config("vae")["block_out_channels"]) - 1)
    return (3, factor * height, factor * width)


def latent_scale(folder: PipelineFolder) -> float:
    """x0 = latent_scale * (decoder latent - shift). Autoencoders older than the entry have SD 1's value."""
    return folder.config("vae").get("scaling_factor", 0.18215)


def _locate(config: StableDiffusionTeacherConfig) -> Path:
    path = Path(config.path).expanduser()
    if path.is_dir():
        if config.revision is not None:
            raise UserError(
                f"teacher.revision: only a hub id has revisions and {path} is a folder; leave it out, "
                "or write --teacher.revision None where a file sets it"
            )
        return path
    if config.path == builtin.NAME:
        return builtin.TEACHER
    if path.exists():
        raise UserError(f"teacher.path: {path} is a file; a diffusers pipeline folder or a hub id is needed")
    if config.path.startswith(("/", "~", ".")) or config.path.count("/") != 1:
        raise UserError(f"teacher.path: there is no folder {path}")
    return _download(config)


def _download(config: StableDiffusionTeacherConfig) -> Path:
    """A hub snapshot of the parts we use: configs, tokenizer and the safetensors of the variant asked for."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    infix = f".{config.variant}" if config.variant else ""
    patterns = ["model_index.json", *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt"))]
    for part, stem in WEIGHTS.items():
        patterns += [f"{part}/{stem}{infix}.safetensors", f"{part}/{stem}{infix}-*-of-*.safetensors"]
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(
            f"teacher.path: {config.path} is no folder here and could not be fetched from the hub ({cause}); give a "
            "folder, or check the name, teacher.revision, the network and the login (hf auth login)"
        ) from error


def _misfits(folder: PipelineFolder) -> Iterator[str]:
    """Every way in which the folder is not of the family, most telling first."""
    index = _read_json(folder.path / "model_index.json")
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    present = {name for name, kind in parts.items() if kind is not None}
    if missing := PARTS.keys() - present:
        yield f"model_index.json names no {' and no '.join(sorted(missing))}"
        return
    if extra := present - PARTS.keys() - UNUSED_PARTS:
        yield f"it has the further parts {', '.join(sorted(extra))}"
    for part, kinds in PARTS.items():
        if kinds and parts[part] not in kinds:
            yield f"its {part} is a {parts[part]}, not a {kinds[0]}"
    unet, vae, scheduler = folder.config("unet"), folder.config("vae"), folder.config("scheduler")
    latent_channels = vae.get("latent_channels", 4)
    if unet["in_channels"] != latent_channels or unet["out_channels"] != latent_channels:
        channels = f"{unet['in_channels']} to {unet['out_channels']}"
        yield f"its unet maps {channels} channels where latents have {latent_channels}"
    if vae.get("out_channels", 3) != 3:
        yield f"its vae decodes {vae['out_channels']} channels, not red, green and blue"
    for key in EXTRA_INPUTS:
        if unet.get(key) is not None:
            yield f"its unet needs inputs beyond latents, timestep and text ({key}: {unet[key]})"
    if unet.get("sample_size") is None:
        yield "unet/config.json has no sample_size"
    if (prediction := scheduler.get("prediction_type", "epsilon")) not in PARAMETRIZATIONS:
        yield f"its prediction_type is {prediction}, not {' or '.join(PARAMETRIZATIONS)}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy or download the folder again") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
