"""Scores against numbers worked out by hand, and every reason not to rank one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pz_bench import scores, stats
from pz_envs import catalog

COUNTDOWN = "pz/Countdown-v0"
ZORK = "pz/Zork1-v0"


def score_of(cells, env=COUNTDOWN, seeds=None):
    wanted = [cell.spec.seed for cell in cells] if seeds is None else seeds
    return scores.score(cells, catalog.find(env), env, wanted)


def with_failure(cell, episode):
    """The record as a crash half-way would leave it, partial score and all."""
    episodes = list(cell.episodes)
    episodes[episode] = replace(episodes[episode], status="failed", error="EnvError: engine died")
    return replace(cell, episodes=tuple(episodes))


def test_a_success_rate_by_hand(make_cell):
    cells = [
        make_cell("random", COUNTDOWN, [1, 0, 0, 1], tokens=30),
        make_cell("random", COUNTDOWN, [0, 0, 0, 1], seed=1, tokens=10),
    ]
    score = score_of(cells)
    assert score.status == "ranked"
    assert score.reason is None
    assert (score.value, score.success_rate, score.score) == (0.375, 0.375, 0.375)
    assert (score.episodes, score.failures, score.seeds, score.planned) == (8, 0, (0, 1), 4)
    assert (score.turns, score.sampled_tokens, score.prompt_tokens) == (4, 20, 200)
    assert (score.invalid_share, score.format_error_share) == (0.25, 0.5)
    assert score.interval == "wilson"


def test_a_success_interval_is_wilson_s_over_effective_trials(make_cell):
    # instance sums over the two seeds 1, 0, 0, 2 of 3/4 expected: residual 1/4, -3/4, -3/4, 5/4;
    # clustered variance of the total 4/3 * 44/16 = 11/3; independent 8 * .375 * .625 = 1.875
    cells = [
        make_cell("random", COUNTDOWN, [1, 0, 0, 1]),
        make_cell("random", COUNTDOWN, [0, 0, 0, 1], seed=1),
    ]
    trials = 8 * 1.875 / (11 / 3)
    low, high = stats.wilson(0.375 * trials, trials)
    score = score_of(cells)
    assert (score.low, score.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_a_normalised_score_by_hand(make_cell):
    cells = [
        make_cell("random", ZORK, [0.1, 0.3], most=350),
        make_cell("random", ZORK, [0.2, 0.2], seed=1, most=350),
    ]
    score = score_of(cells, ZORK)
    assert (score.metric, score.interval) == ("score_norm", "bootstrap")
    assert (score.value, score.success_rate, score.score, score.max_score) == (0.2, 0, 70, 350)
    low, high = stats.bootstrap_interval(scores.matrix(cells, "score_norm"), stream=ZORK)
    assert low < 0 < 1 < high
    assert (score.low, score.high) == (0, 1)  # two instances say little, but shares end there


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_equal_points_have_wilson_s_interval_over_the_instances(make_cell, share):
    cells = [make_cell("expert", ZORK, [share] * 4, seed=seed, most=350) for seed in range(3)]
    score = score_of(cells, ZORK)
    low, high = stats.wilson(4 * share, 4)
    assert (score.value, score.interval) == (share, "wilson")
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-6)
    assert score.high - score.low > 0.4


def elsewhere(cell, data=None):
    """The cell as another machine would have played it: other tasks behind the same seeds."""
    episodes = tuple(replace(each, task_id=f"made/{each.episode}") for each in cell.episodes)
    return replace(cell, episodes=episodes, data=data or {})


def test_seeds_that_played_different_tasks_are_not_ranked(make_cell):
    cells = [make_cell("random", COUNTDOWN, [1, 0], seed=seed) for seed in (0, 1)]
    score = score_of([cells[0], elsewhere(cells[1])])
    assert (score.status, score.reason) == (
        "unranked",
        "the seeds played different tasks: their data differ",
    )
    hashed = [
        replace(cell, data={"games.tar.xz": digest})
        for cell, digest in zip(cells, ("ab", "cd"), strict=True)
    ]
    assert score_of(hashed).reason.endswith("their data differ (games.tar.xz)")
    assert score_of(cells).status == "ranked"


def test_a_row_on_other_tasks_than_most_of_its_column_is_not_ranked(make_cell):
    names = ("random", "expert", "a.py:A")
    rows = [make_cell(name, COUNTDOWN, [1, 0]) for name in names]
    rows[2] = elsewhere(rows[2])
    played = scores.played_by_most(rows)
    row = catalog.find(COUNTDOWN)
    found = [scores.score([cell], row, COUNTDOWN, [0], played) for cell in rows]
    assert [score.status for score in found] == ["ranked", "ranked", "unranked"]
    assert found[2].reason == "played other tasks than the other rows: the data differ"
    # one against one: the row with files of its own decides
    two = [elsewhere(rows[0], {"games.tar.xz": "ab"}), rows[1]]
    assert scores.played_by_most(two)[str(rows[0].episodes[0].env_seed)] == "made/0"


def test_instances_that_were_different_tasks_are_not_paired(make_cell):
    left = make_cell("expert", COUNTDOWN, [1, 1, 1])
    right = make_cell("random", COUNTDOWN, [0, 0, 1])
    one = replace(right.episodes[0], task_id="made/0")
    found = scores.compare([left], [replace(right, episodes=(one, *right.episodes[1:]))], "success")
    assert (found.instances, found.difference.mean) == (2, 0.5)
    assert scores.compare([left], [elsewhere(right)], "success") is None
    data = [replace(cell, data={"t.jsonl": cell.spec.algorithm}) for cell in (left, right)]
    assert scores.compare([data[0]], [data[1]], "success") is None


def test_a_failed_episode_counts_as_zero_in_every_denominator(make_cell):
    values = [1.0] * 100
    cells = [make_cell("expert", ZORK, values, most=350)]
    whole = score_of(cells, ZORK)
    score = score_of([with_failure(cells[0], 7)], ZORK)
    assert (whole.value, whole.success_rate, whole.score) == (1.0, 1.0, 350)
    assert (score.value, score.success_rate, score.score) == (0.99, 0.99, 346.5)
    assert (score.episodes, score.failures, score.status) == (100, 1, "ranked")


def test_more_than_two_percent_failures_are_not_ranked(make_cell):
    cell = make_cell("expert", COUNTDOWN, [1.0] * 100)
    for episode in (1, 2):
        cell = with_failure(cell, episode)
    assert score_of([cell]).status == "ranked"
    score = score_of([with_failure(cell, 3)])
    assert score.status == "unranked"
    assert score.reason == "3 of 100 episodes failed (3.0 %, at most 2 % allowed)"
    assert score.value == 0.97


def test_a_missing_seed_is_not_ranked(make_cell):
    cells = [make_cell("random", COUNTDOWN, [1, 0]), make_cell("random", COUNTDOWN, [1, 0], seed=2)]
    score = score_of(cells, seeds=[0, 1, 2])
    assert (score.status, score.reason) == ("unranked", "seed 1: no cell")
    assert score.value == 0.5


def test_a_partial_cell_is_not_ranked(make_cell):
    half = make_cell("random", COUNTDOWN, [1, 0], seed=1, status="partial", episodes=4)
    half = replace(half, command="pz-bench run --matrix starter")
    score = score_of([make_cell("random", COUNTDOWN, [1, 0, 0, 0]), half])
    assert (score.status, score.reason) == ("unranked", "seed 1: 2 of 4 episodes")
    assert score.command == "pz-bench run --matrix starter"
    assert score.value == pytest.approx(2 / 6, abs=1e-6)


def test_a_failed_cell_has_its_reason_and_no_number(make_cell):
    cell = make_cell(
        "random", COUNTDOWN, [], status="failed", reason="ModelError: no weights\nat x"
    )
    score = score_of([cell])
    assert (score.status, score.reason) == ("unranked", "failed: ModelError: no weights")
    assert score.value is None
    assert score.success_rate is None


def test_what_was_not_run_has_no_number_but_a_command(make_cell):
    cells = [
        make_cell(
            "random",
            ZORK,
            [],
            seed=seed,
            status="not_run",
            reason="The story file zork1.z5 is not here.",
            command="pz-envs data get zork_mit",
        )
        for seed in range(3)
    ]
    score = score_of(cells, ZORK)
    assert (score.status, score.value, score.episodes) == ("not_run", None, 0)
    assert score.reason == "The story file zork1.z5 is not here."
    assert score.command == "pz-envs data get zork_mit"


def test_seeds_with_different_settings_are_not_ranked(make_cell):
    cells = [
        make_cell("random", COUNTDOWN, [1, 0], max_turns=5),
        make_cell("random", COUNTDOWN, [1, 0], seed=1, max_turns=6),
    ]
    score = score_of(cells)
    assert (score.status, score.reason) == (
        "unranked",
        "the seeds were run with different settings",
    )


def test_a_single_episode_has_no_interval(make_cell):
    score = score_of([make_cell("random", COUNTDOWN, [1])])
    assert (score.value, score.low, score.high, score.interval) == (1.0, None, None, None)


def test_comparisons_use_the_instances_that_both_played(make_cell):
    left = [make_cell("grpo", COUNTDOWN, [1, 1, 1, 0, 0, 0])]
    right = [make_cell("zeroshot", COUNTDOWN, [0, 1, 0, 0], seed=seed) for seed in (0, 1)]
    found = scores.compare(left, right, "success")
    difference, instances = found.difference, found.instances
    assert instances == 4
    assert difference.mean == 0.5
    # of 16 sign vectors of (1, 0, 1, 0), those with equal signs on the two ones: 8
    assert difference.p == 0.5


def test_without_shared_instances_there_is_no_comparison(make_cell):
    left, right = make_cell("grpo", COUNTDOWN, [1]), make_cell("zeroshot", ZORK, [1])
    assert scores.compare([left], [right], "success") is None
    assert scores.compare([left], [], "success") is None


def test_differences_of_shares_end_at_one(make_cell):
    left, right = make_cell("grpo", ZORK, [1, 0.2]), make_cell("zeroshot", ZORK, [0, 0])
    found = scores.compare([left], [right], "score_norm")
    assert (found.difference.low, found.difference.high) == (-1.0, 1.0)


def with_steps(cell, *paths):
    """The cell with the score after each step of each episode."""
    episodes = [
        replace(episode, steps=tuple({"score": value} for value in path))
        for episode, path in zip(cell.episodes, paths, strict=True)
    ]
    return replace(cell, episodes=tuple(episodes))


def test_the_best_score_within_100_steps_stands_apart_from_the_final_one(make_cell):
    cell = make_cell("random", ZORK, [0.1, 0.0], most=350)
    late = [0.0] * 100 + [300.0]  # the 101st step is too late
    score = score_of([with_steps(cell, [10.0, 45.0, 35.0], late)], ZORK)
    assert (score.score, score.best) == (17.5, 22.5)
    assert score_of([cell], ZORK).best is None  # no steps were recorded


def test_pass_at_k_is_of_mathematics_with_several_seeds(make_cell):
    cells = [
        make_cell("zeroshot", "pz/AIME24-v0", values, seed=seed)
        for seed, values in enumerate(([1, 0], [0, 0], [1, 0]))
    ]
    score = score_of(cells, "pz/AIME24-v0")
    # the first question: 2 of 3 samples right, so 1 - C(1, k) / C(3, k); the second never
    assert score.pass_at == ((1, 0.333333), (2, 0.5), (3, 0.5))
    assert score_of(cells[:1], "pz/AIME24-v0").pass_at == ()
    assert score_of([make_cell("random", COUNTDOWN, [1, 0])] * 2).pass_at == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No file /home/ann/games/zork1.z5 here", "No file …/zork1.z5 here"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("pz/Zork1-v0 and ./my/agent.py:Mine", "pz/Zork1-v0 and ./my/agent.py:Mine"),
        ("3/4 of /tmp", "3/4 of /tmp"),
    ],
)
def test_folders_of_this_machine_are_cut(text, expected):
    assert scores.portable(text) == expected
