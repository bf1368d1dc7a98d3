"""What a user may write to encode real images into shards, and what identifies such a dataset.

As with pairs, what decides the bytes of a sample (:class:`ImagesSpec`: the images by content, how they are resized,
what is stored) is hashed whole; where the images lie and how it is computed (``source``, ``runtime``) is not.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from configs.schema import (
    FORMAT_VERSION,
    DatasetRuntime,
    Dtype,
    Model,
    PairsLayout,
    StableDiffusionTeacherConfig,
)

# ---------------------------------------------------------------------------------------------------- sources


class NamedFilesSource(Model):
    """Image files with names: what a folder and a zip archive have in common."""

    path: str
    """Where they lie: a path, s3://bucket/prefix, gs://... or az://... that every worker can read."""
    labels: Literal["none", "folders", "dataset.json"] = "none"
    """folders: the class of an image is its uppermost folder, numbered in order of their names. dataset.json: as EDM's
    and StyleGAN's dataset tools write them, a file of that name with {"labels": [[name, class], ...]}."""
    captions: str | None = None
    """Prompts of the images: a .csv, .jsonl or .parquet file with a column file_name. It names every image once."""
    caption_column: str = "text"
    """Column of that file with the prompt."""


class FolderSource(NamedFilesSource):
    """A folder of images, with or without a sub-folder for each class."""

    kind: Literal["folder"] = "folder"
    """Discriminator."""


class ZipSource(NamedFilesSource):
    """A zip archive of images, as EDM's dataset tool writes them."""

    kind: Literal["zip"] = "zip"
    """Discriminator."""


class WebDatasetSource(Model):
    """WebDataset tars. A sample's .cls is its class and its .txt its prompt, where they are there."""

    kind: Literal["webdataset"] = "webdataset"
    """Discriminator."""
    path: str
    """A .tar, or a folder of them, read in order of their names."""


class ParquetSource(Model):
    """Parquet tables with a column of encoded images, as Hugging Face datasets are stored."""

    kind: Literal["parquet"] = "parquet"
    """Discriminator."""
    path: str
    """A .parquet file, or a folder of them, read in order of their names."""
    image_column: str = "image"
    """Bytes of an image file, or a struct with an entry bytes."""
    label_column: str | None = None
    """Whole numbers from 0: the class of an image."""
    caption_column: str | None = None
    """Text: the prompt of an image."""


ImageSource = Annotated[
    FolderSource | ZipSource | WebDatasetSource | ParquetSource,
    Field(discriminator="kind"),
]

# ------------------------------------------------------------------------------------------- images: what is made

Resize = Literal["none", "scale", "center_crop", "center_crop_dhariwal"]
"""How an image is brought to its size (pipeline/images/transforms.py)."""


class ImageFields(Model):
    """Which members a sample has in its shard."""

    image: Literal["png", "webp", "jpg", "none"] = "png"
    """Store the picture: png and webp are lossless, jpg is quality 95 without chroma subsampling."""
    x0: Literal["latent", "none"] = "none"
    """Store the mean of the autoencoder's latents, in the space of the teacher's x0. Needs the teacher section."""
    x0_dtype: Literal["float16", "float32"] = "float16"
    """Stored precision of x0."""
    prompt: bool = True
    """Store the prompt as text. Off: it is still in the index."""

    @model_validator(mode="after")
    def _something(self) -> "ImageFields":
        if self.x0 == "none" and self.image == "none":
            raise ValueError("x0 and image are both none: store at least one")
        return self


class ImagesSettings(Model):
    """What a user decides about the content of a dataset of images: the ``spec`` section."""

    image_size: Annotated[int, Field(ge=8, le=4096)]
    """Height and width of the stored images, in pixels."""
    resize: Resize = "center_crop"
    """center_crop: the middle square, then Lanczos, as EDM's ImageNet is. center_crop_dhariwal: halved by boxes, then
    bicubic, then the middle square, as ADM's ImageNet is. scale: Lanczos, whatever the shape. none: an image of any
    other size is rejected."""
    fields: ImageFields = ImageFields()
    """Which members a sample has."""


class LatentSpace(Model):
    """What makes two autoencoders' latents the same, wherever their files lie."""

    weights_digest: str
    """sha256 over every tensor of the autoencoder and its config."""
    dtype: Dtype
    """Precision of its calls."""
    latent_scale: float
    """x0 = latent_scale * (mean of the encoder's distribution - shift)."""
    sample_shape: tuple[int, int, int]
    """Shape of x0 of one image, channels first."""


class ImagesSpec(ImagesSettings):
    """The identity of a dataset of images: the settings, and what is known once the source has been read.

    Equal specs give the same samples; the sha256 of this model is the dataset's fingerprint.
    """

    num_samples: PositiveInt
    """Images of the source, those that cannot be stored included."""
    sources_digest: str
    """sha256 over names, contents, classes and prompts of all images in order."""
    classes: tuple[str, ...]
    """Names of the classes, where the source has names; the class of an image is a number from 0."""
    latents: LatentSpace | None
    """The autoencoder by content; None if no latents are stored."""
    format_version: int = FORMAT_VERSION
    """Version of the shard format."""


# ------------------------------------------------------------------------------------------------ how it is computed


class EncodeRuntime(DatasetRuntime):
    """How images are encoded. Never part of the identity: change any of it between two runs of one output."""

    batch_size: PositiveInt = 16
    """Images that are decoded, and encoded by the autoencoder, together."""


class EncodeImagesConfig(Model):
    """Bring real images to one size and write them, or their latents, into WebDataset shards.

    The same command again resumes.
    """

    output: str
    """Dataset root: an absolute path, s3://bucket/prefix, gs://... or az://..."""
    source: ImageSource
    """The images."""
    spec: ImagesSettings
    """What becomes of one."""
    teacher: StableDiffusionTeacherConfig | None = None
    """The pipeline whose autoencoder makes latents; only with spec.fields.x0 latent."""
    layout: PairsLayout = PairsLayout()
    """How samples are cut into shards."""
    runtime: EncodeRuntime = EncodeRuntime()
    """How it is computed."""

    @model_validator(mode="after")
    def _teacher_for_latents(self) -> "EncodeImagesConfig":
        if (self.spec.fields.x0 == "latent") != (self.teacher is not None):
            raise ValueError(
                "teacher: missing, spec.fields.x0 latent needs its autoencoder"
                if self.teacher is None
                else "teacher: only latents need one; set spec.fields.x0 latent, or leave it out"
            )
        return self
