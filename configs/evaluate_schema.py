"""What a user may write to measure images: which networks look at them."""

from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.schema import DiffusersSampler, Model, PairsRuntime, PromptsConfig, SamplerConfig, TeacherConfig

# ---------------------------------------------------------------------------------------------------- scorers


class ImageScorerConfig(Model):
    """Base of everything that measures single images."""

    resize: PositiveInt | None = None
    """Cut the middle square out and resize it to so many pixels (PIL, Lanczos, 8 bits) before anything else, as
    protocols that compare at 256 pixels do. None: images as they are."""


class OpenClipConfig(ImageScorerConfig):
    """A network of open_clip's and its weights."""

    model: str = "builtin"
    """builtin: the judge that comes along; a name of open_clip's, such as ViT-g-14; local-dir:FOLDER with
    open_clip_config.json, weights and tokenizer; or hf-hub:OWNER/NAME."""
    weights: str | None = None
    """For a name: which weights, as a tag of open_clip's (laion2b_s12b_b42k) or a file. The others bring their own."""

    @model_validator(mode="after")
    def _one_source(self) -> "OpenClipConfig":
        brings_weights = self.model == "builtin" or self.model.startswith(("local-dir:", "hf-hub:"))
        if brings_weights and self.weights is not None:
            raise ValueError(f"weights: model {self.model} brings its own; leave weights out")
        if not brings_weights and self.weights is None:
            raise ValueError(f"weights: missing; model {self.model} needs a tag of open_clip's or a file")
        return self


class ClipScorerConfig(OpenClipConfig):
    """CLIP score: cosine similarity of image and prompt. Column ``clip``, a number in [-1, 1]."""

    kind: Literal["clip"] = "clip"
    """Discriminator."""
    prefix: str = ""
    """Text put before every prompt, such as "A photo depicts "."""


class OpenClipFeaturesConfig(OpenClipConfig):
    """Features of an open_clip network's image tower, not normalized. Column ``features``, a vector."""

    kind: Literal["open_clip_features"] = "open_clip_features"
    """Discriminator."""


class InceptionFeaturesConfig(ImageScorerConfig):
    """clean-fid's Inception features, those of FID and KID. Column ``features``, 2048 numbers."""

    kind: Literal["inception_features"] = "inception_features"
    """Discriminator."""
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] = "clean"
    """How images are brought to 299 pixels, and which port of the network sees them; numbers of two modes do not
    compare. legacy_tensorflow is what StyleGAN's and EDM's own code does."""
    weights: str | None = None
    """The file inception-2015-12-05.pt (legacy_pytorch: pt_inception-2015-12-05-6726825d.pth). None: from clean-fid's
    usual cache, downloaded when it is not there."""


class TorchscriptFeaturesConfig(ImageScorerConfig):
    """Features of any network saved as TorchScript: (B, 3, S, S) -> (B, width). Column ``features``, a vector."""

    kind: Literal["torchscript_features"] = "torchscript_features"
    """Discriminator."""
    path: str
    """The file. It holds a program and runs it: use files of people you trust."""
    input_size: PositiveInt
    """Height and width S that the network takes; images are resized to it as clean-fid does (bicubic, float)."""
    input_range: tuple[float, float] = (-1.0, 1.0)
    """What black and white are to the network."""


ScorerConfig = Annotated[
    ClipScorerConfig | OpenClipFeaturesConfig | InceptionFeaturesConfig | TorchscriptFeaturesConfig,
    Field(discriminator="kind"),
]

# -------------------------------------------------------------------------------------------------- evaluations


class LatencyConfig(Model):
    """How systems are timed: alone on one device, one after the other."""

    batch_sizes: tuple[PositiveInt, ...] = (1, 16)
    """Images of a batch; each is timed."""
    warmup: NonNegativeInt = 1
    """Batches that are not timed, before those that are."""
    repeats: PositiveInt = 5
    """Batches that are timed; median and quartiles are reported."""


class EvaluateConfig(Model):
    """Draw images from a teacher at several step counts and from its student, measure them, and write a report.

    Every system gets the same noises and prompts. The same command again goes on where it stopped.
    """

    output: str
    """Folder of the evaluation: an absolute path, s3://bucket/prefix, gs://... or az://..."""
    student: str | None = None
    """Run directory of a training, whose export_ema (or else export) is taken; or such a folder itself. None: only the
    teacher is measured."""
    teacher: TeacherConfig
    """Of the student; it is measured in the same way."""
    teacher_steps: tuple[PositiveInt, ...] = (50, 16, 8, 4, 2, 1)
    """Steps of the teacher's sampler: one system each."""
    pairs: str | None = None
    """A pair dataset that stands for the teacher with most steps, so that it is not drawn again: one with lossless
    images and these very settings, noises and prompts, such as OTHER_EVALUATION/images/teacher-50."""
    sampler: SamplerConfig = DiffusersSampler(scheduler="DDIMScheduler", options={"timestep_spacing": "trailing"})
    """The teacher's sampler; teacher_steps says how many steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """The teacher's guidance weight; a student has its own in its weights."""
    negative_prompt: str = ""
    """The prompt of the unconditional branch."""
    prompts: PromptsConfig
    """What to ask for."""
    num_images: PositiveInt | None = None
    """Images of each system; None is every prompt times images_per_prompt."""
    images_per_prompt: PositiveInt = 1
    """Images of one prompt, one after the other. More than one: their diversity is measured."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Root of all noise; another one than that of the pairs that a student learnt, which is 0 unless they say so."""
    features: Annotated[
        OpenClipFeaturesConfig | InceptionFeaturesConfig | TorchscriptFeaturesConfig, Field(discriminator="kind")
    ] = InceptionFeaturesConfig()
    """The network in whose features images are compared."""
    reference: str | None = None
    """Real images: an .npz of statistics (mu, sigma, count, and features for KID); a folder of images; the root of a
    pair dataset; cleanfid:NAME/RESOLUTION/SPLIT for statistics that clean-fid publishes, such as
    cleanfid:cifar10/32/train; or builtin, the test split of the built-in teacher's data. None: no FID, no KID."""
    allow_few_images: bool = False
    """Accept fewer images than the features have dimensions: their FID is far too large, yet may serve to compare."""
    clip: ClipScorerConfig | None = None
    """CLIP score; None: it is not measured."""
    labels: str | None = None
    """A .csv file with a row for each possible caption: caption, then what is right about it, such as garment, colour.
    With it the share of images is measured whose nearest caption is the prompt. Needs open_clip_features."""
    latency: LatencyConfig | None = LatencyConfig()
    """How systems are timed. null: they are not."""
    keep_images: bool = True
    """Keep the drawn images once they are measured. Off: only tables, numbers and the few images shown are left."""
    grid_prompts: Annotated[int, Field(ge=1, le=24)] = 8
    """Prompts whose images are shown."""
    samples_per_shard: Annotated[int, Field(ge=1, le=100_000)] = 1024
    """Images of one shard: the unit of work."""
    runtime: PairsRuntime = PairsRuntime()
    """How it is computed."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.student is None and not self.teacher_steps:
            raise ValueError("nothing to measure: give student, teacher_steps or both")
        if self.pairs is not None and not self.teacher_steps:
            raise ValueError("pairs stands for the teacher with most steps, and teacher_steps is empty; name its steps")
        if len(set(self.teacher_steps)) < len(self.teacher_steps):
            raise ValueError("teacher_steps names a number twice")
        if self.sampler.steps != type(self.sampler).model_fields["steps"].default:
            raise ValueError("sampler.steps: teacher_steps says how many steps; leave it out")
        if self.labels is not None and self.features.kind != "open_clip_features":
            raise ValueError(f"labels need features.kind open_clip_features, which can read; not {self.features.kind}")
        return self


class CompareConfig(Model):
    """Put several evaluations side by side on one page."""

    evaluations: tyro.conf.Positional[tuple[str, ...]]
    """Folders that stages/evaluate.py has written."""
    output: str
    """Folder for the page."""
