"""Engines over vLLM: a fleet's, with several callers at once, and the hybrid's beside a learner."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pz_agents.errors import ModelError
from pz_agents.hybrid.engines import Engine as HybridEngine
from pz_agents.hybrid.settings import HybridSettings
from pz_agents.hybrid.trials import State
from pz_agents.models import GenerateRequest, load_model
from pz_agents.models.adapters import merged_state
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import build_tiny
from pz_agents.rollout.codec import decode
from pz_agents.training.group import Group
from pz_agents.training.worker import Engine, pack_files, plain_request
from tests.support.house import House


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [np.frombuffer(each["token_ids"], np.int32).tolist() for each in answers]


def test_callers_share_a_vllm_engine_whose_weights_come_as_files_and_through_a_group(
    tmp_path: Path,
) -> None:
    build_tiny(tmp_path / "tiny", recipe=Recipe(steps=1, puzzles_a_step=4, games_a_step=1))
    build_tiny(tmp_path / "other", recipe=Recipe(steps=1, puzzles_a_step=4, seed=1))
    models: list[Any] = [load_model(str(tmp_path / name)) for name in ("tiny", "other")]
    packed = [pack_files(model.save) for model in models]
    prompt = models[0].encode("You are in a kitchen.")
    asked = [plain_request(GenerateRequest(prompt, 8, seed)) for seed in range(3)]
    engine = Engine(f"vllm:{tmp_path / 'tiny'}?required=true", 1, 0)
    expected = []
    for version in (0, 1):
        engine.load(packed[version], version)
        expected.append(tokens(engine.generate(asked, version)))
    assert expected[0] != expected[1]

    with socket.create_server(("127.0.0.1", 0)) as meeting, ThreadPoolExecutor(5) as pool:
        place = ["127.0.0.1", meeting.getsockname()[1], "gloo", 120.0]
        joined = pool.submit(engine.join, 1, 2, *place)
        group = Group(0, 2, place[0], meeting, "gloo", 120.0)
        joined.result()
        over = threading.Event()

        def ask() -> list[int]:
            seen: list[int] = []
            while not over.is_set() or len(seen) < 2:
                answers = engine.generate(asked, 0)
                (version,) = {answer["version"] for answer in answers}
                assert tokens(answers) == expected[version % 2]
                seen.append(version)
            return seen

        asking = [pool.submit(ask) for _ in range(3)]
        try:
            for version in (2, 3, 4, 5):
                if version < 4:
                    engine.load(packed[version % 2], version)
                    continue
                state = merged_state(models[version % 2].network)
                kinds = [
                    (name, str(each.dtype).removeprefix("torch."), list(each.shape))
                    for name, each in state.items()
                ]
                received = pool.submit(engine.receive, kinds, version)
                group.send(list(state.values()))
                assert received.result() == version
        finally:
            over.set()
        seen = [each.result() for each in asking]
        assert all(each == sorted(each) and each[-1] == 5 for each in seen)
        group.close()


def test_a_vllm_engine_that_shares_a_gpu_sleeps_while_nothing_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House())
    build_tiny(tmp_path / "tiny", recipe=Recipe(steps=1, puzzles_a_step=4, games_a_step=1))
    source: Any = load_model(str(tmp_path / "tiny"))
    given = {"env": "pz/Detective-v0", "preset": "debug", "steps": 1}
    settings = HybridSettings.model_validate(
        {**given, "vllm_num_engines": 1, "colocate_all": True}
    ).model_dump(mode="json")
    spec = f"vllm:{tmp_path / 'tiny'}?required=true&memory=0.4"
    engine: Any = HybridEngine(settings, spec, 0)
    ids = source.encode("Assistant: <think>")
    seen = "You are in the cellar."
    state = State("s/0", "house", 7, (), seen, ("wait",), "", ids, (1, 2, 3)).plain()
    weights = pack_files(source.save)

    def told(weights: bytes | None) -> list[list[int]]:
        played = [decode(blob) for blob in engine.play([state], 0, weights)]
        return [list(each.steps[0].sample.token_ids) for each in played]

    first = told(weights)
    with pytest.raises(ModelError, match="asleep"):
        engine._model.score(ids, [ids])
    assert told(None) == first
