"""The conformance suite that every family passes: ``check_env``.

Each rule is a function that takes a subject and complains with the rule's name when it is broken.
The suite makes, plays and closes environments, one of them in another process, and leaves nothing
behind. It needs no knowledge of any family: a table row or a factory is enough.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from pz_envs.catalog import find, make_env, register_all
from pz_envs.errors import EnvError, PzError
from pz_envs.seeding import generator
from pz_envs.textenv import INFO_KEYS, Info, TextEnv
from pz_envs.workers import Worker

FUZZ: tuple[str, ...] = (
    "",
    " \t\r\n ",
    "\0",
    "look\0north",
    "look\nnorth\n",
    "\\x\\n\\t",
    "".join(map(chr, range(1, 32))),
    "save",
    "quit",
    "🙂🙃 take 🗝️",
    "打开门，然后向北走",
    "\ud800 lone \udfff",
    "x" * 10_000,
    "(" * 10_000,
    "9" * 10_000,
    "look " * 200_000,
    "<action><action>look</action></action>",
    "<answer><action>1</answer></action>",
    "<think>" * 1000 + "<action>look</action>",
    "<action>" + "<answer>" * 5000,
    "\\boxed{" * 5000 + "1",
    "1/0",
    "-" * 500 + "1",
)
"""Replies that no environment may be harmed by."""

_SCRIPT = ("look", "north", "<action>inventory</action>", "take all", "<answer>1+2</answer>", "e")
_EXPERT_STEPS = 3000
_LIMIT_S = 900.0  # for one id in a process of its own
_ADDRESSES_MB = 1 << 20  # no cap: a Java machine reserves far more than it uses
_GRACE_S = 5.0  # a worker that is asked to end may take a moment
_OTHER_PROCESS = (
    "import json, sys, gymnasium\n"
    "env = gymnasium.make(sys.argv[1])\n"
    "from pz_envs.checks import transcript\n"
    "from pz_envs.textenv import text_env\n"
    "text = json.dumps(transcript(text_env(env), int(sys.argv[2])))\n"
    "env.close()\n"
    "sys.stdout.write('\\n' + text)\n"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked of which environment, what did not apply, and how long it took."""

    name: str
    passed: tuple[str, ...]
    skipped: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Subject:
    name: str
    env_id: str | None
    make: Callable[[], TextEnv]
    seeds: tuple[int, ...]

    @contextmanager
    def opened(self) -> Iterator[TextEnv]:
        env = self.make()
        try:
            yield env
        finally:
            env.close()


class _DoesNotApply(Exception):
    """A rule has nothing to look at in this environment."""


def check_env(env: str | Callable[[], TextEnv], *, seeds: tuple[int, ...] = (0, 1)) -> Report:
    """Hold an environment against every rule.

    Args:
        env: an id of the table, or a function that makes a ``TextEnv`` (rules that need an id, such
            as the one about another process, are then skipped).
        seeds: the episodes that are played.

    Raises:
        EnvError: a rule is broken; the message names it.
        ConfigError: no such id.
    """
    if isinstance(env, str):
        row = find(env)
        subject = _Subject(row.id, row.id, lambda: make_env(row.id), seeds)
    else:
        subject = _Subject(getattr(env, "__name__", repr(env)), None, env, seeds)
    started = time.perf_counter()
    passed: list[str] = []
    skipped: list[str] = []
    for name, rule in RULES.items():
        try:
            rule(subject)
        except _DoesNotApply as reason:
            skipped.append(f"{name}: {reason}")
        except (AssertionError, EnvError) as error:
            raise EnvError(f"{subject.name} breaks the rule `{name}`: {error}") from error
        else:
            passed.append(name)
    return Report(subject.name, tuple(passed), tuple(skipped), time.perf_counter() - started)


class Verdict(NamedTuple):
    """An id and its report, or None and what is wrong."""

    env_id: str
    report: Report | None
    problem: str


class Checker:
    """``check_env`` in a child process, so that an engine that crashes costs one verdict."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # a data root may be named relative to where the user is
        register_all()

    def check(self, env_id: str) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(check_env(env_id))


def check_many(env_ids: Sequence[str], *, jobs: int) -> Iterator[Verdict]:
    """Check several ids in ``jobs`` child processes; yields verdicts as they come.

    Args:
        env_ids: ids of the table whose data are here.
        jobs: how many at a time.
    """
    workers: SimpleQueue[Worker] = SimpleQueue()
    made = [
        Worker(
            "pz_envs.checks:Checker",
            {"folder": os.getcwd()},
            timeout_s=_LIMIT_S,
            memory_mb=_ADDRESSES_MB,
        )
        for _ in range(jobs)
    ]
    for worker in made:
        workers.put(worker)

    def verdict(env_id: str) -> Verdict:
        worker = workers.get()
        try:
            report = worker.call("check", env_id)
        except PzError as error:
            return Verdict(env_id, None, str(error))
        finally:
            workers.put(worker)
        passed, skipped = tuple(report["passed"]), tuple(report["skipped"])
        return Verdict(env_id, Report(env_id, passed, skipped, report["seconds"]), "")

    pool = ThreadPoolExecutor(jobs)
    try:
        for done in as_completed([pool.submit(verdict, env_id) for env_id in env_ids]):
            yield done.result()
    finally:
        for worker in made:
            worker.close()
        pool.shutdown(cancel_futures=True)


def transcript(env: TextEnv, seed: int) -> list[Any]:
    """Play a fixed script from ``reset(seed=seed)``; returns all that came back, as JSON data."""
    observation, info = env.reset(seed=seed)
    return [_plain((observation, info)), *_continue(env, _SCRIPT)]


def _continue(env: TextEnv, actions: tuple[str, ...]) -> list[Any]:
    events: list[Any] = []
    for action in actions:
        result = env.step(action)
        events.append(_plain(result))
        if result[2]:
            break
    return events


def _ended(events: list[Any]) -> bool:
    return bool(events) and bool(events[-1][2])


def _plain(value: Any) -> Any:
    return json.loads(_json(value))


def _json(value: Any) -> str:
    """Return JSON; the arrays that ``extra`` may hold become lists."""

    def listed(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            return part.tolist()
        raise TypeError(f"{type(part).__name__} is neither JSON data nor an array")

    return json.dumps(value, default=listed)


def _need(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def _first_difference(ours: list[Any], theirs: list[Any]) -> str:
    for number, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            return f"at event {number}: {str(left)[:300]} against {str(right)[:300]}"
    return f"{len(ours)} events against {len(theirs)}"


def _gymnasium(subject: _Subject) -> None:
    """Gymnasium's own checker passes."""
    from gymnasium.utils.env_checker import check_env as gymnasium_check

    if subject.env_id is None:
        env: gymnasium.Env[str, str] = subject.make()
    else:
        env = gymnasium.make(subject.env_id)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gymnasium_check(env.unwrapped, skip_render_check=subject.env_id is None)
    finally:
        env.close()


def _check_info(info: Info, steps: int) -> None:
    _need(tuple(sorted(info)) == tuple(sorted(INFO_KEYS)), f"info has the keys {sorted(info)}")
    commands = info["admissible_commands"]
    _need(
        commands is None
        or (isinstance(commands, tuple) and all(isinstance(c, str) for c in commands)),
        f"admissible_commands must be None or a tuple of str, not {commands!r:.200}",
    )
    for key in ("score", "max_score", "score_norm"):
        value = info[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _need(number and math.isfinite(value), f"{key} must be a finite number, not {value!r}")
    _need(info["max_score"] > 0, f"max_score must be above 0, not {info['max_score']}")
    clipped = min(max(info["score"] / info["max_score"], 0.0), 1.0)
    _need(
        math.isclose(info["score_norm"], clipped),
        f"score_norm is {info['score_norm']}, clip(score / max_score, 0, 1) is {clipped}",
    )
    for key in ("success", "valid", "format_error"):
        _need(isinstance(info[key], bool), f"{key} must be a bool, not {info[key]!r}")
    _need(info["steps"] == steps, f"steps is {info['steps']} after {steps} steps")
    for key in ("task_id", "instruction"):
        _need(isinstance(info[key], str) and info[key] != "", f"{key} must be a filled string")
    try:
        _json(info["extra"])
    except (TypeError, ValueError) as error:
        raise AssertionError(f"extra must be plain JSON data or arrays ({error})") from error


def _check_step(result: tuple[Any, ...], steps: int) -> None:
    observation, reward, terminated, truncated, info = result
    _need(isinstance(observation, str), f"an observation must be str, not {type(observation)}")
    _need(
        isinstance(reward, float) and math.isfinite(reward),
        f"a reward must be a finite float, not {reward!r}",
    )
    _need(
        isinstance(terminated, bool) and truncated is False,
        f"terminated must be a bool and truncated False, not {terminated!r}, {truncated!r}",
    )
    _check_info(info, steps)


def _info(subject: _Subject) -> None:
    """Every info has the agreed keys with the agreed types."""
    with subject.opened() as env:
        for seed in subject.seeds:
            observation, info = env.reset(seed=seed)
            _need(isinstance(observation, str), "reset() must return a str")
            _check_info(info, 0)
            for steps, action in enumerate(_SCRIPT, start=1):
                result = env.step(action)
                _check_step(result, steps)
                if result[2]:
                    break


def _same_seed(subject: _Subject) -> None:
    """The same seed gives the same episode: again, in a new environment, after another."""
    with subject.opened() as env, subject.opened() as other:
        for seed in subject.seeds:
            first, again = transcript(env, seed), transcript(env, seed)
            _need(first == again, f"seed {seed} differs, {_first_difference(first, again)}")
            fresh = transcript(other, seed)
            _need(first == fresh, f"seed {seed} differs, {_first_difference(first, fresh)}")


def _other_process(subject: _Subject) -> None:
    """The same seed gives the same episode in another process, made by ``pz_envs:`` id."""
    if subject.env_id is None:
        raise _DoesNotApply("needs an id")
    seed = subject.seeds[0]
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, f"pz_envs:{subject.env_id}", str(seed)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    _need(done.returncode == 0, f"the other process failed: {done.stderr.strip()[-500:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    with subject.opened() as env:
        ours = transcript(env, seed)
    _need(ours == theirs, f"seed {seed} differs, {_first_difference(ours, theirs)}")


def _going_back(subject: _Subject) -> None:
    """A snapshot restores exactly, here and in a new environment; else replay verifies."""
    with subject.opened() as env, subject.opened() as other:
        for seed in subject.seeds:
            if not env.can_snapshot:
                record = _record(env, seed)
                env.replay(record, seed=seed)
                continue
            env.reset(seed=seed)
            start = env.snapshot()
            before = _continue(env, _SCRIPT[:2])
            middle = env.snapshot()
            after = [] if _ended(before) else _continue(env, _SCRIPT[2:])
            other.reset(seed=seed + 1)
            for where in (env, other):
                observation, info = where.restore(middle)
                state = [observation, {**info, "format_error": before[-1][4]["format_error"]}]
                _need(
                    _plain(state) == [before[-1][0], before[-1][4]],
                    f"seed {seed}: restore() gives another state",
                )
                redone = [] if _ended(before) else _continue(where, _SCRIPT[2:])
                _need(
                    redone == after,
                    f"seed {seed}: play after restore() differs, "
                    f"{_first_difference(after, redone)}",
                )
                where.restore(start)
                _need(where.snapshot() == start, f"seed {seed}: snapshot() of a restored state")
        if env.can_snapshot:
            _refuses(lambda: env.restore(b"no snapshot"), "restore() of other bytes")


def _record(env: TextEnv, seed: int) -> list[tuple[str, str]]:
    env.reset(seed=seed)
    record = []
    for action in _SCRIPT:
        observation, _, terminated, _, _ = env.step(action)
        record.append((action, observation))
        if terminated:
            break
    return record


def _fuzzed(subject: _Subject) -> None:
    """No reply crashes the environment or leaves it with anything but a proper step."""
    with subject.opened() as env:
        steps, over = 0, True
        for reply in FUZZ:
            if over:
                env.reset(seed=subject.seeds[0])
                steps = 0
            steps += 1
            try:
                result = env.step(reply)
            except Exception as error:
                raise AssertionError(f"the reply {reply[:60]!a} raised {error!r}") from error
            _check_step(result, steps)
            over = result[2]
        clean = transcript(env, subject.seeds[0])
    with subject.opened() as fresh:
        expected = transcript(fresh, subject.seeds[0])
    _need(clean == expected, f"fuzzed replies left a trace, {_first_difference(expected, clean)}")


def _no_step_out_of_turn(subject: _Subject) -> None:
    """A step before reset() or after the end raises EnvError."""
    with subject.opened() as env:
        _refuses(lambda: env.step("look"), "step() before reset()")
        _, over = _play_expert(env, subject.seeds[0])
        for _ in range(50):
            if over:
                break
            _, _, over, _, _ = env.step("x")
        if not over:
            raise _DoesNotApply("no episode ended within the steps allowed")
        _refuses(lambda: env.step("look"), "step() after the end")


def _refuses(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except EnvError:
        return
    raise AssertionError(f"{what} must raise EnvError")


def _expert(subject: _Subject) -> None:
    """An expert reaches success, or the score that its row claims."""
    claim = None if subject.env_id is None else find(subject.env_id).expert_score
    with subject.opened() as env:
        for seed in subject.seeds:
            info, _ = _play_expert(env, seed)
            if info is None:
                _need(
                    subject.env_id is None or not find(subject.env_id).expert,
                    "the table claims an expert, and there is none",
                )
                raise _DoesNotApply("this environment has no expert")
            if claim is None:
                _need(info["success"], f"seed {seed}: the expert ended at score {info['score']}")
            else:
                _need(
                    info["score"] >= claim,
                    f"seed {seed}: the expert ended at {info['score']}, {claim} was claimed",
                )


def _play_expert(env: TextEnv, seed: int) -> tuple[Info | None, bool]:
    """Return the last info of the expert's episode (None without an expert), and if it ended."""
    env.reset(seed=seed, options={"expert": True})
    info: Info | None = None
    over = False
    for _ in range(_EXPERT_STEPS):
        command = None if over else env.expert_action()
        if command is None:
            break
        _, _, over, _, info = env.step(_reply(env, command))
    return info, over


def _reply(env: TextEnv, command: str) -> str:
    """Wrap a command as the environment's reply format demands."""
    return (
        command if env.reply_format == "auto" else f"<{env.reply_tag}>{command}</{env.reply_tag}>"
    )


def _random_action(subject: _Subject) -> None:
    """A random action, where a family offers one, is well formed and not refused."""
    with subject.opened() as env:
        if type(env).random_action is TextEnv.random_action:
            raise _DoesNotApply("this family has no random_action")
        for seed in subject.seeds:
            env.reset(seed=seed)
            action = env.random_action(generator("check", seed))
            if action is None:
                raise _DoesNotApply("this environment has no random_action")
            info = env.step(_reply(env, action))[4]
            _need(not info["format_error"], f"{action!r} is a format error")


def _nothing_left(subject: _Subject) -> None:
    """After close() no child process is left, and closing twice is no error."""
    if not Path("/proc/self").exists():
        raise _DoesNotApply("child processes can be listed on Linux only")
    before = _children()
    env = subject.make()
    env.reset(seed=subject.seeds[0])
    env.step("look")
    env.close()
    env.close()
    deadline = time.monotonic() + _GRACE_S
    while (left := _children() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    _need(not left, f"processes {sorted(left)} outlive close()")


def _children() -> set[int]:
    """Return the ids of this process's children, but for multiprocessing's own helpers."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            helper = "resource_tracker" in (folder / "cmdline").read_text()
        except (OSError, ValueError, IndexError):
            continue
        if parent == os.getpid() and not helper:
            found.add(int(folder.name))
    return found


RULES: dict[str, Callable[[_Subject], None]] = {
    "gymnasium": _gymnasium,
    "info": _info,
    "same seed": _same_seed,
    "other process": _other_process,
    "going back": _going_back,
    "fuzzed replies": _fuzzed,
    "no step out of turn": _no_step_out_of_turn,
    "expert": _expert,
    "random action": _random_action,
    "nothing left": _nothing_left,
}
"""The rules by name, in the order in which they are checked."""
