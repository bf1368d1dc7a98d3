"""What a user may write, and what identifies a dataset.

Every model is frozen and refuses unknown keys. Attribute docstrings are the ``--help`` text; units are in the names.

Two kinds of model live here, and the difference matters:

* *What decides the bytes of a sample* (``TeacherIdentity``, ``PairsSettings``, ``PairsSpec``). Only ``PairsSpec`` is
  hashed (see ``configs/fingerprint.py``), whole and by type: to add a field to it is to change every fingerprint.
* *How and where it is computed* (``TeacherConfig`` paths, ``PairsLayout``, ``PairsRuntime``). Never hashed.
"""

import math
from typing import Annotated, Literal, Self

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

FORMAT_VERSION = 1
"""Version of the shard format (docs/shard_format.md). Part of every fingerprint."""

NOISE_RECIPE = "philox-np-v1"
"""Name of the map (seed, sample id) -> noise (pipeline/noise.py). Part of every fingerprint."""

Dtype = Literal["float32", "float16", "bfloat16"]


class Model(BaseModel):
    """Base of all configuration: immutable; unknown keys, NaN and infinity refused; attribute docstrings are help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------- teachers


class MixtureTeacherConfig(Model):
    """The toy teacher: a Gaussian mixture over small pictures, whose score is known in closed form."""

    kind: Literal["mixture"] = "mixture"
    """Discriminator."""
    image_size: Annotated[int, Field(ge=8, le=256)] = 32
    """Height and width of the pictures, in pixels."""
    std: PositiveFloat = 0.05
    """Standard deviation of every component around its picture; pictures range over [-1, 1]."""


class StableDiffusionTeacherConfig(Model):
    """A text-to-image pipeline of the Stable Diffusion 1.x / 2.x family, as diffusers saves it."""

    kind: Literal["stable_diffusion"] = "stable_diffusion"
    """Discriminator."""
    path: str
    """A diffusers pipeline folder, a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or builtin: the small
    teacher that ships with the package."""
    revision: str | None = None
    """Hub revision: a commit hash for a reproducible run. Not allowed for a folder."""
    variant: str | None = None
    """Weight file variant, such as fp16. None takes the files without a variant."""
    dtype: Dtype = "float32"
    """Precision of the networks. Scheduler arithmetic, guidance and x0 stay float32."""


class EdmTeacherConfig(Model):
    """A pixel-space network of Karras et al. 2022 (EDM), class-conditional or not: DDPM++, ADM or a UNet2DModel."""

    kind: Literal["edm"] = "edm"
    """Discriminator."""
    path: str
    """A folder that stages/convert_edm.py made of a published checkpoint, or diffusers' own of unet/ and scheduler/."""
    dtype: Dtype = "float32"
    """Precision of the network's layers. Noise embedding, preconditioning and x0 stay float32."""


TeacherConfig = Annotated[
    MixtureTeacherConfig | StableDiffusionTeacherConfig | EdmTeacherConfig, Field(discriminator="kind")
]


class TeacherIdentity(Model):
    """What makes two teachers the same teacher, wherever their files lie."""

    kind: str
    """``mixture``, ``stable_diffusion`` or ``edm``."""
    weights_digest: str
    """sha256 over every tensor and every setting that shapes the output; independent of path and file split."""
    dtype: Dtype
    """Precision of the network calls."""
    parametrization: str
    """What the network predicts: eps, v, x0, flow or score."""
    schedule: str
    """The noise schedule in one line, such as ``vp:scaled_linear:0.00085:0.012:1000`` or ``edm``."""
    latent_scale: float | None
    """Factor between decoder latents and the teacher's x0; None for a teacher that works on pixels."""
    sample_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Shape of noise and x0 of one sample, channels first; at most 2**28 numbers."""
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Shape of one decoded image: channels, height, width; likewise."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if max(math.prod(self.sample_shape), math.prod(self.image_shape)) > 2**28:
            raise ValueError("sample_shape or image_shape: more than 2**28 numbers in one sample")
        return self


# ---------------------------------------------------------------------------------------------------- samplers


class EdmHeunSampler(Model):
    """Heun's method on the Karras grid, with optional churn (Karras et al. 2022, Algorithm 2), float64 state."""

    name: Literal["edm_heun"] = "edm_heun"
    """Discriminator."""
    steps: PositiveInt = 18
    """Number of noise levels; network evaluations are 2 * steps - 1."""
    sigma_min: PositiveFloat = 0.002
    """Smallest noise level of the grid."""
    sigma_max: PositiveFloat = 80.0
    """Largest noise level; the sampler starts from noise * sigma_max."""
    rho: PositiveFloat = 7.0
    """Exponent of the Karras grid."""
    s_churn: NonNegativeFloat = 0.0
    """Amount of noise added over the whole trajectory; 0 is the deterministic ODE."""
    s_min: NonNegativeFloat = 0.0
    """Noise is added only at levels of at least this."""
    s_max: PositiveFloat | None = None
    """Noise is added only at levels of at most this; None is no bound."""
    s_noise: PositiveFloat = 1.0
    """Standard deviation of the added noise."""

    @model_validator(mode="after")
    def _ordered(self) -> "EdmHeunSampler":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class DdimSampler(Model):
    """Deterministic DDIM (Song et al. 2021); on the Karras grid this is Euler's method. One evaluation a step."""

    name: Literal["ddim"] = "ddim"
    """Discriminator."""
    steps: PositiveInt = 50
    """Number of steps, each one network evaluation."""
    sigma_min: PositiveFloat = 0.002
    """Smallest noise level of the grid."""
    sigma_max: PositiveFloat = 80.0
    """Largest noise level; the sampler starts from noise * sigma_max."""
    rho: PositiveFloat = 7.0
    """Exponent of the Karras grid."""

    @model_validator(mode="after")
    def _ordered(self) -> "DdimSampler":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class DiffusersSampler(Model):
    """A diffusers scheduler class by name, started from the teacher's own scheduler config."""

    name: Literal["diffusers"] = "diffusers"
    """Discriminator."""
    scheduler: str = "PNDMScheduler"
    """Class name: PNDMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, ..."""
    steps: PositiveInt = 50
    """Argument of set_timesteps."""
    options: Annotated[dict[str, JsonValue], tyro.conf.Suppress] = {}
    """Scheduler config entries that replace the teacher's own, such as timestep_spacing: trailing. YAML only."""


SamplerConfig = Annotated[EdmHeunSampler | DdimSampler | DiffusersSampler, Field(discriminator="name")]


# ------------------------------------------------------------------------------------------- pairs: what is made


class FieldsConfig(Model):
    """Which members a sample has in its shard."""

    noise: bool = True
    """Store the starting noise (float16). Off: readers derive it again from seed and sample id."""
    x0: Literal["latent", "pixels", "none"] = "latent"
    """Store the teacher's output: its latent, or decoded pixels in [-1, 1]. A pixel teacher has no latent."""
    x0_dtype: Literal["float16", "float32"] = "float16"
    """Stored precision of x0."""
    image: Literal["png", "webp", "jpg", "none"] = "png"
    """Store a viewable 8-bit picture: png and webp are lossless, jpg is quality 95 without chroma subsampling."""
    prompt: bool = True
    """Store the prompt as text, or the class of a class-conditional teacher as .cls. Off: it is still in the index."""
    text_embedding: bool = False
    """Store the prompt embedding (float16). Large; it repeats for every pair of a prompt."""

    @model_validator(mode="after")
    def _something(self) -> "FieldsConfig":
        if self.x0 == "none" and self.image == "none":
            raise ValueError("x0 and image are both none: a pair needs the teacher's output, store at least one")
        return self


class PairsSettings(Model):
    """What a user decides about the content of a pair dataset: the ``spec`` section."""

    sampler: SamplerConfig
    """How the teacher is sampled."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance weight w in x_uncond + w (x_cond - x_uncond); 1 is no guidance and costs one call."""
    negative_prompt: str = ""
    """The prompt of the unconditional branch."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of all randomness: noise = f(seed, sample id)."""
    pairs_per_prompt: PositiveInt = 1
    """Consecutive samples that share a prompt: prompt of sample i = table[i // pairs_per_prompt]."""
    num_samples: PositiveInt | None = None
    """Number of pairs; None is every prompt times pairs_per_prompt."""
    fields: FieldsConfig = FieldsConfig()
    """Which members a sample has."""


class PairsSpec(PairsSettings):
    """The identity of a pair dataset: the settings, and what is known once teacher and prompts have been looked at.

    Equal specs give the same samples; the sha256 of this model is the dataset's fingerprint.
    """

    num_samples: PositiveInt  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    """Number of samples, resolved: required here, and never None."""
    teacher: TeacherIdentity
    """The teacher by content."""
    prompts_digest: str
    """sha256 over the ids and texts of the prompt table."""
    noise_recipe: str = NOISE_RECIPE
    """Name of the noise derivation."""
    format_version: int = FORMAT_VERSION
    """Version of the shard format."""


# ------------------------------------------------------------------------------------- pairs: how it is computed


class PromptsConfig(Model):
    """Where prompts come from, and which are kept."""

    path: str
    """Prompts as .txt (one a line), .csv, .jsonl or .parquet; a table made by prepare_prompts.py is taken as it is. For
    a class-conditional teacher the prompts are class numbers from 0, or classes: one drawn uniformly for each prompt
    that spec.num_samples asks for. classes is also what an unconditional teacher takes: no class, so often."""
    column: str = "prompt"
    """Column or key with the text, for csv, jsonl and parquet."""
    min_chars: Annotated[int, Field(ge=0)] = 1
    """Shorter prompts are dropped and counted."""
    max_chars: PositiveInt = 2000
    """Longer prompts are dropped and counted."""
    blocklist: str | None = None
    """Text file of words, one a line; prompts with one as a whole word, in any case, are dropped and counted."""
    limit: PositiveInt | None = None
    """Keep only the first so many prompts."""
    keep_duplicates: bool = False
    """Keep a prompt that was there before, as a list with a class for each sample needs it."""


class PairsLayout(Model):
    """How samples are cut into shards. Not part of the identity, yet fixed for the life of an output."""

    samples_per_shard: Annotated[int, Field(ge=1, le=100_000)] = 1024
    """Samples of one shard: the unit of work, of retry and of completion."""


class WorkersRuntime(Model):
    """Where workers run, and when a shard is given up. Never part of an identity: change any of it between two runs."""

    executor: Literal["ray", "in-process"] = "ray"
    """ray: actors on a cluster. in-process: a plain loop in this process, no Ray needed."""
    actors: PositiveInt | None = None
    """Number of Ray actors; None: as many as the cluster has room for, followed as it grows and shrinks. A number
    above the room there is makes an autoscaler add nodes."""
    cpus_per_actor: PositiveFloat = 1.0
    """CPUs of one actor; also its number of torch threads (at least 1)."""
    gpus_per_actor: NonNegativeFloat = 0.0
    """GPUs of one actor; 0.5 puts two actors on a GPU, 0 works on the CPU."""
    wait_for_resources_s: NonNegativeFloat = 0.0
    """Seconds to wait for nodes when the cluster has no room for one actor yet; its autoscaler is asked for it."""
    max_errors_per_shard: PositiveInt = 3
    """A shard that raised so often is given up with its reason; the run goes on and ends with exit code 1."""
    max_crashes_per_shard: PositiveInt = 10
    """A shard whose actor died so often (node lost, preempted, out of memory) is given up."""
    progress_period_s: PositiveFloat = 10.0
    """Seconds between progress lines when the output is not a terminal."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.gpus_per_actor > 1 and self.gpus_per_actor != int(self.gpus_per_actor):
            raise ValueError(f"gpus_per_actor {self.gpus_per_actor:g} must be at most 1, or whole")
        return self


class DatasetRuntime(WorkersRuntime):
    """How the shards of a dataset are made. Never part of the identity: change any of it between two runs."""

    batch_size: PositiveInt = 16
    """Samples that are computed together: of pairs, in one call of the teacher's sampler."""
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run stops when a larger share of the samples is rejected (not finite, constant or of a wrong shape)."""
    temp_dir: str | None = None
    """Node-local folder for shards being written; None is the system's temporary folder."""
    lease_period_s: PositiveFloat = 10.0
    """Seconds between heartbeats of the lease that keeps two runs off one output; stale after three periods."""


class PairsRuntime(DatasetRuntime):
    """How pairs are made. Never part of the identity: change any of it between two runs of one output."""

    compile: bool = False
    """torch.compile the network."""
    channels_last: bool = False
    """Use the channels_last memory format."""


# ----------------------------------------------------------------------------------------------- one per script


class GeneratePairsConfig(Model):
    """Sample a teacher and write noise/image/prompt pairs into WebDataset shards. The same command again resumes."""

    output: str
    """Dataset root: an absolute path, s3://bucket/prefix, gs://... or az://..."""
    teacher: TeacherConfig
    """Whom to sample."""
    prompts: PromptsConfig
    """What to ask for."""
    spec: PairsSettings
    """What a pair is."""
    layout: PairsLayout = PairsLayout()
    """How samples are cut into shards."""
    runtime: PairsRuntime = PairsRuntime()
    """How it is computed."""
    plan: bool = False
    """Only print counts, bytes, teacher evaluations and an estimate of hours; start no cluster, write nothing."""


class PreparePromptsConfig(Model):
    """Normalise, filter and de-duplicate prompts into one Parquet table with stable ids."""

    output: str
    """The table to write: a path or URI that ends in .parquet."""
    prompts: PromptsConfig
    """Where prompts come from, and which are kept."""


class ConvertEdmConfig(Model):
    """Make an EDM teacher, safetensors and JSON, of a published checkpoint."""

    source: tyro.conf.Positional[str]
    """The checkpoint: NVIDIA's .pkl, or OpenAI's edm_imagenet64_ema.pt."""
    output: str
    """Folder of the teacher; new."""


class VerifyShardsConfig(Model):
    """Check a dataset: hashes, counts, index, noise, and on request the teacher itself."""

    root: tyro.conf.Positional[str]
    """Dataset root."""
    deep: Annotated[int, Field(ge=0)] = 0
    """Run the teacher again on so many samples, and compare."""
    tolerance: PositiveFloat = 0.02
    """Largest relative rms difference of x0 that --deep accepts (another device or batch size rounds differently)."""
    teacher_path: str | None = None
    """Where the teacher lies now, if not where the run found it."""
    repair: bool = False
    """Move the commit records of damaged shards aside, so that generate_pairs.py makes exactly those again."""
    redo_rejected: bool = False
    """With --repair: withdraw shards with rejected samples too, to have them made again once the cause is mended."""
    gc: bool = False
    """Delete files that no commit record names and that are older than 24 hours."""


class StatusConfig(Model):
    """Say how far a dataset is. Reads the output only: no cluster needed."""

    root: tyro.conf.Positional[str]
    """Dataset root."""


class DemoPairsConfig(Model):
    """The whole of pair generation in a minute, on a Ray head of its own."""

    output: str
    """Folder of the dataset."""
    cpus: PositiveInt = 2
    """CPUs the Ray head offers."""
