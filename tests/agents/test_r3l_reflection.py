"""Reports are read as they were meant, and what cannot be read is refused, never guessed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pz_agents.errors import ModelError
from pz_agents.models.scripted import ScriptedModel
from pz_agents.prompting import find_template
from pz_agents.prompting.reflection import (
    FIELDS,
    Report,
    episode_log,
    fitted_guidance,
    guidance_text,
    parse_report,
    reflection_prompts,
    with_guidance,
)
from pz_agents.prompting.templates import system_text
from pz_agents.sdk.types import Step, Trajectory

pytestmark = pytest.mark.timeout(120)

GOOD = {
    "trajectory_summary": "It took the lamp, then fell.",
    "root_cause_analysis": "It was dark, because the lamp was off.",
    "trajectory_outcome": "failure",
    "improvement_suggestion": "In the dark, light a lamp before you walk.",
    "retry_from_step": 2,
}
PLAIN = json.dumps(GOOD)
REPORT = Report(**GOOD)


def episode(steps: int = 3, *, observation: str = "A room.", success: bool = False) -> Trajectory:
    return Trajectory(
        key="g/0",
        env_id="toy",
        env_seed=0,
        task_id="t",
        group_id="g",
        attempt=0,
        steps=tuple(
            Step(f"{observation} {number}", f"go {number}", 0.0, 0.0, True, False)
            for number in range(steps)
        ),
        final_observation="The end.",
        reward=float(success),
        score=0.0,
        max_score=1.0,
        score_norm=0.0,
        success=success,
        terminated=True,
        truncated="",
    )


def changed(**changes) -> str:
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"```json\n{json.dumps(GOOD, indent=2)}\n```\nI hope this helps.",
        f"<think>Why {{so}}?</think> Here it is: {PLAIN} Done.",
        f"[{PLAIN}]",
        f"{PLAIN[:-1]},\n}}",
        PLAIN.replace('"', "'"),
        PLAIN.replace('"', ""),
        PLAIN[:-1],
        PLAIN.replace('": "', "“：“")
        .replace('", "', "”，“")
        .replace('": ', "”：")
        .replace('{"', "｛“"),
        "\n".join(f"**{name}**: {value}" for name, value in GOOD.items()),
        "\n".join(f"{name} = {value};" for name, value in GOOD.items()),
        changed(retry_from_step="2"),
        changed(retry_from_step=2.0),
        changed(retry_from_step="Step 2"),
        changed(retry_from_step=[2]),
        changed(trajectory_outcome="Failure"),
        changed(trajectory_summary=["It took the lamp, then fell."]),
    ],
)
def test_a_report_is_read_whatever_its_dress(text):
    assert parse_report(text, 3) == REPORT


def test_quotes_within_a_text_that_are_not_escaped_are_kept():
    text = PLAIN.replace("light a lamp", 'say "light lamp"')
    found = parse_report(text, 3)
    assert found.improvement_suggestion == 'In the dark, say "light lamp" before you walk.'


def test_an_array_in_broken_json_becomes_one_text():
    text = PLAIN.replace('"In the dark, light a lamp before you walk."', '["Light it.", "Walk."]')
    assert parse_report(text, 3).improvement_suggestion == "Light it.; Walk."
    assert parse_report(text[:-1], 3).improvement_suggestion == "Light it.; Walk."


def test_a_success_needs_no_advice_and_no_step():
    text = changed(
        trajectory_outcome="success",
        root_cause_analysis=None,
        improvement_suggestion=None,
        retry_from_step=None,
    )
    assert parse_report(text, 3) == Report(GOOD["trajectory_summary"], None, "success")


def test_of_several_reports_the_last_counts():
    draft = changed(retry_from_step=0)
    assert parse_report(f"First: {draft}\nBetter: {PLAIN}", 3).retry_from_step == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no trajectory_summary, root_cause_analysis, trajectory_outcome"),
        ("I do not know.", "has no trajectory_summary"),
        (json.dumps({key: GOOD[key] for key in FIELDS[1:]}), "has no trajectory_summary"),
        (changed(trajectory_outcome="fine"), "trajectory_outcome is 'fine'; allowed: success"),
        (changed(improvement_suggestion=None), "improvement_suggestion is missing"),
        (changed(retry_from_step=3), "retry_from_step is 3; allowed: 0 to 2"),
        (changed(retry_from_step=-1), "retry_from_step is -1"),
        (changed(retry_from_step=None), "retry_from_step is None"),
        (changed(retry_from_step=True), "retry_from_step is True"),
        (changed(retry_from_step="soon"), "retry_from_step is 'soon'"),
        (
            changed(trajectory_outcome="success_but_inefficient", retry_from_step=9),
            "allowed: 0 to 2",
        ),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_report(text, 3)


@given(st.text() | st.lists(st.sampled_from([*FIELDS, *'{}[]":,“”：，\n', "2", "failure"])))
def test_no_text_is_more_than_refused(pieces):
    text = pieces if isinstance(pieces, str) else " ".join(pieces)
    try:
        found = parse_report(text, 5)
    except ValueError:
        return
    assert found.trajectory_outcome in ("success", "success_but_inefficient", "failure")


@given(st.text(min_size=1).filter(lambda text: text.strip().lower() not in ("", "null", "none")))
def test_any_advice_in_proper_json_comes_through(advice):
    found = parse_report(changed(improvement_suggestion=f"Do: {advice}"), 3)
    assert found.improvement_suggestion == f"Do: {advice}".strip()


def test_the_log_has_every_step_and_what_came_of_it():
    log = episode_log(episode(2), "Find the exit.")
    assert log.splitlines() == [
        "Rules: Find the exit.",
        "Step 0",
        "Observation: A room. 0",
        "Reply: go 0",
        "Step 1",
        "Observation: A room. 1",
        "Reply: go 1",
        "End: The end.",
        "Feedback: no success, reward 0, steps 2, the episode ended",
    ]


@pytest.mark.parametrize("room", [4000, 2000, 400, 130, 40])
def test_a_request_to_reflect_fits_and_keeps_the_end_of_the_log(room):
    model = ScriptedModel(["x"])
    played = episode(40, observation="Long. " * 200)
    (ids,) = reflection_prompts(model, [(played, "Rules.")], room)
    assert len(ids) <= room
    assert "reward 0, steps 40, the episode ended" in model.decode(ids) or room == 40
    assert ("exactly these fields" in model.decode(ids)) == (room >= 4000)


def test_a_context_that_holds_no_request_is_refused():
    with pytest.raises(ModelError, match="2 tokens for a request to reflect"):
        reflection_prompts(ScriptedModel(["x"]), [(episode(), "")], 2)


def test_guidance_is_the_whole_report_and_braces_survive_the_template():
    guidance = guidance_text(REPORT)
    assert all(name in guidance for name in FIELDS)
    told = with_guidance(find_template("chat"), guidance)
    text = system_text(told, "Rules {of} the game.", "action")
    assert text.startswith("Rules {of} the game.")
    assert text.endswith(guidance)
    assert system_text(with_guidance(find_template("compact"), guidance), "", "a") == guidance


def test_guidance_takes_at_most_half_of_the_room():
    model = ScriptedModel(["x"])
    guidance = guidance_text(REPORT)
    assert fitted_guidance(model, guidance, 10_000) == guidance
    assert guidance.startswith(fitted_guidance(model, guidance, 100))
    assert len(model.encode(fitted_guidance(model, guidance, 100))) == 50
