"""What a study may spend: prices, what cells have spent, and which cells are not started then."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pz_bench import budget, store
from pz_bench.budget import Limits, Price
from pz_bench.cell import CellSpec, cell_id
from pz_bench.cli import main
from pz_bench.estimate import estimate
from pz_bench.runner import Job
from pz_envs.errors import ConfigError

COUNTDOWN = "pz/Countdown-v0"
API = "openai:gpt-4o-mini@http://localhost:1/v1"


def job_of(cell, state="owed"):
    parts = {"spec": cell.spec.model_dump(mode="json")}
    return Job(cell.spec, cell_id(parts), parts, state)


def keep(runs, cell, state="done"):
    job = job_of(cell, state)
    folder = store.create_cell(runs, cell.spec, job.parts)
    log = store.EpisodeLog(folder)
    for episode in cell.episodes:
        log.append(episode)
    log.close()
    store.finish_cell(folder, "done", seconds=1800.0)
    return job


@pytest.mark.parametrize("glob", ["gpt-4o*", "openai:gpt-*", "*"])
def test_a_model_behind_a_server_is_priced_by_its_name_without_the_address(glob):
    price = Price(read=1, write=2)
    assert budget.price_of(API, {"other": Price(read=9, write=9), glob: price}) == price
    assert budget.price_of(API, {"*localhost*": price}) is None
    assert budget.price_of(None, {"*": price}) is None


def test_a_price_is_read_from_the_command_line():
    assert budget.parse_price("gpt-4.1*=2,8") == ("gpt-4.1*", Price(read=2, write=8))
    for wrong in ("gpt-4", "gpt-4=2", "=1,2", "gpt-4=a,b", "gpt-4=-1,2"):
        with pytest.raises(ConfigError, match="MODEL=READ,WRITE"):
            budget.parse_price(wrong)


def test_the_command_line_s_price_wins_over_the_matrix_s_of_the_same_glob(tmp_path, capsys):
    matrix = tmp_path / "m.yaml"
    rows = f"{{algorithms: [zeroshot], environments: [{COUNTDOWN}], models: ['{API}']}}"
    matrix.write_text(f"rows: [{rows}]\nprices: {{'gpt-*': {{read: 0, write: 1}}}}\n")
    words = ["plan", "--matrix", str(matrix), "--runs", str(tmp_path / "runs"), "--json"]
    found = []
    for extra in ([], ["--price", "gpt-*=0,2"]):
        assert main([*words, *extra]) == 0
        found.append(json.loads(capsys.readouterr().out)["left"]["usd"])
    assert found[1] == pytest.approx(2 * found[0]) != 0


def test_a_cell_has_spent_the_tokens_of_its_episodes_at_their_price(tmp_path, make_cell):
    job = keep(tmp_path, make_cell("zeroshot", COUNTDOWN, [1, 0], model=API, tokens=1000))
    price = Price(read=2.0, write=10.0)
    found = budget.spent(tmp_path, job, estimate(job.spec), price, gpu_price=0.0)
    # Two episodes of 10,000 prompt and 1,000 sampled tokens, four turns each; half an hour.
    assert found.usd == pytest.approx(20_000 * 2e-6 + 2_000 * 10e-6)
    assert (found.tokens, found.steps, found.hours) == (22_000, 8, 0.5)


def test_a_priced_model_reads_its_whole_context_every_turn():
    spec = CellSpec(algorithm="zeroshot", env=COUNTDOWN, model=API, episodes=1, max_turns=8)
    guess = estimate(spec)
    price = Price(read=1e6, write=0.0)
    once, again = guess.prompt_tokens, guess.sampled_tokens
    # Half of 8 turns: contexts of 1, 2, 3, 4 quarters of all that is ever added.
    expected = budget.expected(spec, guess, price, 0.0)
    assert expected.usd == pytest.approx((once + again) * (1 + 2 + 3 + 4) / 4)


def test_a_cell_without_a_price_costs_its_gpu_hours(make_cell):
    spec = CellSpec(algorithm="zeroshot", env=COUNTDOWN, model="Qwen/Qwen2.5-7B-Instruct")
    guess = estimate(spec)
    assert budget.expected(spec, guess, None, 3.0).usd == pytest.approx(3.0 * guess.gpu_hours)
    free = CellSpec(algorithm="random", env=COUNTDOWN)
    assert budget.expected(free, estimate(free), None, 3.0).usd == 0


def test_a_cell_is_not_started_when_it_would_go_beyond_the_limit(tmp_path, make_cell):
    price = Price(read=0.0, write=1.0)
    done = keep(tmp_path, make_cell("zeroshot", COUNTDOWN, [1, 0], model=API, tokens=500_000))
    waiting = job_of(make_cell("zeroshot", COUNTDOWN, [], seed=1, episodes=2, model=API))
    own = budget.expected(waiting.spec, estimate(waiting.spec), price, 0.0).usd
    jobs, prices = [done, waiting], {"gpt-*": price}

    def reason(usd, **limits):
        may_not = budget.gate(tmp_path, jobs, Limits(usd=usd, **limits), prices, 0.0)
        return may_not(waiting)

    assert reason(1.0 + 1.01 * own) is None
    assert "usd; raise the limit" in reason(1.0 + 0.99 * own)
    assert reason(None) is None
    assert "tokens" in reason(None, tokens=1)


def test_a_running_cell_holds_back_what_it_is_estimated_to_take(tmp_path, make_cell):
    jobs = [
        job_of(make_cell("zeroshot", COUNTDOWN, [], seed=seed, episodes=2, model=API))
        for seed in (0, 1)
    ]
    own = budget.expected(jobs[0].spec, estimate(jobs[0].spec), Price(read=0, write=1), 0.0).usd
    may_not = budget.gate(tmp_path, jobs, Limits(usd=1.5 * own), {"*": Price(read=0, write=1)}, 0.0)
    assert may_not(jobs[0]) is None
    jobs[0].state = "running"
    assert may_not(jobs[1]) is not None
    jobs[0].state = "failed"  # it left no files, so it has spent nothing
    assert may_not(jobs[1]) is None


def test_asking_about_every_cell_of_a_study_looks_at_each_a_few_times(
    tmp_path, make_cell, monkeypatch
):
    looked = Counter()

    def spent(runs, job, *rest, spent=budget.spent):
        looked[job.id] += 1
        return spent(runs, job, *rest)

    monkeypatch.setattr(budget, "spent", spent)
    cell = make_cell("random", COUNTDOWN, [], episodes=2)
    jobs = [
        Job(cell.spec, str(number), {}, "owed" if number % 2 else "done") for number in range(60)
    ]
    may_not = budget.gate(tmp_path, jobs, Limits(steps=1e9), {}, 0.0)
    for job in jobs:
        if job.state == "owed":
            assert may_not(job) is None
            job.state = "done"
    assert max(looked.values()) <= 3


def test_a_limit_of_the_matrix_leaves_the_rest_owed_until_it_is_raised(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yaml").write_text(
        "name: small\nseeds: [0, 1, 2]\nlimits: {steps: 4}\n"
        f"rows: [{{algorithms: [random], environments: [{COUNTDOWN}], episodes: 2, max_turns: 1}}]"
    )
    words = ["run", "--matrix", "m.yaml", "-j", "1"]
    assert main(words) == 3
    assert "steps; raise the limit" in capsys.readouterr().err
    assert sorted(cell.status for cell in store.load_suite(tmp_path / "runs", "small")) == [
        "done",
        "done",
        "partial",
    ]
    assert main([*words, "--set", "limits.steps=6"]) == 0


def test_a_plan_shows_money_for_priced_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "-a", "zeroshot", "-e", COUNTDOWN, "--model", API, "--json"]
    sums = []
    for price in ("gpt-*=0,0", "gpt-*=1,1", "gpt-*=2,2"):
        assert main([*words, "--price", price]) == 0
        sums.append(json.loads(capsys.readouterr().out)["left"]["usd"])
    assert sums[0] == 0
    assert sums[2] == pytest.approx(2 * sums[1])
    assert sums[1] > 0
