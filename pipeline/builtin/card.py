"""The card beside trained weights: what they are, of what data, under which licence, by which recipe, and how good."""

from pathlib import Path

from configs.builtin_schema import BuiltinConfig
from configs.yaml_file import to_yaml
from pipeline.provenance import code_revision, library_versions

_DATA = """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, github.com/zalandoresearch/fashion-mnist, MIT licence,
copyright 2017 Zalando SE), made text-to-image: 32x32 RGB, every garment tinted in one of ten colours on one of four
plain grounds, with captions such as "a photo of a teal ankle boot on a white background". Trained on its 60,000
training images; the numbers below are of its 10,000 test images."""


def write_card(
    folder: Path,
    title: str,
    about: str,
    script: str,
    config: BuiltinConfig,
    metrics: dict[str, float],
    *,
    size: int,
    data: str = _DATA,
) -> None:
    """Write ``README.md``.

    Args:
        folder: of the weights.
        title: heading.
        about: what it is and is for, a paragraph.
        script: the stage that makes it.
        config: what it was made with; its paths are left out.
        metrics: name -> value on the test split.
        size: number of parameters.
        data: what it was trained on, a paragraph.
    """
    recipe = to_yaml(config.model_dump(mode="json", exclude={"output", "data", "device", "save_every_steps"})).strip()
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    versions = ", ".join(f"{library} {version}" for library, version in library_versions().items())
    text = f"""# {title}

{about}

## Data

{data}

## Licence

Apache-2.0, as the code that made it.

## Numbers

| | |
|---|---|
| parameters | {size:,} |
{rows}

## Recipe

`python stages/{script}` with

```yaml
{recipe}
```

at revision {code_revision()}, with {versions}.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
