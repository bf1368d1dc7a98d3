"""Networks of a few weights with optimizers that have something to remember, and a run they could belong to."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from configs.schema import TeacherIdentity
from configs.train_schema import TrainConfig, TrainSpec
from configs.yaml_file import to_yaml
from trainer.checkpoints.checkpoints import TrainerState

IDENTITY = TeacherIdentity(
    kind="mixture",
    weights_digest="0" * 64,
    dtype="float32",
    parametrization="x0",
    schedule="edm",
    latent_scale=None,
    sample_shape=(3, 8, 8),
    image_shape=(3, 8, 8),
)


def train_config(output: str, **sections: object) -> TrainConfig:
    """A run on the toy teacher; ``sections`` replace those of the configuration."""
    tree = {"output": output, "teacher": {"kind": "mixture"}, "data": {"pairs": "/pairs"}, "loss": {"regression": "l2"}}
    return TrainConfig.model_validate({**tree, **sections})


def train_spec(config: TrainConfig) -> TrainSpec:
    """The identity of that run."""
    data = [
        {"fingerprint": "f" * 64, "content_sha256": "c" * 64, "selection_digest": None, "weight": source.weight}
        for source in config.data.sources
    ]
    same = {name: getattr(config, name) for name in ("student", "loss", "optimizer", "batch", "seed", "precision")}
    about_data = {"holdout": config.data.holdout, "shuffle_window": config.data.shuffle_window}
    return TrainSpec.model_validate({"teacher": IDENTITY, "data": data, "prompts_digest": None, **same, **about_data})


def trainer_state(step: int, config: TrainConfig | None = None) -> TrainerState:
    """Where that run is after ``step`` steps."""
    return TrainerState(
        spec=train_spec(config or train_config("/run")),
        num_pairs=1000,
        world=2,
        code_revision="abc",
        versions={"torch": torch.__version__},
        step=step,
        num_images=128 * step,
        nonfinite_samples=3,
        seconds=0.1 * step,
    )


class SmallNetwork(nn.Module):
    """Has parameters of several shapes, one without a gradient, a buffer, and a submodule."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.randn((), generator=generator))
        self.unused = nn.Parameter(torch.randn(2, generator=generator))
        self.register_buffer("shift", torch.randn(3, generator=generator))
        self.inner = nn.Linear(3, 3)
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() * self.scale + self.shift


def adamw(network: nn.Module, **settings: bool) -> AdamW:
    """An optimizer of all its parameters."""
    return AdamW(network.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, **settings)


def train(network: nn.Module, optimizer: AdamW, steps: range) -> None:
    """Steps that depend on their number and on nothing else."""
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (network(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


class SmallRun:
    """Two trained networks as a checkpoint takes them."""

    def __init__(self, seed: int) -> None:
        self.networks = {"student": SmallNetwork(seed), "fake_score": SmallNetwork(seed + 1)}
        self.optimizers = {name: (adamw(network), network) for name, network in self.networks.items()}
        self.config_yaml = to_yaml(train_config("/run").model_dump(mode="json"))

    def train(self, steps: range) -> None:
        """Train both."""
        for optimizer, network in self.optimizers.values():
            train(network, optimizer, steps)

    def tensors(self) -> list[Tensor]:
        """All weights and moments, copies."""
        weights = [tensor for network in self.networks.values() for tensor in network.state_dict().values()]
        moments = [
            tensor
            for optimizer, network in self.optimizers.values()
            for parameter in network.parameters()
            for tensor in optimizer.state[parameter].values()
        ]
        return [tensor.clone() for tensor in weights + moments]
