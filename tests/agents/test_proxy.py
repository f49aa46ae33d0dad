"""Agents from elsewhere: what they say through the proxy is kept, token for token."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest

from pz_agents.algorithms.rows import rows_of
from pz_agents.errors import AgentError
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.transformers import TransformersModel
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk import check_agent, load_agent, needs_model
from pz_agents.sdk.proxy import RecordingProxy, all_samples, recorded_action
from pz_agents.sdk.types import Trajectory
from pz_envs.catalog import make_env

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_agent.py"
MESSAGES: Any = [{"role": "user", "content": "go north or south?"}]

PLAYER = """
import json, os, sys, urllib.request

def ask(messages):
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"messages": messages, "max_tokens": 8, "temperature": 0.5}).encode(),
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
    )
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]

messages = []
for line in sys.stdin:
    turn = json.loads(line)
    if turn["done"]:
        break
    messages.append({"role": "user", "content": turn["observation"][:12]})
    for _ in range(CALLS):
        reply = ask(messages)
    messages.append({"role": "assistant", "content": reply})
    print("thinking about", turn["turn"])
    print(json.dumps({"action": reply or "look"}), flush=True)
"""


@pytest.fixture(scope="module")
def model(micro: Path) -> TransformersModel:
    return TransformersModel(micro, device="cpu", name="micro")


@pytest.fixture
def proxy(model: TransformersModel) -> Iterator[RecordingProxy]:
    with RecordingProxy(model) as proxy:
        yield proxy


def program(folder: Path, source: str) -> str:
    path = folder / "player.py"
    path.write_text(source)
    return f"external:{sys.executable} {path}"


def play(agent: Any, count: int = 2, turns: int = 3) -> list[Trajectory]:
    episodes = run_episodes(
        agent,
        [EpisodeSpec(str(number), "pz/Sokoban-v0", number) for number in range(count)],
        make_env=partial(make_env, split="eval"),
        limits=Limits(turns=turns, invalid_streak=50, repeats=50),
        seed=0,
    )
    return sorted(episodes, key=lambda trajectory: trajectory.key)


def test_calls_are_told_apart_by_their_session(
    proxy: RecordingProxy, model: TransformersModel
) -> None:
    recordings = [proxy.open(), proxy.open()]
    for number, recording in enumerate(recordings):
        client = openai.OpenAI(base_url=recording.url, api_key="whatever", max_retries=0)
        for _ in range(number + 1):
            client.chat.completions.create(model="micro", messages=MESSAGES, max_tokens=4)
    calls = [recording.take() for recording in recordings]
    assert [len(each) for each in calls] == [1, 2]
    assert [len(recording.take()) for recording in recordings] == [0, 0]
    call = calls[0][0]
    assert call.prompt_ids.tolist() == model.render(MESSAGES).tolist()
    [score] = model.score(call.prompt_ids, [call.completion.token_ids])
    np.testing.assert_allclose(call.completion.log_probs, score, atol=1e-4)


def test_the_key_alone_names_the_session_and_a_closed_one_is_refused(
    proxy: RecordingProxy,
) -> None:
    recording = proxy.open()
    base = recording.url.replace(f"/s/{recording.key}", "")
    client = openai.OpenAI(base_url=base, api_key=recording.key, max_retries=0)
    client.completions.create(model="micro", prompt="x", max_tokens=2)
    assert len(recording.take()) == 1
    recording.close()
    for key in (recording.key, "none"):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key=key, max_retries=0).models.list()


def test_a_turns_seed_decides_its_samples(proxy: RecordingProxy) -> None:
    recording = proxy.open()
    client = openai.OpenAI(base_url=recording.url, api_key=recording.key, max_retries=0)

    def turn(seed: int) -> list[list[int]]:
        recording.begin(seed)
        for _ in range(2):
            client.chat.completions.create(model="micro", messages=MESSAGES, max_tokens=6)
        return [call.completion.token_ids.tolist() for call in recording.take()]

    first, other, again = turn(1), turn(2), turn(1)
    assert first == again
    assert first != other
    assert first[0] != first[1]


def test_an_episode_of_a_program_becomes_one_training_row(
    model: TransformersModel, tmp_path: Path
) -> None:
    agent = load_agent(program(tmp_path, PLAYER.replace("CALLS", "1")), model=model)
    for trajectory in play(agent):
        assert (trajectory.status, len(trajectory.steps)) == ("ok", 3)
        for step in trajectory.steps:
            assert step.sample is not None
            assert step.sample.temperature == 0.5
            assert len(step.sample.token_ids) == len(step.sample.log_probs) > 0
        # The reply that the program sent back as text is continued from its sampled ids.
        for before, after in zip(trajectory.steps, trajectory.steps[1:], strict=False):
            assert before.sample is not None
            assert after.sample is not None
            begun = [*before.sample.prompt_ids.tolist(), *before.sample.token_ids.tolist()]
            assert after.sample.prompt_ids.tolist()[: len(begun)] == begun
        assert len(rows_of(trajectory, 1.0)) == 1


def test_the_same_run_gives_the_same_episodes(model: TransformersModel, tmp_path: Path) -> None:
    spec = program(tmp_path, PLAYER.replace("CALLS", "1"))
    runs = [play(load_agent(spec, model=model)) for _ in range(2)]
    actions = [[[step.action for step in each.steps] for each in run] for run in runs]
    assert actions[0] == actions[1]


def test_every_call_of_a_turn_is_kept(model: TransformersModel, tmp_path: Path) -> None:
    agent = load_agent(program(tmp_path, PLAYER.replace("CALLS", "3")), model=model)
    [trajectory] = play(agent, count=1, turns=2)
    assert [step.notes["calls"] for step in trajectory.steps] == [3, 3]
    samples = all_samples(trajectory)
    assert len(samples) == 6
    assert trajectory.sampled_tokens == sum(len(sample.token_ids) for sample in samples)
    assert trajectory.prompt_tokens == sum(len(sample.prompt_ids) for sample in samples)
    assert json.loads(json.dumps(dict(trajectory.steps[0].notes)))


def test_a_turn_without_a_call_has_no_sample() -> None:
    assert recorded_action("look", []).sample is None


def test_a_program_keeps_the_agents_contract(tmp_path: Path) -> None:
    agent = load_agent(
        program(tmp_path, PLAYER.replace("CALLS", "1")), model=ScriptedModel(["1 + 2", "3"])
    )
    check_agent(agent)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import time; print('hm', flush=True); time.sleep(600)", "did not answer.*It wrote: hm"),
        ("import sys; sys.exit('no key')", "ended in turn 0.*exit code 1.*no key"),
        ("raise SystemExit(0)", "ended in turn 0.*exit code 0"),
    ],
)
def test_a_program_that_hangs_or_dies_fails_its_episode(
    tmp_path: Path, source: str, complaint: str
) -> None:
    agent = load_agent(
        program(tmp_path, source), model=ScriptedModel(["x"]), kwargs={"turn_seconds": 15}
    )
    [trajectory] = play(agent, count=1)
    assert trajectory.status == "failed"
    with pytest.raises(AgentError, match=complaint):
        raise AgentError(trajectory.error)


def test_one_programs_fault_is_its_own_and_nothing_is_left(tmp_path: Path) -> None:
    source = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    turn = json.loads(line)
    if turn["done"]:
        break
    open(os.environ["SEEN"], "a").write(f"{os.getpid()} {turn['turn']}\\n")
    try:
        os.close(os.open(os.environ["SEEN"] + ".first", os.O_CREAT | os.O_EXCL))
        first = True
    except FileExistsError:
        first = False
    if first:
        child = subprocess.Popen(["sleep", "600"])
        open(os.environ["SEEN"] + ".child", "w").write(str(child.pid))
        time.sleep(600)
    print(json.dumps({"action": "nonsense"}), flush=True)
"""
    seen = tmp_path / "seen"
    command = program(tmp_path, source).replace("external:", f"external:env SEEN={seen} ")
    agent = load_agent(command, model=ScriptedModel(["x"]), kwargs={"turn_seconds": 20})
    played = play(agent, count=3, turns=2)
    assert sorted(each.status for each in played) == ["failed", "ok", "ok"]
    lines = seen.read_text().splitlines()
    assert len(lines) == len(set(lines)), "a turn was told twice"
    pids = {int(line.split()[0]) for line in lines} | {int(Path(f"{seen}.child").read_text())}
    assert not [pid for pid in pids if psutil.pid_exists(pid) and _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_command_that_is_none_is_refused() -> None:
    for command, complaint in (("", "names no program"), ("no-such-program x", "No program")):
        with pytest.raises(AgentError, match=complaint):
            load_agent(f"external:{command}", model=ScriptedModel(["x"]))
    assert needs_model("external:anything")
    with pytest.raises(AgentError, match="needs a language model"):
        load_agent(f"external:{sys.executable}")


def test_nobody_else_is_answered(proxy: RecordingProxy) -> None:
    root = proxy.open().url.partition("/s/")[0]
    request = urllib.request.Request(f"{root}/v1/completions", b'{"prompt": "x"}')
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=60)


def test_the_example_appears_in_a_table(tmp_path: Path) -> None:
    from pz_bench.cli import main

    command = f"external:{sys.executable} {EXAMPLE}"
    runs, out = tmp_path / "runs", tmp_path / "out"
    arguments = ["-a", command, "-e", "pz/Countdown-v0", "--model", "scripted:1 + 1|2"]
    assert main(["run", *arguments, "-n", "2", "--runs", str(runs), "--out", str(out)]) == 0
    [table] = out.glob("*.md")
    text = table.read_text().replace("\\", "")
    assert f"external:{Path(sys.executable).name} openai_agent.py" in text
    assert str(EXAMPLE.parent) not in text
    [log] = runs.rglob("episodes.jsonl")
    episodes = [json.loads(line) for line in log.read_text().splitlines()]
    assert [episode["status"] for episode in episodes] == ["ok", "ok"]
    assert all(episode["sampled_tokens"] > 0 for episode in episodes)
    assert episodes[0]["steps"][0]["pieces"]
