"""The rollout program reflect-retry: attempts, a reflection on each, and a retry from its pivot.

Of a group, half are base attempts. Each that ends is reflected on; a report that finds something
to improve starts a retry at the step it names: from the environment's snapshot where there is one,
else by sending the first steps' actions again and comparing every observation. Where those differ
the retry begins at step 0, and says so.

What is yielded has one group per task and tells itself apart by ``kind``: ``base``; ``reflection``
(one step: the report; ``rejected`` if it cannot be used or is not to be learned from); ``retry``,
with the prompts that it would have had without guidance; ``guided``, a retry that was worth it
once more, with the prompts as they were; ``fill``, a plain attempt in place of a retry. Under a
reflector that is not the model, the three in the middle are ``scripted-...``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pydantic

from pz_agents.config import Settings
from pz_agents.models.protocol import GenerateRequest, is_trainable
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.reflection import Report, guidance_text, parse_report, reflection_prompts
from pz_agents.rollout.episode import EpisodeSpec, Resume
from pz_agents.rollout.loop import run_episodes
from pz_agents.rollout.programs import RolloutContext, Task
from pz_agents.rollout.retry_agent import GuidedAgent, Moment, Plan, Recorder, rescored
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_envs.errors import ConfigError
from pz_envs.replies import parse_reply
from pz_envs.seeding import derive_seed

Reflector = Callable[[Trajectory, Sequence[str | None]], Report | str | None]
"""``(episode, the expert's command at each step or None) -> report, its text, or None``."""

SCRIPTED = "scripted-"
"""Beginning of the kinds that a reflector other than the model leads to."""


class RetryOptions(Settings):
    """What can be changed about the program."""

    reflector: Literal["model", "expert"] = "model"
    """Who reflects: the policy itself, or a script that names the first step at which the
    environment's expert would have done otherwise."""

    reflection_tokens: int = pydantic.Field(default=1024, ge=16)
    """Most tokens of a reflection; never more than half of the model's context."""

    reflection_temperature: float = pydantic.Field(default=0.7, gt=0)
    """Of sampling a reflection."""

    fill_groups: bool = False
    """Play a plain attempt where no retry comes about, so that a group keeps its size."""


@dataclass(frozen=True, slots=True, eq=False)
class _Reflection:
    """What came of reflecting on ``base``: a report, or the ``problem`` that there is none."""

    base: Trajectory
    text: str
    report: Report | None
    problem: str = ""
    sample: Sample | None = None


def reflect_retry(
    context: RolloutContext, tasks: Sequence[Task], reflector: Reflector | None = None
) -> Iterator[Trajectory]:
    """Play each task's group; keys are ``group/i``, ``group/retry-i`` and so on.

    Args:
        context: ``group_size`` attempts a task, the larger half of them base attempts.
        tasks: the tasks.
        reflector: writes the reports, in place of the one that the options name.

    Raises:
        ConfigError: ``group_size`` is below 2, or the agent is not a plain ``ZeroShot``.
    """
    options = context.options if isinstance(context.options, RetryOptions) else RetryOptions()
    agent = context.agent
    if type(agent) is not ZeroShot:
        raise ConfigError(
            f"reflect-retry plays with the agent `zeroshot`; got {type(agent).__name__}"
        )
    if context.group_size < 2:
        raise ConfigError(f"reflect-retry needs a group_size of 2; got {context.group_size}")
    if reflector is None and options.reflector == "expert":
        reflector = expert_report
    attempts = (context.group_size + 1) // 2
    recorder = Recorder(agent, expert=reflector is not None)
    bases: dict[str, Trajectory] = {}
    specs = [_spec(task, number, str(number)) for task in tasks for number in range(attempts)]
    for base in _play(context, recorder, specs):
        bases[base.key] = base
        yield base
    ended = [bases[spec.key] for spec in specs if bases[spec.key].status == "ok"]
    moments = recorder.moments
    if reflector is None:
        reflections = _reflect(agent, ended, moments, options, context.seed)
    else:
        reflections = [_ask(reflector, base, moments[base.key]) for base in ended]
    prefix = "" if reflector is None else SCRIPTED
    retries = context.group_size - attempts
    again = [item for item in reflections if item.base.attempt < retries]
    plans = {
        _key(item.base, "retry"): Plan(
            item.base,
            moments[item.base.key],
            _told(agent, item.report),
            item.report.retry_from_step,
        )
        for item in again
        if item.report is not None and item.report.retry_from_step is not None
    }
    second = [_retry_spec(key, plan, attempts, prefix) for key, plan in plans.items()]
    if options.fill_groups:
        second += [
            _spec_like(item.base, _key(item.base, "fill"), item.base.attempt + attempts, "fill")
            for item in again
            if _key(item.base, "retry") not in plans
        ]
    guided = GuidedAgent(agent, plans, recorder.reset_options)
    learned: dict[str, bool] = {}
    for played in _play(context, guided, second):
        plan = plans.get(played.key)
        if plan is None or played.status != "ok":
            yield played
            continue
        retry = _as_without_guidance(agent, played)
        yield retry
        learned[plan.base.key] = improved(plan.base, retry)
        if learned[plan.base.key]:
            samples = guided.guided[played.key]
            key = _key(plan.base, "guided")
            attempt = plan.base.attempt + 2 * attempts
            yield _as_guided(retry, samples, key, attempt, f"{prefix}guided")
    for item in reflections:
        perfect = item.report is not None and item.report.trajectory_outcome == "success"
        worth = learned.get(item.base.key, perfect and item.base.success)
        yield _reflection_episode(agent, item, 3 * attempts, prefix, worth)


def improved(base: Trajectory, retry: Trajectory) -> bool:
    """Return whether a retry is worth imitating: it succeeds, and earns more or takes less."""
    better = retry.reward > base.reward or len(retry.steps) < len(base.steps)
    return retry.success and better


def expert_report(base: Trajectory, expert: Sequence[str | None]) -> Report | None:
    """Return a report that names the first step at which the expert would do otherwise.

    None where the environment has no expert, or none that knew better.
    """
    if base.success:
        return Report("The agent reached the goal.", None, "success")
    for number, (step, command) in enumerate(zip(base.steps, expert, strict=False)):
        tag = "answer" if "<answer>" in step.action else "action"
        said = parse_reply(step.action, tag, "auto").command
        if command is None or (said or "").strip().lower() == command.strip().lower():
            continue
        return Report(
            f"The agent took {len(base.steps)} steps and did not reach the goal.",
            f"At step {number} it did not do what leads to the goal.",
            "failure",
            f"At step {number} the right reply is: {command}",
            number,
        )
    return None


def _play(
    context: RolloutContext, agent: Recorder | GuidedAgent, specs: Sequence[EpisodeSpec]
) -> Iterator[Trajectory]:
    return run_episodes(
        agent,
        specs,
        make_env=context.make_env,
        limits=context.limits,
        seed=context.seed,
        concurrency=context.concurrency,
    )


def _reflect(
    agent: ZeroShot,
    bases: Sequence[Trajectory],
    moments: Mapping[str, Sequence[Moment]],
    options: RetryOptions,
    seed: int,
) -> list[_Reflection]:
    """Return the model's own reflections, all sampled in one call."""
    model = agent.model
    new = min(options.reflection_tokens, model.max_context // 2)
    rules = [str(moments[base.key][0].turn.info.get("instruction", "")) for base in bases]
    prompts = reflection_prompts(
        model, list(zip(bases, rules, strict=True)), model.max_context - new
    )
    requests = [
        GenerateRequest(
            prompt_ids=prompt,
            max_new_tokens=new,
            seed=derive_seed(seed, "reflection", base.key),
            temperature=options.reflection_temperature,
        )
        for base, prompt in zip(bases, prompts, strict=True)
    ]
    reflections = []
    for base, request, completion in zip(bases, requests, model.generate(requests), strict=True):
        sample = None
        if is_trainable(completion):
            sample = Sample(
                request.prompt_ids,
                completion.token_ids,
                completion.log_probs,
                completion.finish,
                completion.version,
                request.temperature,
            )
        reflections.append(_read(base, completion.text, sample))
    return reflections


def _told(agent: ZeroShot, report: Report) -> str:
    """Return the guidance; models that get no system message get the advice alone."""
    return guidance_text(report) if agent.template.system else report.improvement_suggestion or ""


def _ask(reflector: Reflector, base: Trajectory, moments: Sequence[Moment]) -> _Reflection:
    answer = reflector(base, [moment.expert for moment in moments])
    if isinstance(answer, str):
        return _read(base, answer, None)
    return _Reflection(base, "", answer, "" if answer is not None else "no report")


def _read(base: Trajectory, text: str, sample: Sample | None) -> _Reflection:
    try:
        return _Reflection(base, text, parse_report(text, len(base.steps)), sample=sample)
    except ValueError as problem:
        return _Reflection(base, text, None, str(problem), sample)


def _spec(task: Task, attempt: int, name: str) -> EpisodeSpec:
    return EpisodeSpec(
        f"{task.group_id}/{name}", task.env_id, task.env_seed, task.group_id, attempt
    )


def _spec_like(base: Trajectory, key: str, attempt: int, kind: str) -> EpisodeSpec:
    return EpisodeSpec(key, base.env_id, base.env_seed, base.group_id, attempt, kind)


def _retry_spec(key: str, plan: Plan, attempts: int, prefix: str) -> EpisodeSpec:
    base, pivot = plan.base, plan.pivot
    spec = _spec_like(base, key, base.attempt + attempts, f"{prefix}retry")
    if pivot == 0:
        return spec
    moment = plan.moments[pivot]
    return replace(
        spec, resume=Resume(base.steps[:pivot], moment.turn.observation, moment.snapshot)
    )


def _key(base: Trajectory, name: str) -> str:
    return f"{base.group_id}/{name}-{base.attempt}"


def _played(trajectory: Trajectory) -> list[Sample]:
    """Return the samples that were drawn in this retry, not before it."""
    first = pivot_of(trajectory)
    return [step.sample for step in trajectory.steps[first:] if step.sample is not None]


def pivot_of(trajectory: Trajectory) -> int:
    """Return the step at which a retry began to be played; 0 for other episodes."""
    marked = (n for n, step in enumerate(trajectory.steps) if "retry_of" in step.notes)
    return next(marked, 0)


def _as_without_guidance(agent: ZeroShot, retry: Trajectory) -> Trajectory:
    """Return a retry with the log-probs that its replies have without guidance."""
    samples = _played(retry)
    if samples and all(sample.temperature == 1.0 for sample in samples):
        samples = rescored(agent.model, samples)
    return _with_samples(retry, samples)


def _as_guided(
    retry: Trajectory, samples: Sequence[Sample], key: str, attempt: int, kind: str
) -> Trajectory:
    return replace(_with_samples(retry, samples), key=key, attempt=attempt, kind=kind)


def _with_samples(retry: Trajectory, samples: Sequence[Sample]) -> Trajectory:
    """Put ``samples`` in the place of those that were drawn in this retry."""
    left = iter(samples)
    first = pivot_of(retry)
    steps = [
        replace(step, sample=next(left)) if number >= first and step.sample is not None else step
        for number, step in enumerate(retry.steps)
    ]
    return replace(retry, steps=tuple(steps))


def _reflection_episode(
    agent: ZeroShot, item: _Reflection, offset: int, prefix: str, worth: bool
) -> Trajectory:
    """Return a reflection as an episode of one step; reward 1 if it is worth imitating."""
    base, report, sample = item.base, item.report, item.sample
    if worth and sample is not None and sample.temperature != 1.0:
        (sample,) = rescored(agent.model, [sample])
    notes: dict[str, Any] = {
        "retry_of": base.key,
        "outcome": None if report is None else report.trajectory_outcome,
        "pivot": None if report is None else report.retry_from_step,
        "problem": item.problem,
    }
    text = item.text or (repr(report) if report is not None else "")
    reward = float(worth)
    return replace(
        base,
        key=_key(base, "reflection"),
        attempt=base.attempt + offset,
        kind=f"{prefix}reflection",
        steps=(Step("", text, reward, reward, report is not None, report is None, sample, notes),),
        final_observation="",
        reward=reward,
        score=reward,
        max_score=1.0,
        score_norm=reward,
        success=worth,
        terminated=True,
        truncated="",
        status="ok" if worth else "rejected",
        seconds=0.0,
    )
