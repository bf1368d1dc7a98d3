"""What a user may write for a training run, and what identifies one.

As with pairs there are two kinds of section. What decides the weights (``student``, ``loss``, ``optimizer``, ``batch``,
``seed``, ``precision``; teacher, data and prompts by content) makes up :class:`TrainSpec`, which a run directory keeps
and compares when it is resumed. How and where it is computed (``runtime``, ``output``) may change between two runs of
one directory, and so may the number of processes.
"""

from typing import Annotated, Literal

import tyro
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.schema import Model, TeacherConfig, TeacherIdentity

Difference = Literal[
    "teacher.weights_digest",
    "teacher.schedule",
    "teacher.parametrization",
    "teacher.latent_scale",
    "guidance_scale",
    "negative_prompt",
]
"""What a dataset and a training run may disagree on, if the run says that it is meant."""


class PairsSource(Model):
    """One of several pair datasets."""

    pairs: str
    """Dataset root."""
    weight: PositiveFloat = 1.0
    """Share of the samples that come from it, relative to the others; resolved to a thousandth."""
    selection: str | None = None
    """Selection file: only these samples."""


class DataConfig(Model):
    """Where pairs and prompts come from."""

    pairs: str | None = None
    """Root of the pair dataset, as generate_pairs.py wrote it. Not needed with loss.regression_weight 0."""
    selection: str | None = None
    """Selection file of that dataset (.parquet): only these samples are used."""
    mix: Annotated[tuple[PairsSource, ...], tyro.conf.Suppress] = ()
    """Several datasets instead of one: a list of pairs, weight and selection. YAML only."""
    prompts: str | None = None
    """Prompt table (.parquet, see prepare_prompts.py) for distribution matching; None: the prompts of the pairs."""
    holdout: NonNegativeInt = 16
    """Pairs of each dataset that are kept out of training, evenly spread, to measure the distance to them."""
    shuffle_window: PositiveInt = 8
    """Shards whose samples are shuffled together; their order is shuffled as a whole."""
    allow_differences: Annotated[tuple[Difference, ...], tyro.conf.Suppress] = ()
    """Settings in which dataset and run may differ, because it is meant. YAML only."""
    allow_partial: bool = False
    """Train on the shards that exist of a dataset that is not finished."""

    @model_validator(mode="after")
    def _one_way(self) -> "DataConfig":
        if self.mix and (self.pairs is not None or self.selection is not None):
            raise ValueError("mix and pairs exclude each other: list every dataset under mix, or give pairs alone")
        if self.selection is not None and self.pairs is None:
            raise ValueError("selection needs pairs: it selects samples of that dataset")
        return self

    @property
    def sources(self) -> tuple[PairsSource, ...]:
        """The datasets, whichever way they were given."""
        return self.mix if self.pairs is None else (PairsSource(pairs=self.pairs, selection=self.selection),)


class StudentConfig(Model):
    """The one-step generator: the teacher's network at one fixed time."""

    timestep: NonNegativeFloat | None = None
    """The time the network is told: a timestep for variance-preserving teachers (SDXL-like ones take 399), a noise
    level for EDM ones. None: the last timestep, or noise level 80."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights; None: no average is kept."""


class LossConfig(Model):
    """The losses of student and fake score (Yin et al. 2024, Eq. 7, 8 and Algorithm 2)."""

    dm_weight: NonNegativeFloat = 1.0
    """Weight of distribution matching in the student's loss; 0 is plain regression on pairs, without a fake score."""
    regression_weight: NonNegativeFloat = 0.25
    """Weight of the regression on pairs in the student's loss (lambda); 0 needs no pairs."""
    guidance_scale: NonNegativeFloat = 1.0
    """Guidance weight w of the real score; 1 is no guidance. The pairs must have been made with the same."""
    negative_prompt: str = ""
    """The prompt of the real score's unconditional branch."""
    t_min: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Smallest time of distribution matching, as a fraction of the times that the teacher was trained on."""
    t_max: Annotated[float, Field(ge=0, le=1)] = 0.98
    """Largest time of distribution matching, likewise."""
    dm_gradient: Literal["algorithm_2", "equation_7"] = "algorithm_2"
    """equation_7 multiplies the gradient by alpha_t, as the paper's equations say; its Algorithm 2 does not."""
    dm_on_pairs: bool = False
    """Match distributions on the student's samples from pair noises too (the paper's LAION setting)."""
    critic_weighting: Literal["snr", "edm", "x0"] | None = None
    """Weight of the fake score's squared error in x0: snr is alpha^2 / sigma^2 (the error in eps), edm is sigma^-2 +
    sigma_data^-2, x0 is 1. None: snr, or edm for a teacher on the EDM schedule."""
    critic_steps_per_generator_step: PositiveInt = 1
    """Updates of the fake score for each of the student: 1 is DMD, 5 or 10 the two-time-scale rule."""
    regression: Literal["lpips", "l2", "pseudo_huber"] = "lpips"
    """Distance between the student's and the teacher's output of a pair."""
    regression_space: Literal["pixels", "latent"] = "pixels"
    """Where it is measured: images after the teacher's decoder, or x0 itself. lpips needs pixels."""
    lpips_resolution: PositiveInt | None = None
    """Images are resized to this height and width for lpips; None: 224 if they are smaller, else as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> "LossConfig":
        if self.dm_weight == 0 and self.regression_weight == 0:
            raise ValueError("dm_weight and regression_weight are both 0: nothing is left to learn from")
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min {self.t_min:g} must be below t_max {self.t_max:g}")
        if self.regression_weight > 0 and self.regression == "lpips" and self.regression_space == "latent":
            raise ValueError("regression lpips compares images; set regression_space: pixels, or regression: l2")
        return self


class OptimizerConfig(Model):
    """AdamW, the same for student and fake score but for the learning rate."""

    lr: PositiveFloat = 1e-5
    """Learning rate of the student."""
    critic_lr: PositiveFloat | None = None
    """Learning rate of the fake score; None: that of the student."""
    warmup_steps: NonNegativeInt = 500
    """Steps over which both learning rates rise linearly from 0."""
    decay_steps: PositiveInt | None = None
    """Steps, from the first, over which the student's learning rate falls to 0 along a half cosine: for a run whose
    length is known beforehand. None: it stays. The fake score's stays in any case: it has to follow to the end."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moments."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 10.0
    """Each network's gradient is clipped alone to this L2 norm."""


class BatchConfig(Model):
    """Samples of one step, over all processes: never per device."""

    dm: PositiveInt = 64
    """Samples of distribution matching, and of each step of the fake score."""
    regression: PositiveInt | None = None
    """Pairs of the regression; None: as many as dm."""

    @property
    def pairs(self) -> int:
        """Pairs of one step."""
        return self.dm if self.regression is None else self.regression


class TrainRuntime(Model):
    """How the work is carried out. Never part of the identity: change any of it between two runs of one output."""

    steps: PositiveInt = 10_000
    """Optimizer steps of the student, all runs of this output together."""
    micro_batch: PositiveInt | None = None
    """Samples of distribution matching (without it: pairs) in one network call on one device; None: all of a process.
    More are accumulated: batch.dm must be a multiple of micro_batch times the number of processes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the networks of teacher, student and fake score."""
    workers: NonNegativeInt = 2
    """Processes that read data for each training process; 0 reads in the training process itself."""
    prefetch: PositiveInt = 4
    """Micro-batches that each of them reads ahead."""
    cache_dir: str | None = None
    """Node-local folder for shards of remote datasets; None is a folder in the system's temporary folder."""
    cache_gb: PositiveFloat = 50.0
    """Its largest size, in GB; shards used longest ago go first."""
    text_cache: NonNegativeInt = 0
    """Prompts whose encodings are kept in memory: for datasets with few different prompts. Each takes some 0.2 MB."""
    max_nonfinite_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The run stops when a larger share of the samples, or of one network's updates, gave no finite gradient, between
    two log lines or, where these are closer, over 20 steps. Such a sample teaches nothing; if it spoils the gradient of
    a whole step, none of the step's samples does."""
    log_every: PositiveInt = 50
    """Steps between two lines of metrics."""
    grid_every: PositiveInt = 1000
    """Steps between two sample grids."""
    grid_samples: Annotated[int, Field(ge=1, le=64)] = 8
    """Noises and prompts of a grid."""
    grid_teacher_steps: PositiveInt = 50
    """Steps of the teacher in the grid, when there are no pairs to take its output from."""
    checkpoint_every: PositiveInt = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Latest checkpoints that are kept: at least two, since one may be damaged."""
    milestone_every: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for ever."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.Suppress] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: a list of tensorboard and wandb. YAML only."""


class TrainConfig(Model):
    """Distil a teacher into a one-step student by Distribution Matching Distillation. Run again, it resumes."""

    output: str
    """Run directory, a local path."""
    teacher: TeacherConfig
    """Whom to distil. Its dtype is that of its frozen weights: float32, or, with precision bfloat16, bfloat16."""
    data: DataConfig = DataConfig()
    """Where pairs and prompts come from."""
    student: StudentConfig = StudentConfig()
    """What the student is."""
    init_from: str | None = None
    """Begin with the student, fake score and average of another run of the same teacher: its directory, or one of its
    checkpoints. Optimizers, warm-up and steps are this run's own. None: begin as the teacher."""
    loss: LossConfig = LossConfig()
    """What it learns from."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it learns."""
    batch: BatchConfig = BatchConfig()
    """Samples of one step, over all processes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of all randomness: order of the data, noise, timesteps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network calls (autocast); weights, optimizers, conversions and losses are float32."""
    runtime: TrainRuntime = TrainRuntime()
    """How it is computed."""

    @field_validator("output")
    @classmethod
    def _is_local(cls, output: str) -> str:
        if not output or "://" in output:
            raise ValueError(f"{output!r} is no local path; name a directory on a disk that all processes see")
        return output

    @model_validator(mode="after")
    def _has_data(self) -> "TrainConfig":
        if self.loss.regression_weight > 0 and not self.data.sources:
            raise ValueError("data.pairs: missing; give the dataset, or set loss.regression_weight 0 to do without")
        if not self.data.sources and self.data.prompts is None:
            raise ValueError("data.prompts: missing; without pairs a prompt table is needed")
        if self.teacher.kind != "mixture" and self.teacher.dtype not in ("float32", self.precision):
            raise ValueError(
                f"teacher.dtype: {self.teacher.dtype} under precision {self.precision} would round the real score and "
                "not the fake one; give float32" + (" or bfloat16" if self.precision == "bfloat16" else "")
            )
        if self.teacher.kind == "edm" and self.loss.guidance_scale != 1:
            raise ValueError("loss.guidance_scale: EDM networks know no empty condition to be guided from; set 1")
        if self.teacher.kind == "edm" and self.loss.negative_prompt:
            raise ValueError("loss.negative_prompt: EDM networks are not guided; leave it out")
        if self.loss.dm_on_pairs and self.loss.regression_weight == 0:
            raise ValueError("loss.dm_on_pairs: needs pairs, and with loss.regression_weight 0 none are read")
        return self


# --------------------------------------------------------------------------------------------------- identity


class DataIdentity(Model):
    """The content of one pair dataset as a run uses it."""

    fingerprint: str
    """Fingerprint of the dataset's spec."""
    content_sha256: str
    """Over the sha256 of the shards in use, in order."""
    selection_digest: str | None
    """Over the selected keys; None: all samples."""
    weight: float
    """Share of the samples, relative to the other datasets."""


class TrainSpec(Model):
    """The identity of a training run: equal specs on one machine give the same weights, to the bit on a CPU."""

    teacher: TeacherIdentity
    """The teacher by content."""
    data: tuple[DataIdentity, ...]
    """The pairs by content; empty without regression."""
    prompts_digest: str | None
    """The prompt table of distribution matching by content; None without distribution matching."""
    holdout: int
    """Pairs of each dataset kept out of training."""
    shuffle_window: int
    """Shards shuffled together."""
    student: StudentConfig
    """The student."""
    init_digest: str | None = None
    """The weights that it began with by content; None: the teacher's."""
    loss: LossConfig
    """The losses."""
    optimizer: OptimizerConfig
    """The optimizers."""
    batch: BatchConfig
    """Samples of one step."""
    seed: int
    """Root of all randomness."""
    precision: str
    """Precision of the network calls."""
