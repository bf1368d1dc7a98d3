"""What a user may write for the demo."""

from pathlib import Path

from pydantic import PositiveInt

from configs.schema import Model


class DemoConfig(Model):
    """The whole way in minutes: pairs, a student, an evaluation. The same command again computes nothing twice."""

    output: Path
    """Folder of everything: pairs, regression, run and evaluation. Remove it when done."""
    cpus: PositiveInt = 2
    """CPUs the Ray head offers, and threads of the training."""
    configs: Path = Path("configs/builtin")
    """Folder with pairs.yaml, train_regression.yaml, train.yaml and evaluate.yaml: another one for another teacher, or
    for a shorter way."""
