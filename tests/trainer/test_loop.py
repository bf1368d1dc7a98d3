"""A whole step, and a whole run: what may learn, what must not, and what is called how often."""

import copy
import json

import pytest
import torch
from support.training import metrics, tensors, train_config

from configs.errors import RunStopped, UserError
from pipeline import teachers
from trainer import loop
from trainer.build import build
from trainer.loop import critic_turn, fresh_samples, student_turn, train
from trainer.preemption import StopSignal
from trainer.tracking import nonfinite


@pytest.fixture
def run(trained_on, tmp_path):
    """A run that is open, and has not learnt anything yet."""
    with build(train_config(trained_on, tmp_path / "run")) as run:
        yield run


def opened(folder, output, **sections):
    return build(train_config(folder, output, **sections))


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_at_the_start_without_guidance_distribution_matching_has_nothing_to_say(trained_on, tmp_path, precision):
    # Student, fake score and teacher are one network: the scores agree to the last bit, and so the gradient is zero.
    loss, data = {"guidance_scale": 1.0, "regression_weight": 0.0}, {"allow_differences": ["guidance_scale"]}
    with opened(trained_on, tmp_path / "run", loss=loss, data=data, precision=precision) as run:
        before = state(run.student.network)
        student_turn(run)
        values = run.metrics.take(run.accelerator)
        assert values["loss/dm"] == 0.0
        assert values["dm/rms_gradient"] == 0.0
        assert values["grad_norm/student"] == 0.0
        decayed = 1 - run.student.learning_rate(0) * run.config.optimizer.weight_decay
        after = run.student.network.state_dict()
        assert all(torch.allclose(after[name], before[name] * decayed, rtol=1e-6, atol=0) for name in before)


def test_each_turn_moves_its_own_network_only(run):
    networks = {"student": run.student.network, "critic": run.fake_score.network, "ema": run.ema.module}
    before = {name: state(network) for name, network in networks.items()}
    samples = student_turn(run)
    moved = {name for name, network in networks.items() if not equal(before[name], network.state_dict())}
    assert moved == {"student"}
    assert all(parameter.grad is None for network in networks.values() for parameter in network.parameters())

    before = {name: state(network) for name, network in networks.items()}
    critic_turn(run, 0, samples)
    moved = {name for name, network in networks.items() if not equal(before[name], network.state_dict())}
    assert moved == {"critic"}
    assert all(parameter.grad is None for network in networks.values() for parameter in network.parameters())


def test_the_fake_score_gets_no_gradient_from_the_students_loss(run, monkeypatch):
    # Before any optimizer clears it: gradients as backward leaves them.
    monkeypatch.setattr(run, "update", lambda trainable, name: None)
    samples = student_turn(run)
    assert all(parameter.grad is not None for parameter in run.student.network.parameters())
    assert all(parameter.grad is None for parameter in run.fake_score.network.parameters())
    run.student.optimizer.zero_grad()
    critic_turn(run, 0, samples)
    assert all(parameter.grad is None for parameter in run.student.network.parameters())
    assert all(parameter.grad is not None for parameter in run.fake_score.network.parameters())


def test_the_teacher_never_learns_never_trains_and_is_in_no_checkpoint(trained_on, tmp_path):
    config = train_config(trained_on, tmp_path / "run")
    with build(config) as run:
        modules = [run.teacher._unet, run.teacher._vae, run.teacher._text_encoder]
        before = [state(module) for module in modules]
        for _ in range(2):
            loop.step(run)
        run.save()
        assert all(equal(a, module.state_dict()) for a, module in zip(before, modules, strict=True))
        assert not any(part.training for module in modules for part in module.modules())
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
        # What accelerate holds is what it wraps and keeps in step: two networks, and nothing else.
        assert run.accelerator._models == [run.student.prepared, run.fake_score.prepared]
        count = len(run.student.network.state_dict())
    names = {name.partition("/")[0] for name in tensors(tmp_path / "run", 2)}
    assert names == {"student", "student_ema", "fake_score", "student_optimizer", "fake_score_optimizer"}
    weights = [name for name in tensors(tmp_path / "run", 2) if "optimizer" not in name]
    assert len(weights) == 3 * count


@pytest.mark.parametrize(
    ("loss", "student", "fake", "real"),
    [
        # per micro-batch: (samples in each call) of the student, the fake score, the teacher
        ({}, [6], [4, 4], [8]),  # one student call for both streams; the teacher's is doubled by guidance
        ({"guidance_scale": 1.0, "regression_weight": 0.0}, [4], [4, 4], [4]),
        ({"dm_on_pairs": True}, [6], [6, 6], [12]),
        ({"critic_steps_per_generator_step": 3}, [6, 4, 4], [4, 4, 4, 4], [8]),
        ({"dm_weight": 0.0}, [4], [], []),  # the four pairs are one micro-batch
    ],
)
def test_no_network_is_called_more_often_than_it_must(trained_on, tmp_path, loss, student, fake, real):
    calls = {"student": [], "fake": [], "real": []}

    def counting(name):
        return lambda module, arguments, keywords: calls[name].append(len(arguments[0]))

    data = {"allow_differences": ["guidance_scale"]}
    with opened(trained_on, tmp_path / "run", loss=loss, data=data) as run:
        run.student.network.register_forward_pre_hook(counting("student"), with_kwargs=True)
        run.teacher._unet.register_forward_pre_hook(counting("real"), with_kwargs=True)
        if run.fake_score is not None:
            run.fake_score.network.register_forward_pre_hook(counting("fake"), with_kwargs=True)
        loop.step(run)
        both = {
            name: sorted(sizes * run.accumulation)
            for name, sizes in (("student", student), ("fake", fake), ("real", real))
        }
    assert {name: sorted(sizes) for name, sizes in calls.items()} == both


def test_the_fake_score_learns_from_the_samples_that_the_student_was_judged_by(run, monkeypatch):
    judged, learnt = [], []
    generator_loss, critic_loss = run.matching.generator_loss, run.matching.critic_loss
    monkeypatch.setattr(
        run.matching,
        "generator_loss",
        lambda x0, c, g: (judged.append(x0.detach().clone()), generator_loss(x0, c, g))[1],
    )
    monkeypatch.setattr(
        run.matching, "critic_loss", lambda x0, c, g: (learnt.append(x0.detach().clone()), critic_loss(x0, c, g))[1]
    )
    loop.step(run)
    assert len(judged) == run.accumulation
    assert all(torch.equal(a, b) for a, b in zip(judged, learnt, strict=True))


def test_further_critic_turns_see_fresh_noise_and_prompts(trained_on, tmp_path):
    with opened(trained_on, tmp_path / "run", loss={"critic_steps_per_generator_step": 3}) as run:
        samples = student_turn(run)
        turns = [samples, fresh_samples(run, 1), fresh_samples(run, 2)]
        seen = [tuple(x0.flatten().tolist()) for turn in turns for x0, _ in turn]
        assert len(set(seen)) == 3 * run.accumulation
        assert not any(x0.requires_grad for turn in turns for x0, _ in turn)


def test_the_score_difference_is_float32_under_bfloat16(trained_on, tmp_path, monkeypatch):
    seen = []
    with opened(trained_on, tmp_path / "run", precision="bfloat16") as run:
        original = run.matching.generator_loss

        def spy(*arguments):
            loss, comparison = original(*arguments)
            seen.append((loss.dtype, comparison.x0_real.dtype, comparison.x0_fake.dtype, comparison.gradient.dtype))
            # Rounded to bfloat16 anywhere after the network call, these would be multiples of 2^-8 of themselves.
            assert not torch.equal(comparison.x0_real, comparison.x0_real.bfloat16().float())
            return loss, comparison

        monkeypatch.setattr(run.matching, "generator_loss", spy)
        inside = []
        run.student.network.conv_in.register_forward_hook(lambda module, x, out: inside.append(out.dtype))
        run.fake_score.network.conv_in.register_forward_hook(lambda module, x, out: inside.append(out.dtype))
        run.teacher._unet.conv_in.register_forward_hook(lambda module, x, out: inside.append(out.dtype))
        loop.step(run)
    assert set(inside) == {torch.bfloat16}
    assert all(dtype == torch.float32 for dtypes in seen for dtype in dtypes)


def test_regression_alone_loads_no_fake_score(trained_on, tmp_path, monkeypatch):
    loaded = []
    load_network = teachers.load_network
    monkeypatch.setattr(teachers, "load_network", lambda config: loaded.append(config) or load_network(config))
    train(train_config(trained_on, tmp_path / "run", loss={"dm_weight": 0.0}))
    assert len(loaded) == 1
    assert not [name for name in tensors(tmp_path / "run", 4) if name.startswith("fake_score")]
    assert metrics(tmp_path / "run")[-1]["critic_steps"] == 0


def test_distribution_matching_alone_needs_no_pairs(trained_on, tmp_path):
    data = {"pairs": None, "prompts": str(trained_on / "pairs" / "prompts.parquet")}
    train(train_config(trained_on, tmp_path / "run", data=data, loss={"regression_weight": 0.0}))
    last = metrics(tmp_path / "run")[-1]
    assert last["images"] == 4 * 8
    assert "loss/regression" not in last
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["spec"]["data"] == []


def test_the_regression_compares_what_the_student_makes_of_a_pairs_noise_with_its_picture(run, monkeypatch):
    pairs = [run.data.read(run.batches._positions.at(number)).pairs for number in range(run.accumulation)]
    with torch.no_grad():
        expected = [run.generator(pair.noise.float(), run.conditions(pair.prompts)) for pair in pairs]
    seen, regression = [], run.regression
    monkeypatch.setattr(
        run, "regression", lambda x0, target: (seen.append((x0.detach(), target)), regression(x0, target))[1]
    )
    student_turn(run)
    for (x0, target), wanted, pair in zip(seen, expected, pairs, strict=True):
        # Weights are the same in all micro-batches of a turn; the company in the batch changes rounding only.
        torch.testing.assert_close(x0, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(target, pair.target)


def gradient(folder, output, monkeypatch, **loss):
    """The student's gradient in the first step, as backward leaves it."""
    with opened(folder, output, loss=loss) as run:
        monkeypatch.setattr(run, "update", lambda trainable, name: None)
        student_turn(run)
        return {name: parameter.grad.clone() for name, parameter in run.student.network.named_parameters()}


def test_the_students_gradient_is_the_weighted_sum_of_both(trained_on, tmp_path, monkeypatch):
    weights = {"both": (2.0, 0.5), "matching": (1.0, 1e-30), "regression": (1e-30, 1.0)}
    both, matching, regression = (
        gradient(trained_on, tmp_path / name, monkeypatch, dm_weight=dm, regression_weight=pairs)
        for name, (dm, pairs) in weights.items()
    )
    for name in both:
        torch.testing.assert_close(both[name], 2 * matching[name] + 0.5 * regression[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("critic_lr", "expected"), [(None, 1e-3), (5e-3, 5e-3)])
def test_the_fake_score_may_have_a_learning_rate_of_its_own_which_does_not_fall(
    trained_on, tmp_path, critic_lr, expected
):
    with opened(trained_on, tmp_path / "run", optimizer={"critic_lr": critic_lr, "decay_steps": 200}) as run:
        rates = run.student.learning_rate(100), run.fake_score.learning_rate(100)
        assert rates == (pytest.approx(5e-4), expected)


def test_the_average_follows_the_student(run):
    expected = state(run.student.network)
    for _ in range(3):
        loop.step(run)
        for name, tensor in run.student.network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * tensor
    for name, tensor in run.ema.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_regression_pulls_the_student_to_held_out_pairs(trained_on, tmp_path):
    # The teacher's own sampler is a smooth map of the noise: what is learnt on some pairs must carry over to others.
    config = train_config(
        trained_on,
        tmp_path / "run",
        loss={"dm_weight": 0.0},
        optimizer={"lr": 1e-3, "warmup_steps": 0},
        batch={"regression": 16},
        runtime={"steps": 60, "micro_batch": None, "log_every": 10},
    )
    train(config)
    distances = [line["holdout/distance"] for line in metrics(tmp_path / "run")]
    assert distances[-1] < 0.8 * distances[0]


# -------------------------------------------------------------------------------------------------- what goes wrong


def poisoned(run, every):
    """Have the teacher answer with NaN for the first sample of every so many calls."""
    real_score, count = run.matching.real_score, [0]

    def answer(x_t, t, condition):
        x0 = real_score(x_t, t, condition)
        count[0] += 1
        if count[0] % every == 0:
            x0[0] = torch.nan
        return x0

    run.matching.real_score = answer
    return run


def test_a_sample_that_is_not_finite_is_counted_and_teaches_nothing(trained_on, tmp_path):
    runtime = {"max_nonfinite_fraction": 0.5}
    with opened(trained_on, tmp_path / "run", runtime=runtime) as run:
        poisoned(run, every=1)
        for _ in range(2):
            loop.step(run)
        run.log()
        assert run.state.nonfinite_samples == 4  # one of each of the two micro-batches of two steps
        assert all(tensor.isfinite().all() for tensor in run.student.network.state_dict().values())
    assert metrics(tmp_path / "run")[-1]["nonfinite_samples"] == 4


def test_too_many_of_them_stop_the_run(trained_on, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "JUDGED_STEPS", 2)
    with opened(trained_on, tmp_path / "run") as run:
        poisoned(run, every=1)
        for is_enough in (False, True):  # whatever the distance of log lines
            loop.step(run)
            run.log()
            if not is_enough:
                run.judge()
        with pytest.raises(RunStopped, match=r"step 2: 16\.7% of the samples of the last 2 steps .*max_nonfinite_frac"):
            run.judge()


def test_a_step_whose_gradient_is_not_finite_leaves_the_weights(trained_on, tmp_path):
    with opened(trained_on, tmp_path / "run", runtime={"max_nonfinite_fraction": 1.0}) as run:
        loop.step(run)
        before, moments = state(run.student.network), copy.deepcopy(run.student.optimizer.state_dict()["state"])
        regression = run.regression
        run.regression = lambda x0, target: regression(x0, target) * torch.inf
        student_turn(run)
        assert equal(before, run.student.network.state_dict())
        after = run.student.optimizer.state_dict()["state"]
        assert all(torch.equal(moments[i][name], after[i][name]) for i in moments for name in moments[i])
        assert run.metrics.take(run.accelerator)["skipped_updates/student"] == 0.5


def test_a_directory_of_another_run_is_refused_before_anything_is_loaded(trained_on, tmp_path, monkeypatch):
    train(train_config(trained_on, tmp_path / "run", runtime={"steps": 1}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(teachers, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"loss\.dm_weight"):
        train(train_config(trained_on, tmp_path / "run", loss={"dm_weight": 0.5}))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_pairs_of_another_guidance_are_refused_before_anything_is_loaded(trained_on, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="guidance_scale"):
        train(train_config(trained_on, tmp_path / "run", loss={"guidance_scale": 8.0}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("timestep", [1000, 3.5])
def test_a_timestep_that_the_teacher_does_not_have_is_refused(trained_on, tmp_path, timestep):
    with pytest.raises(UserError, match=r"student\.timestep"):
        train(train_config(trained_on, tmp_path / "run", student={"timestep": timestep}))


def test_a_mistake_that_shows_late_leaves_the_directory_as_it_was(trained_on, tmp_path):
    with pytest.raises(UserError, match=r"student\.timestep"):
        train(train_config(trained_on, tmp_path / "run", student={"timestep": 5000}))
    train(train_config(trained_on, tmp_path / "run", student={"timestep": 399}, runtime={"steps": 1}))


def test_a_network_that_never_learns_stops_the_run(trained_on, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "JUDGED_STEPS", 1)
    with opened(trained_on, tmp_path / "run", loss={"critic_steps_per_generator_step": 20}) as run:
        regression = run.regression
        run.regression = lambda x0, target: regression(x0, target) * torch.inf
        loop.step(run)
        run.log()
        with pytest.raises(RunStopped, match=r"100\.0% of the updates of the student"):
            run.judge()


@pytest.mark.parametrize("is_asked_to_stop", [False, True])
def test_a_run_that_is_asked_to_stop_saves_before_it_judges_and_no_other_does(
    trained_on, tmp_path, monkeypatch, is_asked_to_stop
):
    monkeypatch.setattr(nonfinite, "JUDGED_STEPS", 1)
    monkeypatch.setattr(loop, "build", lambda config: poisoned(build(config), every=1))
    monkeypatch.setattr(StopSignal, "should_stop", lambda *_: is_asked_to_stop)
    with pytest.raises(RunStopped, match=r"^step 1: "):
        train(train_config(trained_on, tmp_path / "run", runtime={"log_every": 1, "checkpoint_every": 1}))
    assert (tmp_path / "run" / "checkpoints" / "step_0000001").exists() == is_asked_to_stop


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float32")]
)
def test_a_teacher_that_rounds_otherwise_than_its_fake_score_is_refused(trained_on, tmp_path, dtype, precision):
    teacher = {"kind": "stable_diffusion", "path": str(trained_on / "teacher"), "dtype": dtype}
    with pytest.raises(ValueError, match=r"teacher\.dtype"):
        train_config(trained_on, tmp_path / "run", teacher=teacher, precision=precision)


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_size_of_a_micro_batch_changes_rounding_only(trained_on, tmp_path, micro_batch):
    lines = []
    for size in (1, micro_batch):
        runtime = {"steps": 1, "log_every": 1, "micro_batch": size}
        output = tmp_path / f"micro-batch-{size}"
        train(train_config(trained_on, output, batch={"regression": 8}, runtime=runtime))
        timed = ("time", "seconds_per_step", "images_per_second", "data_wait_share")
        lines.append({name: value for name, value in metrics(output)[0].items() if name not in timed})
    assert lines[0] == pytest.approx(lines[1], rel=1e-3, abs=1e-5)
