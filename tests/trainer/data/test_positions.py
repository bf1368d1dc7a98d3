"""Which samples a micro-batch takes depends on its place in the run, and not on the number of processes."""

from hypothesis import given
from hypothesis import strategies as st

from configs.train_schema import TrainConfig
from trainer.data.positions import MicroBatchPositions


def run(dm, pairs, micro=None, turns=1, dm_weight=1.0, regression_weight=1.0):
    return TrainConfig.model_validate(
        {
            "output": "out",
            "teacher": {"kind": "mixture"},
            "data": {"pairs": "/pairs", "prompts": "/prompts.parquet"},
            "loss": {
                "dm_weight": dm_weight,
                "regression_weight": regression_weight,
                "critic_steps_per_generator_step": turns,
            },
            "batch": {"dm": dm, "regression": pairs},
            "runtime": {"micro_batch": micro},
        }
    )


@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    micro=st.integers(1, 4),
    pairs_per_micro=st.integers(1, 3),
    turns=st.integers(1, 3),
    first=st.integers(0, 5),
)
def test_all_ranks_together_take_every_position_once_in_order(
    world, accumulation, micro, pairs_per_micro, turns, first
):
    dm, pairs = world * accumulation * micro, world * accumulation * pairs_per_micro
    config = run(dm, pairs, micro, turns)
    ranks = [MicroBatchPositions(config, rank, world) for rank in range(world)]
    assert all(rank.per_step == turns * accumulation for rank in ranks)
    taken_pairs, taken_prompts = [], []
    for number in range(first * turns * accumulation, (first + 2) * turns * accumulation):
        for rank in ranks:  # micro-batch m of all ranks, then m + 1
            at = rank.at(number)
            assert at.step == number // (turns * accumulation)
            assert bool(at.pairs) == (number // accumulation % turns == 0)
            taken_pairs += at.pairs
            taken_prompts += at.prompts
    assert taken_pairs == list(range(first * pairs, (first + 2) * pairs))
    assert taken_prompts == list(range(first * turns * dm, (first + 2) * turns * dm))


def test_two_processes_take_the_micro_batches_of_one_with_twice_the_accumulation():
    config = run(dm=8, pairs=4, micro=2, turns=2)
    one = MicroBatchPositions(config, 0, 1)
    two = [MicroBatchPositions(config, rank, 2) for rank in range(2)]
    assert [one.at(number) for number in range(24)] == [rank.at(number) for number in range(12) for rank in two]


def test_a_stream_that_no_loss_needs_is_not_taken():
    only_pairs = MicroBatchPositions(run(dm=8, pairs=4, turns=3, dm_weight=0), 0, 1)
    assert only_pairs.per_step == 1  # no fake score, no turns of its own
    assert only_pairs.at(2) == type(only_pairs.at(0))(step=2, pairs=range(8, 12), prompts=range(0))
    only_prompts = MicroBatchPositions(run(dm=8, pairs=4, turns=3, regression_weight=0), 0, 1)
    assert [only_prompts.at(number).pairs for number in range(3)] == [range(0)] * 3
    assert only_prompts.at(4).prompts == range(32, 40)
