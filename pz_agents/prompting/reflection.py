"""Reflections on an episode: the request, the five-field report that comes back, and its use.

A report says what happened, why, whether it was good enough, what to do otherwise and from which
step (after R3L's reflector). Small models write bad JSON, so ``parse_report`` reads what is meant:
fences, missing or typographic quotes, full-width punctuation, arrays for texts. What it cannot
read, or what contradicts itself, is a ``ValueError`` for the caller to count; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from pz_agents.errors import ModelError
from pz_agents.models.protocol import LanguageModel, Message
from pz_agents.prompting.templates import Template, clip
from pz_agents.sdk.types import Ids, Trajectory

Verdict = Literal["success", "success_but_inefficient", "failure"]

VERDICTS: tuple[str, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Report:
    """What a reflection comes to.

    trajectory_summary: what happened, in one to three sentences.
    root_cause_analysis: why, followed down to its cause; None where nothing went wrong.
    trajectory_outcome: ``success`` means that there is nothing to do better.
    improvement_suggestion: advice that makes sense without this episode; None for a success.
    retry_from_step: step from which to do otherwise, counted from 0; None for a success.
    """

    trajectory_summary: str
    root_cause_analysis: str | None
    trajectory_outcome: Verdict
    improvement_suggestion: str | None = None
    retry_from_step: int | None = None


FIELDS = tuple(Report.__dataclass_fields__)

_SYSTEM = """\
You are a reflector. You read the log of one episode that an agent played and find out what it \
should learn from it. Ask why something went wrong, then why that happened, until you reach a \
cause that the agent could have avoided; then state a principle that also helps in other episodes.

Answer with one JSON object and nothing else. It has exactly these fields:
- "trajectory_summary": one to three sentences about what the agent did and what came of it.
- "root_cause_analysis": the chain of whys, down to the first avoidable cause. null only if the \
episode was flawless.
- "trajectory_outcome": "success" (nothing to improve), "success_but_inefficient" (the goal was \
reached, but with wasted steps) or "failure".
- "improvement_suggestion": advice that can be understood without the log: in what kind of task, \
on what sign, which mistake threatens, and what to do instead. null if the outcome is "success".
- "retry_from_step": the number of the earliest step at which the cause shows, as in the log; 0 \
if the whole plan was wrong. null if the outcome is "success".

Example, for a log in which an agent solves 2x + 6 = 10, adds 6 to both sides at step 1 and \
answers x = 8 at step 2:
{"trajectory_summary": "The agent set up the equation correctly, then moved the constant with the \
wrong sign and answered 8.", "root_cause_analysis": "The answer is wrong because 2x was taken to \
be 16. It was, because 6 was added to both sides instead of subtracted. That happened because the \
inverse of the operation was not checked.", "trajectory_outcome": "failure", \
"improvement_suggestion": "When you isolate an unknown in a linear equation and a constant is \
added to it, subtract that constant from both sides; put the result back into the equation before \
you answer.", "retry_from_step": 1}"""

_SHORT_SYSTEM = "Reflect on the log. Write JSON: " + ", ".join(FIELDS)

_REQUESTS = (_SYSTEM, _SHORT_SYSTEM, "")
_ASK = "\n\nReflect on this episode. Answer with the JSON object."

_GUIDANCE = """\
# What an earlier attempt taught
You have tried this task before. This is an analysis of that attempt:

{report}

Apply its lesson. Do not mention this analysis in your replies."""

_OBSERVATION_CHARS: tuple[int | None, ...] = (None, 600, 200, 80)


def guidance_text(report: Report) -> str:
    """Return what a retry is told: the whole report, and to use it without speaking of it."""
    plain = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    return _GUIDANCE.format(report=plain)


def with_guidance(template: Template, guidance: str) -> Template:
    """Return ``template`` with ``guidance`` at the end of its system message."""
    escaped = guidance.replace("{", "{{").replace("}", "}}")
    return replace(template, system=f"{template.system}\n\n{escaped}".strip())


def fitted_guidance(model: LanguageModel, guidance: str, room: int) -> str:
    """Return as much of the beginning of ``guidance`` as half of ``room`` tokens hold."""
    ids = model.encode(guidance)
    return guidance if len(ids) <= room // 2 else model.decode(ids[: room // 2])


def episode_log(
    trajectory: Trajectory, instruction: str, observation_chars: int | None = None
) -> str:
    """Return an episode as text: the rules, each step, the end and what came of it.

    Args:
        trajectory: a finished episode.
        instruction: the environment's rules, as the player was told them.
        observation_chars: most characters of one observation, of which the end is kept.
    """
    lines = [f"Rules: {instruction}"] if instruction else []
    for number, step in enumerate(trajectory.steps):
        lines += [
            f"Step {number}",
            f"Observation: {clip(step.observation.strip(), observation_chars)}",
            f"Reply: {step.action.strip()}",
        ]
    lines.append(f"End: {clip(trajectory.final_observation.strip(), observation_chars)}")
    ended = "the episode ended" if trajectory.terminated else f"cut ({trajectory.truncated})"
    lines.append(
        f"Feedback: {'success' if trajectory.success else 'no success'}, "
        f"reward {trajectory.reward:g}, steps {len(trajectory.steps)}, {ended}"
    )
    return "\n".join(lines)


def reflection_prompts(
    model: LanguageModel,
    episodes: Sequence[tuple[Trajectory, str]],
    room: int,
    requests: Sequence[str] = _REQUESTS,
    ask: str = _ASK,
) -> list[Ids]:
    """Return for each episode the prompt [P], P <= room, that asks for a report on it.

    Where a log is too long, first its observations are shortened, then its beginning is left
    out; where the request alone takes over two thirds of the room, a shorter one is used.

    Args:
        model: renders the messages.
        episodes: finished episodes and the rules that their player was told.
        room: most tokens of a prompt.
        requests: the system message that asks, from the fullest to the shortest.
        ask: ends the log, where there is a system message.

    Raises:
        ModelError: not even an empty log fits.
    """
    for system in requests:
        taken = len(_prompt(model, system, "", ask))
        if taken <= room * 2 // 3:
            return [_fitted(model, (system, ask), item, room, taken) for item in episodes]
    raise ModelError(
        f"{model.name} has {room} tokens for a request to reflect, too few for any; "
        "use a model with a longer context, or a reflector that is not the model"
    )


def _fitted(
    model: LanguageModel,
    request: tuple[str, str],
    episode: tuple[Trajectory, str],
    room: int,
    taken: int,
) -> Ids:
    system, ask = request
    log = ""
    for chars in _OBSERVATION_CHARS:
        shorter = episode_log(*episode, chars)
        if shorter == log:
            continue
        log = shorter
        ids = _prompt(model, system, log, ask)
        if len(ids) <= room:
            return ids
    while len(ids) > room:
        # As many characters as the tokens there are room for would hold, and a few less.
        share = (room - taken) / (len(ids) - taken)
        log = clip(log, min(int(len(log) * share * 0.95), len(log) - 1))
        ids = _prompt(model, system, log, ask)
    return ids


def _prompt(model: LanguageModel, system: str, log: str, ask: str) -> Ids:
    if not system:
        return model.render([{"role": "user", "content": log}])
    user: Message = {"role": "user", "content": log + ask}
    return model.render([{"role": "system", "content": system}, user])


# Reading a report.

_QUOTES = "\"'`“”‘’「」『』"
_KEY = re.compile(
    rf"[{_QUOTES}*]*(?<![A-Za-z_])({'|'.join(FIELDS)})(?![A-Za-z_])[{_QUOTES}*]*\s*[:：=]\s*"
)
_ITEM_BREAK = re.compile(rf"[{_QUOTES}]\s*[,，、;；]\s*[{_QUOTES}]")
_TRAILING = re.compile(r"[\s,，;；{}]+$")
_NOTHING = {"", "null", "none", "nil", "n/a", "无", "空"}


def parse_report(text: str, steps: int) -> Report:
    """Return the report that a reply holds.

    Args:
        text: the reply, with whatever stands around the report.
        steps: of the episode reflected on; ``retry_from_step`` must be below it.

    Raises:
        ValueError: a field that is needed is missing or not what it must be; the message says
            which.
    """
    found = _as_json(text) or _by_keys(text)
    return checked_report(found, steps)


def checked_report(fields: Mapping[str, Any], steps: int) -> Report:
    """Return ``fields`` as a report; for its arguments and errors see ``parse_report``."""
    missing = [name for name in FIELDS[:3] if name not in fields]
    if missing:
        raise ValueError(f"the report has no {', '.join(missing)}")
    outcome = re.sub(r"[\s\-]+", "_", (_text(fields["trajectory_outcome"]) or "").strip().lower())
    if outcome not in VERDICTS:
        raise ValueError(f"trajectory_outcome is {outcome!r}; allowed: {', '.join(VERDICTS)}")
    verdict: Verdict = next(name for name in get_args(Verdict) if name == outcome)
    summary = _text(fields["trajectory_summary"]) or ""
    cause = _text(fields["root_cause_analysis"])
    if verdict == "success":
        return Report(summary, cause, verdict)
    suggestion = _text(fields.get("improvement_suggestion"))
    if suggestion is None:
        raise ValueError(f"improvement_suggestion is missing from a report of {outcome}")
    step = _number(fields.get("retry_from_step"))
    if step is None or not 0 <= step < steps:
        raise ValueError(
            f"retry_from_step is {fields.get('retry_from_step')!r}; allowed: 0 to {steps - 1}"
        )
    return Report(summary, cause, verdict, suggestion, step)


def _as_json(text: str) -> dict[str, Any] | None:
    """Return the JSON object in ``text`` with the three first fields, the last if several."""
    decoder = json.JSONDecoder(strict=False)
    found = None
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if all(name in value for name in FIELDS[:3]):
            found = value
    return found


def _by_keys(text: str) -> dict[str, Any]:
    """Return what stands behind each field's name, up to the next field's name."""
    matches = list(_KEY.finditer(text))
    ends = [*(match.start() for match in matches), len(text)][1:]
    found: dict[str, Any] = {}
    for match, end in zip(matches, ends, strict=True):
        value = text[match.end() : end]
        closing = value.rfind("}")
        if end == len(text) and closing >= 0:
            value = value[:closing]
        elif end == len(text):
            value = value.split("```")[0].split("\n\n")[0]
        found[match.group(1)] = _bare(value)
    return found


def _bare(value: str) -> str:
    """Return a value without its quotes, brackets and separators; items are joined."""
    value = _TRAILING.sub("", value).strip()
    if value[:1] in ("[", "【") and value[-1:] in ("]", "】"):
        value = "; ".join(_ITEM_BREAK.split(value[1:-1].strip()))
    return value.strip(_QUOTES + " \n\t").replace('\\"', '"').replace("\\n", "\n")


def _text(value: Any) -> str | None:
    """Return a field as text; None where it says that there is nothing."""
    if isinstance(value, list):
        value = "; ".join(str(item) for item in value)
    text = "" if value is None else str(value).strip()
    return None if text.lower() in _NOTHING else text


def _number(value: Any) -> int | None:
    """Return the first whole number in a field: 2, 2.0, "2", "step 2" and [2] are all 2."""
    if isinstance(value, bool) or value is None:
        return None
    match = re.search(r"-?\d+", str(value))
    return int(match.group()) if match else None
