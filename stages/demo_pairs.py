"""The whole of pair generation in a minute: a Ray head of its own, a job, a verification. Needs no network.

    python stages/demo_pairs.py --output /abs/dir

Everything it starts is stopped again, also after Ctrl-C. Run again: nothing is computed twice.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the root

from configs.errors import RunStopped, exit_codes
from configs.load import parse
from configs.schema import DemoPairsConfig


def main() -> None:
    """Entry point."""
    config = parse(DemoPairsConfig, description=__doc__)
    from pipeline.installed_command import installed_command
    from pipeline.ray_head import ray_head

    output = str(Path(config.output).absolute())
    generate = ["stages/generate_pairs.py", "--config", "configs/toy/pairs.yaml", "--output", output]
    with ray_head(num_cpus=config.cpus) as head:
        submit = [installed_command("ray", extra="ray"), "job", "submit", "--address", head.jobs]
        _run([*submit, "--working-dir", ".", "--", "python", *generate])
    _run([sys.executable, "stages/verify_shards.py", output, "--deep", "16"])
    print(f"\nopen {output}/README.md and {output}/contact_sheet.png; remove it with rm -r {output}")


def _run(command: list[str]) -> None:
    print(f"$ {' '.join(command)}", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise RunStopped(f"{command[0]} failed; its message is above")


if __name__ == "__main__":
    with exit_codes():
        main()
