"""When the share of what gave no finite gradient is judged, and over which steps."""

from trainer.tracking.nonfinite import NonfiniteShares


def test_one_lost_update_is_no_share_however_close_the_log_lines_are():
    shares = NonfiniteShares(0.05)
    verdicts = []
    for step in range(1, 61):
        shares.add(1, {"updates of the student": (int(step in (1, 30, 60)), 1)})  # one of each twenty
        verdicts.append(shares.judge())
    assert verdicts == [None] * 60


def test_counts_are_carried_from_log_line_to_log_line_until_there_are_twenty_steps():
    shares = NonfiniteShares(0.05)
    verdicts = []
    for step in range(1, 29, 7):
        lost = int(step in (1, 8))
        shares.add(7, {"samples": (0, 700), "updates of the critic": (5 * lost, 35)})
        verdicts.append(shares.judge())
    assert verdicts == [None, None, "9.5% of the updates of the critic of the last 21 steps", None]


def test_what_was_judged_does_not_count_again():
    shares = NonfiniteShares(0.05)
    shares.add(50, {"samples": (40, 1000)})
    assert shares.judge() is None
    shares.add(50, {"samples": (60, 1000)})
    assert shares.judge() == "6.0% of the samples of the last 50 steps"
    shares.add(1, {"samples": (20, 20)})
    assert shares.judge() is None
