"""The conformance suite passes what is sound and names the rule that something breaks."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from pz_envs import EnvError, Outcome, TextEnv, checks, find, missing
from pz_envs.checks import RULES, _nothing_left, _Subject, check_env, check_many
from pz_envs.countdown.env import CountdownEnv

_CALLS = itertools.count()


class Moody(CountdownEnv):
    """Its first observation differs each time."""

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        outcome = super()._start(seed, options)
        return Outcome(f"{outcome.observation} {next(_CALLS)}", outcome.score)


class Fragile(CountdownEnv):
    """Falls over a zero byte."""

    def _advance(self, command: str) -> Outcome:
        if "\0" in command:
            raise ValueError("embedded null byte")
        return super()._advance(command)


class Forgetful(CountdownEnv):
    """Its snapshots leave out the tries that were used."""

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        super()._load(engine, header)
        self._used = 0


class Boastful(CountdownEnv):
    """Its expert is none."""

    def expert_action(self) -> str | None:
        return None if super().expert_action() is None else "1+1"


class Chatty(CountdownEnv):
    """Adds an info key of its own."""

    def _info(self, outcome: Outcome, *, format_error: bool) -> dict[str, Any]:
        return {**super()._info(outcome, format_error=format_error), "mood": "fine"}


class Careless(CountdownEnv):
    """Leaves a process behind."""

    children: list[subprocess.Popen[bytes]] = []  # noqa: RUF012

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self.children.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1))
        return super()._start(seed, options)


class Endless(CountdownEnv):
    """Steps on after the end."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._outcome is not None and self._outcome.terminated:
            return "still here", 0.0, True, False, self._info(self._outcome, format_error=False)
        return super().step(action)


def test_countdown_passes_every_rule() -> None:
    report = check_env("pz/Countdown-v0")
    assert report.passed == tuple(RULES)
    assert report.skipped == ()


@pytest.mark.data
def test_a_game_passes_every_rule() -> None:
    pytest.importorskip("jericho")
    lack = missing(find("pz/Detective-v0"))
    if lack is not None:
        pytest.skip(lack)
    report = check_env("pz/Detective-v0", seeds=(0,))
    assert set(RULES) - set(report.passed) == {"random action"}


@pytest.mark.parametrize("kwargs", [{"tries": 5}, {"reply_format": "tags", "tries": 2}])
def test_a_factory_is_checked_but_for_other_processes(kwargs: dict[str, Any]) -> None:
    def countdown() -> TextEnv:
        return CountdownEnv(**kwargs)

    report = check_env(countdown)
    assert report.name == "countdown"
    assert set(RULES) - set(report.passed) == {"other process"}


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Moody, "same seed"),
        (Chatty, "info"),
        (lambda: Forgetful(tries=3), "going back"),
        (Fragile, "fuzzed replies"),
        (Endless, "no step out of turn"),
        (Boastful, "expert"),
    ],
)
def test_a_broken_rule_is_named(broken: Any, rule: str) -> None:
    with pytest.raises(EnvError, match=f"breaks the rule `{rule}`"):
        check_env(broken)


def test_several_are_checked_at_a_time_and_one_that_cannot_run_is_a_verdict() -> None:
    ids = ("pz/Countdown-v0", "pz/Countdwn-v0", "pz/NumberLine-v0")
    verdicts = {verdict.env_id: verdict for verdict in check_many(ids, jobs=2)}
    assert set(verdicts) == set(ids)
    report = verdicts["pz/Countdown-v0"].report
    assert report is not None
    assert report.passed == tuple(RULES)
    assert verdicts["pz/Countdwn-v0"].report is None
    assert "Did you mean `pz/Countdown-v0`" in verdicts["pz/Countdwn-v0"].problem


def test_a_process_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_GRACE_S", 0.2)
    try:
        with pytest.raises(AssertionError, match="outlive close"):
            _nothing_left(_Subject("careless", None, Careless, (0,)))
    finally:
        for child in Careless.children:
            child.kill()
            child.communicate()
