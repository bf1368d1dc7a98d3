"""What a user writes is what a script gets, and every mistake is named once, in words, with its place."""

import subprocess
import sys

import pytest
from pydantic import model_validator

from configs.errors import UserError, exit_codes
from configs.load import parse
from configs.schema import (
    GeneratePairsConfig,
    Model,
    PairsRuntime,
    PreparePromptsConfig,
    StatusConfig,
    VerifyShardsConfig,
)

MINIMAL = """
output: /data
teacher: {kind: mixture}
prompts: {path: prompts.txt}
spec:
  sampler: {name: edm_heun, steps: 64}
"""

TAGS = """
teacher: {kind: stable_diffusion}
spec:
  sampler: {name: edm_heun}
"""
"""What no flag can say."""

EVERYTHING = """
output: s3://bucket/a prefix
teacher: {kind: stable_diffusion, path: hub/id, revision: '0123', variant: fp16, dtype: bfloat16}
prompts: {path: p.csv, column: text, min_chars: 2, max_chars: 3, blocklist: words.txt, limit: 4, keep_duplicates: true}
spec:
  sampler: {name: edm_heun, steps: 5, sigma_min: 0.003, sigma_max: 70.0, rho: 6.0, s_churn: 1.0, s_min: 0.1,
            s_max: 50.0, s_noise: 1.003}
  guidance_scale: 7.5
  negative_prompt: 'blurry, -None'
  seed: 9223372036854775807
  pairs_per_prompt: 6
  num_samples: 7
  fields: {noise: false, x0: pixels, x0_dtype: float32, image: webp, prompt: false, text_embedding: true}
layout: {samples_per_shard: 8}
runtime: {executor: in-process, batch_size: 9, actors: 10, cpus_per_actor: 0.5, gpus_per_actor: 1.0e-3,
          wait_for_resources_s: 11.0, compile: true, channels_last: true, max_errors_per_shard: 12,
          max_crashes_per_shard: 13, max_rejected_fraction: 0.5, temp_dir: /scratch, lease_period_s: 14.0,
          progress_period_s: 15.0}
plan: true
"""
"""Every key that has a flag, with another value than its default."""


def mistakes(model, *argv: str) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(model, argv=argv)
    return str(error.value).splitlines()


# ------------------------------------------------------------------------------------------------------- values


def test_a_file_alone(write):
    config = parse(GeneratePairsConfig, argv=["--config", write(MINIMAL)])
    assert config.output == "/data"
    assert config.spec.sampler.steps == 64
    assert config.spec.sampler.sigma_max == 80.0
    assert config.runtime == PairsRuntime()


def test_the_command_line_alone():
    config = parse(PreparePromptsConfig, argv=["--output", "/t.parquet", "--prompts.path", "a.csv"])
    assert (config.output, config.prompts.path, config.prompts.column) == ("/t.parquet", "a.csv", "prompt")


def test_flags_win_over_the_file(write):
    argv = ["--config", write(MINIMAL), "--output", "/other", "--spec.guidance_scale", "3", "--spec.sampler.steps=20"]
    config = parse(GeneratePairsConfig, argv=argv)
    assert config.output == "/other"
    assert config.spec.guidance_scale == 3.0
    assert (config.spec.sampler.name, config.spec.sampler.steps) == ("edm_heun", 20)


def test_every_plain_value_has_a_flag(write):
    def flags(model, prefix=""):
        for name, value in model:
            if isinstance(value, Model):
                yield from flags(value, f"{prefix}{name}.")
            elif f"{prefix}{name}" not in ("teacher.kind", "spec.sampler.name"):
                assert value != type(model).model_fields[name].default
                if isinstance(value, bool):
                    yield f"--{prefix}{'' if value else 'no_'}{name}"
                else:
                    yield from (f"--{prefix}{name}", str(value))

    expected = parse(GeneratePairsConfig, argv=["--config", write(EVERYTHING)])
    assert parse(GeneratePairsConfig, argv=["--config", write(TAGS, "tags.yaml"), *flags(expected)]) == expected


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("--plan", "plan", True),
        ("--no-plan", "plan", False),
        ("--no_plan", "plan", False),
        ("--runtime.compile", "runtime.compile", True),
        ("--runtime.executor in-process", "runtime.executor", "in-process"),
        ("--runtime.batch-size 3", "runtime.batch_size", 3),
        ("--runtime.actors None", "runtime.actors", None),
        ("--runtime.lease_period_s 1e-1", "runtime.lease_period_s", 0.1),
        ("--spec.negative_prompt=-x", "spec.negative_prompt", "-x"),
        ("--spec.fields.no_noise", "spec.fields.noise", False),
    ],
)
def test_spellings_of_flags(write, argv, key, value):
    config = parse(GeneratePairsConfig, argv=["--config", write(MINIMAL), *argv.split()])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize("argv", [["/data", "--deep", "64"], ["--deep", "64", "/data"], ["--deep=64", "--", "/data"]])
def test_the_root_is_positional(argv):
    config = parse(VerifyShardsConfig, argv=argv)
    assert (config.root, config.deep) == ("/data", 64)


def test_numbers_may_be_written_as_people_write_them(write):
    config = parse(
        GeneratePairsConfig,
        argv=["--config", write(f"{MINIMAL}\n  guidance_scale: 1e1\n  num_samples: 2e3\n  negative_prompt: '1e3'")],
    )
    assert (config.spec.guidance_scale, config.spec.num_samples, config.spec.negative_prompt) == (10.0, 2000, "1e3")


def test_a_child_file_overrides_its_parent(write):
    write(MINIMAL, "base.yaml")
    child = write("extends: base.yaml\nspec: {seed: 5, sampler: {rho: 6}}\nteacher: {std: 0.1}\n")
    config = parse(GeneratePairsConfig, argv=["--config", child])
    assert (config.spec.seed, config.teacher.std, config.output) == (5, 0.1, "/data")
    assert (config.spec.sampler.steps, config.spec.sampler.rho) == (64, 6.0)


def test_a_child_with_another_variant_inherits_none_of_its_keys(write):
    write(MINIMAL, "base.yaml")
    child = write("extends: base.yaml\nspec: {sampler: {name: ddim}}\n")
    assert parse(GeneratePairsConfig, argv=["--config", child]).spec.sampler.steps == 50


# ------------------------------------------------------------------------------------------------- print-config


@pytest.mark.parametrize(
    "text", [MINIMAL, EVERYTHING, MINIMAL.replace("edm_heun", "diffusers, options: {a: [1e-4, x]}")]
)
def test_the_printed_configuration_gives_the_same_model(write, capsys, text):
    config = parse(GeneratePairsConfig, argv=["--config", write(text)])
    with pytest.raises(SystemExit) as end:
        parse(GeneratePairsConfig, argv=["--print-config", "--config", "a.yaml"])
    assert end.value.code == 0
    printed = write(capsys.readouterr().out, "printed.yaml")
    assert parse(GeneratePairsConfig, argv=["--config", printed]) == config


def test_a_printed_positional_is_read_from_the_file(write, capsys):
    with pytest.raises(SystemExit):
        parse(StatusConfig, argv=["/data", "--print_config"])
    assert parse(StatusConfig, argv=["--config", write(capsys.readouterr().out)]) == StatusConfig(root="/data")


# ----------------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_of_a_file_is_named(write):
    text = """
outptu: /data
teacher: {kind: stable_difusion}
prompts: {path: 3, limt: 4, min_chars: -1}
spec:
  sampler: {name: edm_heun, sigma_min: 100, steps: 1.5}
  guidance_scale: high
  seed: .nan
  fields: {x0: none, image: none, noise: maybe}
layout: 7
runtime:
  executor: slurm
"""
    assert mistakes(GeneratePairsConfig, "--config", write(text)) == [
        "a.yaml: output: missing, give --output or set it here",
        "a.yaml: teacher.kind: must be one of 'mixture', 'stable_diffusion', 'edm', not 'stable_difusion'",
        "a.yaml: prompts.path: must be text (in quotes), not 3",
        "a.yaml: prompts.min_chars: must be greater than or equal to 0, not -1",
        "a.yaml: prompts.limt: unknown key, did you mean 'limit'?",
        "a.yaml: spec.sampler.steps: must be a whole number, not 1.5",
        "a.yaml: spec.guidance_scale: must be a number, not 'high'",
        "a.yaml: spec.seed: must be a finite number, not nan",
        "a.yaml: spec.fields.noise: must be true or false, not 'maybe'",
        "a.yaml: layout: must be a mapping of keys to values, not 7",
        "a.yaml: runtime.executor: must be 'ray' or 'in-process', not 'slurm'",
        "a.yaml: outptu: unknown key, did you mean 'output'?",
    ]


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ("runtime:\n", "runtime: must be a mapping of keys to values, not empty"),
        ("1: 2\n", "1: unknown key"),
        ("spec.seed: 3\n", "spec.seed: unknown key, did you mean 'spec'?"),
        (
            "layout: {samples-per-shard: 3}\n",
            "layout.samples-per-shard: unknown key, did you mean 'samples_per_shard'?",
        ),
        ("layout: {samples_per_shard: 0}\n", "layout.samples_per_shard: must be greater than or equal to 1, not 0"),
    ],
)
def test_a_mistake_in_an_otherwise_good_file(write, change, mistake):
    assert mistakes(GeneratePairsConfig, "--config", write(MINIMAL + change)) == [f"a.yaml: {mistake}"]


@pytest.mark.parametrize(
    ("sampler", "mistake"),
    [
        ("{name: edm_heun, sigma_min: 90}", ": sigma_min 90.0 must be below sigma_max 80.0"),
        ("{name: ddim, step: 3}", ".step: unknown key, did you mean 'steps'?"),
        ("{name: ddim, rho: 0}", ".rho: must be greater than 0, not 0"),
        ("{name: diffusers, options: {a: .inf}}", ".options: must be a finite number, not inf"),
        (
            "{name: diffusers, options: {a: 2026-01-01}}",
            ".options: input was not a valid JSON value, not datetime.date(2026, 1, 1)",
        ),
        ("{steps: 3}", ".name: missing, set it here: edm_heun (steps, "),
        ("{name: [ddim]}", ".name: must be one of 'edm_heun', 'ddim', 'diffusers', not \"['ddim']\""),
    ],
)
def test_the_variant_is_no_part_of_a_key(write, sampler, mistake):
    text = MINIMAL.replace("{name: edm_heun, steps: 64}", sampler)
    (line,) = mistakes(GeneratePairsConfig, "--config", write(text))
    assert line.startswith(f"a.yaml: spec.sampler{mistake}")


def test_a_mistake_is_put_where_it_was_written(write):
    write(MINIMAL + "  seed: -1\n", "base.yaml")
    child = write("extends: base.yaml\nspec: {guidance_scale: -2}\n")
    assert mistakes(GeneratePairsConfig, "--config", child, "--runtime.actors", "0", "--spec.num_samples", "1e3") == [
        "a.yaml: spec.guidance_scale: must be greater than or equal to 0, not -2",
        "base.yaml: spec.seed: must be greater than or equal to 0, not -1",
        "--spec.num_samples: must be a whole number, not '1e3'",
        "--runtime.actors: must be greater than 0, not '0'",
    ]


def test_a_flag_mends_a_mistake_of_the_file(write):
    config = parse(GeneratePairsConfig, argv=["--config", write(MINIMAL + "  seed: -1\n"), "--spec.seed", "1"])
    assert config.spec.seed == 1


def test_what_is_required_is_named_as_flag_and_as_key():
    lines = mistakes(GeneratePairsConfig)
    assert [line.split(": ")[0] for line in lines] == ["output", "teacher.kind", "prompts.path", "spec.sampler.name"]
    assert lines[0] == "output: missing, give --output or set it in a file (--config)"
    assert lines[1] == (
        "teacher.kind: missing, set it in a file (--config): "
        "mixture (image_size, std) or stable_diffusion (path, revision, variant, dtype) or edm (path, dtype)"
    )
    assert mistakes(StatusConfig) == ["root: missing, give ROOT or set it in a file (--config)"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--outptu /x", "--outptu: unknown flag, did you mean '--output'?"),
        ("--guidance-scale 3", "--guidance-scale: unknown flag, did you mean '--spec.guidance_scale'?"),
        ("--xyzzy=3", "--xyzzy: unknown flag"),
        ("--confg b.yaml", "--confg: unknown flag, did you mean '--config'?"),
        ("stray", "unexpected argument 'stray'"),
        ("--plan true", "unexpected argument 'true'"),
        ("--spec.seed", "Missing value for argument '--spec.seed'. Expected 1 values."),
        ("--spec.seed --plan", "Missing value for argument '--spec.seed'. Expected 1 values."),
        ("--spec.seed x", "--spec.seed: must be a whole number, not 'x'"),
        ("--spec.sampler.sigma_max 0.001", "spec.sampler: sigma_min 0.002 must be below sigma_max 0.001"),
        (
            "--runtime.executor slurm",
            "invalid choice 'slurm' for argument '--runtime.executor'. Expected one of ('ray', 'in-process').",
        ),
        (
            "--teacher.kind stable_diffusion",
            "--teacher.kind: can only be set in the file (--config): "
            "mixture (image_size, std) or stable_diffusion (path, revision, variant, dtype) or edm (path, dtype)",
        ),
        ("--teacher.path x", "--teacher.path: unknown flag"),
        ("--config gone.yaml", "--config: cannot read gone.yaml: No such file or directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(write, argv, line):
    (found,) = mistakes(GeneratePairsConfig, "--config", write(MINIMAL), *argv.split())
    assert found.startswith(line)


def test_what_belongs_in_the_file_is_refused_as_a_flag(write):
    text = MINIMAL.replace("edm_heun", "diffusers")
    (line,) = mistakes(GeneratePairsConfig, "--config", write(text), "--spec.sampler.options.a", "3")
    assert line.startswith("--spec.sampler.options.a: spec.sampler.options can only be set in the file (--config): ")
    line = mistakes(GeneratePairsConfig, "--teacher.path", "x")[0]
    assert line.startswith("--teacher.path: teacher.kind can only be set in the file (--config): ")


def test_a_mistake_of_the_whole_names_no_key(write):
    class Ordered(Model):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise ValueError("low is above high")
            return self

    assert mistakes(Ordered, "--config", write("low: 2\n")) == ["a.yaml: low is above high"]
    assert mistakes(Ordered, "--low", "2") == ["low is above high"]


def test_a_mistake_is_one_plain_line_on_a_colour_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = "invalid choice 'slurm' for argument '--runtime.executor'. Expected one of ('ray', 'in-process')."
    assert mistakes(GeneratePairsConfig, "--runtime.executor", "slurm") == [line]


def test_a_mistake_ends_the_process_with_code_2(capsys):
    with pytest.raises(SystemExit) as end, exit_codes():
        parse(StatusConfig, argv=[])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: root: missing, give ROOT or set it in a file (--config)\n"


# --------------------------------------------------------------------------------------------------------- help


def help_of(model, capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(model, argv=[*argv, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_names_every_flag_with_its_docstring_and_default(write, capsys):
    text = help_of(GeneratePairsConfig, capsys)
    assert "Sample a teacher and write noise/image/prompt pairs" in text
    assert "--spec.pairs_per_prompt INT Consecutive samples that share a prompt" in text
    assert "--runtime.actors {None}|INT Number of Ray actors" in text
    assert "(default: in-process)" not in text
    assert "--output STR Dataset root: an absolute path, s3://bucket/prefix, gs://... or az://... (required)" in text
    assert "teacher.kind: mixture (image_size, std) or stable_diffusion (path," in text


def test_help_with_a_file_shows_its_variant_and_its_values(write, capsys):
    text = help_of(GeneratePairsConfig, capsys, "--config", write(MINIMAL + "runtime: {executor: in-process}\n"))
    assert "--teacher.std FLOAT Standard deviation of every component" in text
    assert "--teacher.path" not in text
    assert "2 * steps - 1. (default: 64)" in text
    assert "(default: in-process)" in text


def test_help_shows_a_positional(capsys):
    assert "ROOT Dataset root. (required)" in help_of(StatusConfig, capsys)


def test_a_description_replaces_the_docstring(capsys):
    with pytest.raises(SystemExit):
        parse(StatusConfig, description="Another text.", argv=["--help"])
    out = capsys.readouterr().out
    assert "Another text." in out
    assert "Say how far" not in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom configs.load import parse\nfrom configs.schema import GeneratePairsConfig\n"
        "try: parse(GeneratePairsConfig, argv=['--help'])\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--spec.seed" in done.stdout
    assert not {"torch", "numpy", "ray", "diffusers", "transformers", "pyarrow"} & set(done.stderr.split())
