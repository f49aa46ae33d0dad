"""Reflect-retry over an environment of four doors, with a model that heeds guidance."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import pytest

from pz_agents.algorithms import r3l
from pz_agents.algorithms.rows import rows_of, shared_turns
from pz_agents.models.scripted import ScriptedModel
from pz_agents.prompting import BestOfN, ZeroShot
from pz_agents.prompting.reflection import Report
from pz_agents.rollout import Limits, RolloutContext, Task
from pz_agents.rollout.codec import decode, encode
from pz_agents.rollout.reflect_retry import expert_report, pivot_of, reflect_retry
from pz_envs.errors import ConfigError
from pz_envs.textenv import Outcome, TextEnv

pytestmark = pytest.mark.timeout(120)

TASKS = [Task("doors", 1, "step1/task1"), Task("doors", 2, "step1/task2")]


@dataclass
class Seen:
    """What the environments of one test did; lists, for they work in several threads."""

    opened: list[int] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)


class Doors(TextEnv):
    """Four doors, each saying which way; the way through all of them pays 1."""

    family = "doors"

    def __init__(self, seen=None, **behaviour):
        super().__init__()
        self.seen = seen or Seen()
        self.behaviour = behaviour
        self.nonces = behaviour.get("nonces")

    def _say(self):
        # Only the behaviour `nonces` makes what is seen differ from one episode to the next.
        nonce = f" ({self.nonce})" if self.nonces else ""
        return f"Door {self.door}{nonce}. It says {self._way()}."

    def _way(self):
        return ("left", "right")[(self.wanted >> self.door) % 2]

    def _start(self, seed, options):
        self._task_id, self._max_score, self._instruction = f"doors-{seed % 97}", 1.0, "Get out."
        self.nonce = next(self.nonces) if self.nonces else 0
        self.wanted, self.door, self.right = seed, 0, 0
        return Outcome(self._say(), 0.0)

    def _advance(self, command):
        self.seen.opened.append(self.door)
        if self.behaviour.get("breaks") and command == "break":
            raise RuntimeError("the hinge came off")
        self.right += command == self._way()
        self.door += 1
        over, won = self.door == 4, self.right == 4
        reward = float(over and won)
        return Outcome(
            "Out." if over else self._say(), reward, reward, terminated=over, success=over and won
        )

    def expert_action(self):
        return self._way()


class SavedDoors(Doors):
    can_snapshot = True

    def _save(self):
        return json.dumps([self.wanted, self.door, self.right, self.nonce]).encode()

    def _load(self, engine, header):
        self.seen.restored.append(1)
        self.wanted, self.door, self.right, self.nonce = json.loads(engine)


def report(step=2, outcome="failure") -> str:
    nothing = outcome == "success"
    return json.dumps(
        {
            "trajectory_summary": "Wrong way at the third door.",
            "root_cause_analysis": None if nothing else "It did not read.",
            "trajectory_outcome": outcome,
            "improvement_suggestion": None if nothing else "Read the door.",
            "retry_from_step": None if nothing else step,
        }
    )


def mind(*, reflection=None, wrong_at=2, guided="heed") -> ScriptedModel:
    """Goes wrong at one door unless guided; reflects with ``reflection``."""

    def reply(prompt: str, seed: int) -> str:
        if "You are a reflector." in prompt:
            return reflection if reflection is not None else report()
        said = prompt.rsplit("It says ", 1)[1].split(".", 1)[0]
        door = int(prompt.rsplit("Door ", 1)[1][0])
        told = "What an earlier attempt taught" in prompt
        if told and guided == "break" and door == wrong_at:
            return "<action>break</action>"
        if door == wrong_at and not (told and guided == "heed"):
            said = "nowhere"
        return f"<think>{seed % 7}</think><action>{said}</action>"

    return ScriptedModel(reply, template="chat")


def play(
    model=None,
    make_env=SavedDoors,
    *,
    reflector=None,
    agent=None,
    turns=8,
    group_size=4,
    options=None,
):
    context = RolloutContext(
        agent=agent or ZeroShot(model or mind(), max_new_tokens=64),
        make_env=lambda env_id: make_env(),
        limits=Limits(turns=turns),
        seed=3,
        concurrency=4,
        group_size=group_size,
        options=r3l.Options(**(options or {})),
    )
    return {item.key: item for item in reflect_retry(context, TASKS, reflector)}


def kinds(played) -> dict[str, int]:
    found = [item.kind for item in played.values()]
    return {kind: found.count(kind) for kind in sorted(set(found))}


@pytest.fixture(scope="module")
def played():
    return play()


def test_half_of_a_group_are_base_attempts_and_each_is_reflected_on_and_retried(played):
    assert kinds(played) == {"base": 4, "guided": 4, "reflection": 4, "retry": 4}
    assert {item.group_id for item in played.values()} == {task.group_id for task in TASKS}
    assert len({(item.group_id, item.attempt) for item in played.values()}) == len(played)
    assert not any(item.success for item in played.values() if item.kind == "base")
    assert all(item.success for item in played.values() if item.kind == "retry")


def test_a_retry_repeats_its_attempt_up_to_the_pivot_token_for_token(played):
    base, retry = played["step1/task1/0"], played["step1/task1/retry-0"]
    assert pivot_of(retry) == 2
    assert shared_turns(base, retry) == 2
    assert [step.observation for step in retry.steps[:3]] == [
        step.observation for step in base.steps[:3]
    ]
    assert retry.steps[2].notes["retry_of"] == base.key
    assert len(retry.steps) == 4
    assert retry.reward == 1.0


def test_the_retrys_prompts_hold_no_guidance_and_continue_the_attempts_conversation(played):
    base, retry = played["step1/task1/0"], played["step1/task1/retry-0"]
    model = mind()
    np.testing.assert_array_equal(retry.steps[2].sample.prompt_ids, base.steps[2].sample.prompt_ids)
    for step in retry.steps:
        assert "earlier attempt" not in model.decode(step.sample.prompt_ids)
    roles = [message["role"] for message in model.messages(retry.steps[3].sample.prompt_ids)]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]
    (row,) = rows_of(retry, 1.0, 2)
    assert row.turns[row.mask].min() == 2


def test_the_guided_twin_has_the_same_replies_behind_the_guidance(played):
    retry, guided = played["step1/task1/retry-0"], played["step1/task1/guided-0"]
    model = mind()
    for plain, told in zip(retry.steps[2:], guided.steps[2:], strict=True):
        np.testing.assert_array_equal(plain.sample.token_ids, told.sample.token_ids)
        assert "Read the door." in model.decode(told.sample.prompt_ids)
    rows = rows_of(guided, 1.0, 2)
    assert [sorted(set(row.turns[row.mask].tolist())) for row in rows] == [[2, 3]]


@pytest.mark.parametrize("pivot", [0, 1, 2])
def test_replay_and_snapshot_lead_to_the_same_retry(pivot):
    model = mind(reflection=report(pivot))
    runs = []
    for make_env in (Doors, SavedDoors):
        seen = Seen()
        found = play(model, partial(make_env, seen))
        runs.append([found[key] for key in sorted(found)])
        steps = 4 * 4 + 4 * (4 - pivot)
        replayed = 4 * pivot if make_env is Doors else 0
        assert len(seen.opened) == steps + replayed
        assert len(seen.restored) == (4 if make_env is SavedDoors and pivot > 0 else 0)
    for left, right in zip(*runs, strict=True):
        left, right = replace(left, seconds=0.0, steps=()), replace(right, seconds=0.0, steps=())
        assert all(getattr(left, name.name) == getattr(right, name.name) for name in fields(left))


def test_where_the_world_differs_the_retry_begins_afresh_and_is_counted():
    found = play(make_env=partial(Doors, nonces=itertools.count()))
    retries = [item for item in found.values() if item.kind == "retry"]
    assert [pivot_of(item) for item in retries] == [0] * 4
    assert all(item.status == "ok" and len(item.steps) == 4 for item in retries)
    assert all(item.success for item in retries)
    attempts = [item for item in found.values() if item.kind in r3l.EXPLORE]
    assert r3l.first_turns(attempts) == [0] * 8
    assert r3l.credit(list(found.values()), r3l.Options()).stats["replay_diverged"] == 4


def test_a_retry_that_breaks_leaves_its_attempt_unmasked():
    found = play(mind(guided="break"), partial(SavedDoors, breaks=True))
    failed = [item for item in found.values() if item.kind == "retry"]
    assert {item.status for item in failed} == {"failed"}
    attempts = [item for item in found.values() if item.kind in r3l.EXPLORE]
    assert r3l.first_turns(attempts) == [0] * len(attempts)
    figures = r3l.credit(list(found.values()), r3l.Options()).stats
    assert (figures["retries"], figures["improve"], figures["meta_rows"]) == (4, 0, 0)


def test_the_steps_before_the_pivot_count_towards_the_turn_limit():
    found = play(turns=3)
    retry = found["step1/task1/retry-0"]
    assert (len(retry.steps), retry.truncated) == (3, "turns")


def test_a_report_that_cannot_be_read_leads_to_no_retry_and_is_counted():
    found = play(mind(reflection="I would rather not."))
    assert kinds(found) == {"base": 4, "reflection": 4}
    assert {item.status for item in found.values() if item.kind == "reflection"} == {"rejected"}
    figures = r3l.credit(list(found.values()), r3l.Options()).stats
    assert (figures["reflections"], figures["reflection_failures"]) == (4, 4)
    assert figures["zero_advantage_groups"] == 1


def test_groups_are_filled_with_plain_attempts_where_asked():
    found = play(mind(reflection="?"), options={"fill_groups": True})
    assert kinds(found) == {"base": 4, "fill": 4, "reflection": 4}
    fill = found["step1/task1/fill-0"]
    assert fill.steps[0].sample.token_ids.tolist() != (
        found["step1/task1/0"].steps[0].sample.token_ids.tolist()
    )


def test_a_success_that_is_called_one_is_not_retried_and_its_reflection_is_learned():
    found = play(mind(reflection=report(outcome="success"), wrong_at=9))
    assert kinds(found) == {"base": 4, "reflection": 4}
    figures = r3l.credit(list(found.values()), r3l.Options()).stats
    assert (figures["success"], figures["reflection_perfect"], figures["meta_rows"]) == (1, 4, 4)


def test_a_failure_that_is_called_a_success_teaches_no_reflection():
    found = play(mind(reflection=report(outcome="success")))
    assert {item.status for item in found.values() if item.kind == "reflection"} == {"rejected"}


def test_a_retry_that_earns_nothing_more_has_no_meta_rows():
    found = play(mind(guided="ignore"))
    assert kinds(found) == {"base": 4, "reflection": 4, "retry": 4}
    figures = r3l.credit(list(found.values()), r3l.Options()).stats
    assert (figures["improve"], figures["meta_rows"]) == (0, 0)


def test_scripted_and_own_reflections_are_told_apart(played):
    scripted = play(reflector=lambda base, expert: Report("s", "c", "failure", "Read.", 2))
    assert kinds(scripted) == {
        "base": 4,
        "scripted-guided": 4,
        "scripted-reflection": 4,
        "scripted-retry": 4,
    }
    for found, count in ((scripted, 4), (played, 0)):
        figures = r3l.credit(list(found.values()), r3l.Options()).stats
        assert figures["improve"] == 1
        assert figures["scripted_retries"] == figures["scripted_reflections"] == count
    tokens = r3l.credit(list(scripted.values()), r3l.Options()).stats["reflection_tokens"]
    assert tokens == 0
    assert not [
        row for item in scripted.values() if "reflection" in item.kind for row in rows_of(item, 1.0)
    ]


def test_a_reflector_may_answer_with_text_and_may_be_wrong():
    answers = itertools.cycle([report(1), "hm", None, report(2)])
    found = play(reflector=lambda base, expert: next(answers))
    assert kinds(found)["scripted-retry"] == 2
    figures = r3l.credit(list(found.values()), r3l.Options()).stats
    assert figures["reflection_failures"] == 2


def test_the_expert_names_the_first_step_it_would_have_taken_otherwise():
    found = play(mind(wrong_at=1), options={"reflector": "expert"})
    retry = found["step1/task1/retry-0"]
    assert retry.kind == "scripted-retry"
    assert pivot_of(retry) == 1
    assert retry.success


def test_an_expert_without_a_better_idea_reports_nothing(played):
    base = played["step1/task1/0"]
    assert expert_report(base, [None] * 4) is None
    assert expert_report(base, ["right", "left", "nowhere", "right"]) is None
    assert expert_report(replace(base, success=True), []).trajectory_outcome == "success"


def test_the_same_run_gives_the_same_episodes(played):
    again = play()
    assert again.keys() == played.keys()
    for key, item in played.items():
        assert encode(replace(item, seconds=0.0)) == encode(replace(again[key], seconds=0.0))


def test_credit_is_the_same_after_a_store(played):
    stored = [decode(encode(item)) for item in played.values()]
    before, after = (r3l.credit(list(items), r3l.Options()) for items in (played.values(), stored))
    assert before.stats == after.stats
    for left, right in zip(before.rows, after.rows, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
        np.testing.assert_array_equal(left.advantages, right.advantages)


def test_a_model_without_a_system_message_is_told_the_advice_alone():
    heard = []
    model = ScriptedModel(lambda prompt, seed: heard.append(prompt) or "left")
    found = play(model, reflector=lambda base, expert: Report("s", "c", "failure", "Hm.", 2))
    base, retry = found["step1/task1/0"], found["step1/task1/retry-0"]
    assert shared_turns(base, retry) >= 2
    told = [prompt for prompt in heard if prompt.startswith("Hm.Door")]
    assert (len(heard), len(told)) == (4 * 4 + 4 * 2, 4 * 2)
    # Each turn stands alone in a prompt, so those before the pivot are rows that go.
    assert [sorted(set(row.turns[row.mask])) for row in rows_of(retry, 1.0, 2)] == [[2], [3]]


def test_what_it_cannot_play_is_refused():
    with pytest.raises(ConfigError, match="the agent `zeroshot`; got BestOfN"):
        play(agent=BestOfN(mind()))
    with pytest.raises(ConfigError, match="group_size of 2; got 1"):
        play(group_size=1)
