"""The tiny model: what it is made of, how it is cached, and that it is worth training."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pz_agents.models import load_model, model_identity
from pz_agents.models.muon import orthogonalized
from pz_agents.models.recipe import PUZZLES, RECIPE, Recipe, game_pairs, puzzle_pairs, recipe_hash
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.tiny import build_tiny, tiny_folder, tiny_tokenizer
from pz_agents.prompting import ZeroShot
from pz_agents.sdk.types import Episode, Turn
from pz_envs.countdown.env import CountdownEnv
from pz_envs.countdown.expression import parse_expression
from pz_envs.countdown.puzzles import Puzzle, split_of
from pz_envs.replies import parse_reply

QUICK = Recipe(steps=2, puzzles_a_step=4, games_a_step=2, game_every=1)


def test_a_tag_is_one_token_and_every_text_comes_back() -> None:
    tokenizer = tiny_tokenizer()
    text = "<think>x</think><action>go</action><answer>1</answer>\n\t Na\u00efve \u65e5\u672c"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 6 + len("xgo1\n\t Na\u00efve \u65e5\u672c".encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_its_identity_is_known_without_building_or_importing_torch() -> None:
    program = (
        "import sys; from pz_agents.models import model_identity; print(model_identity('tiny'));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model_identity("tiny") == recipe_hash()
    assert recipe_hash(replace(RECIPE, steps=1)) != recipe_hash()


def test_warm_up_puzzles_are_of_the_train_split_and_solved() -> None:
    for pair in islice(puzzle_pairs(0), 200):
        left, _, target = pair.prompt.rstrip(".").rpartition(". Target: ")
        numbers = tuple(int(n) for n in left.removeprefix("Numbers: ").split())
        puzzle = Puzzle(numbers, int(target))
        assert split_of(puzzle) == "train"
        expression = parse_expression(parse_reply(pair.reply, "answer", "tags").command or "", 0)
        assert expression.value == puzzle.target
        assert sorted(expression.numbers) == sorted(numbers)


def test_warm_up_prompts_are_those_that_the_agent_makes() -> None:
    env = CountdownEnv(split="train", **PUZZLES)
    observation, info = env.reset(seed=4)
    model = ScriptedModel(["x"])
    turn = Turn(Episode("e", "", 4, env=env), 0, observation, info, 0.0, 1)
    [action] = ZeroShot(model).act([turn])
    assert action.sample is not None
    [message] = model.messages(action.sample.prompt_ids)
    shape = re.compile(r"Numbers: \d+ \d+ \d+\. Target: \d+\.")
    assert shape.fullmatch(message["content"])
    assert all(shape.fullmatch(pair.prompt) for pair in islice(puzzle_pairs(0), 50))


def test_warm_up_games_choose_a_listed_number() -> None:
    for pair in islice(game_pairs(0), 200):
        number = int(parse_reply(pair.reply, "action", "tags").command or "")
        assert f"\n{number} " in pair.prompt
        assert len(pair.prompt) <= 260


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, recipe in (("a", QUICK), ("b", QUICK), ("c", replace(QUICK, seed=1))):
        build_tiny(tmp_path / name, recipe=recipe)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_is_built_once_and_found_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    steps: list[int] = []

    def ask(_: int) -> Path:
        return tiny_folder(recipe=QUICK, on_progress=lambda step, total, loss: steps.append(step))

    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(ask, range(2)))
    assert steps == [1, 2]
    [folder] = folders
    assert folder.parent.parent == tmp_path
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


def test_a_build_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    def stop(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tiny(tmp_path / "tiny", recipe=QUICK, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_muon_updates_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert 0.6 < values.min() < values.max() < 1.3


@pytest.mark.slow
def test_it_solves_some_held_out_puzzles_and_leaves_room() -> None:
    agent = ZeroShot(load_model("tiny", device="cpu"))
    solved = valid = 0
    environments = [CountdownEnv(split="test", **PUZZLES) for _ in range(256)]
    turns = []
    for seed, env in enumerate(environments):
        observation, info = env.reset(seed=seed)
        episode = Episode(str(seed), "pz/Countdown-v0", seed, env=env)
        turns.append(Turn(episode, 0, observation, info, 0.0, seed))
    for env, action in zip(environments, agent.act(turns), strict=True):
        *_, info = env.step(action.text)
        solved += info["success"]
        valid += not info["format_error"]
    assert valid >= 0.95 * 256
    assert 0.1 * 256 < solved < 0.6 * 256


@pytest.mark.slow
def test_it_chooses_listed_commands() -> None:
    model = load_model("tiny", device="cpu")
    agent = ZeroShot(model)
    commands = ("north", "open mailbox", "take the lamp", "go around the house", "wait")
    observation = "West of House\nYou stand in an open field. There is a small mailbox here."
    info = {"admissible_commands": commands, "instruction": ""}
    turns = [
        Turn(Episode(str(i), "pz/Zork1-v0", i), 0, observation, info, 0.0, i) for i in range(64)
    ]
    chosen = [parse_reply(a.text, "action", "tags").command for a in agent.act(turns)]
    assert np.mean([command in commands for command in chosen]) > 0.7
    assert len(set(chosen) & set(commands)) >= 3
