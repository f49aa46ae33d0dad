"""vLLM for real, on a CPU: equal to transformers; new weights, adapters, a killed engine."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pz_agents.errors import ModelError
from pz_agents.models import GenerateRequest, load_model
from pz_agents.models.recipe import Recipe
from pz_agents.models.supervised import SupervisedModel
from pz_agents.models.tiny import build_tiny
from pz_agents.models.transformers import TransformersModel
from pz_agents.models.vllm import VllmModel

MESSAGES = [{"role": "user", "content": "You are in a maze of twisty little passages. go where?"}]
ACTIONS = ("go north", "go", "go north east", "take lamp", "x", "", "go north", "open the door")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    build_tiny(home / "tiny", recipe=Recipe(steps=2, puzzles_a_step=4, games_a_step=2))
    build_tiny(home / "other", recipe=Recipe(steps=2, puzzles_a_step=4, seed=1))
    build_tiny(home / "wider", recipe=Recipe(steps=1, puzzles_a_step=4, feed_forward=64))
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> VllmModel:
    model = load_model(f"vllm:{folders['tiny']}?required=true")
    assert isinstance(model, VllmModel)
    return model


@pytest.fixture
def model(engine: VllmModel, folders: dict[str, Path]) -> Iterator[VllmModel]:
    yield engine
    engine.load_weights(folders["tiny"])


def largest_difference(ours: list[Any], theirs: list[Any]) -> float:
    assert [len(a) for a in ours] == [len(b) for b in theirs]
    return float(np.abs(np.concatenate(ours) - np.concatenate(theirs)).max())


def scores(model: Any) -> list[Any]:
    return model.score(model.render(MESSAGES), [model.encode(action) for action in ACTIONS])


def test_scores_are_those_of_transformers(model: VllmModel, folders: dict[str, Path]) -> None:
    reference = TransformersModel(folders["tiny"], device="cpu")
    assert largest_difference(scores(model), scores(reference)) < 1e-3


def test_scoring_reads_the_prefix_once(model: VllmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Any] = []
    answer = model._answer

    async def observed(asked: Any) -> list[Any]:
        found = await answer(asked)
        outputs.extend(found)
        return found

    monkeypatch.setattr(model, "_answer", observed)
    prefix = model.render([{"role": "user", "content": "a long story " * 20}])
    model.score(prefix, [model.encode(action) for action in ACTIONS])
    cached = sum(output.num_cached_tokens for output in outputs)
    read = sum(len(output.prompt_token_ids) for output in outputs)
    assert len(outputs) > len(ACTIONS)
    assert cached / read > 0.8


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_p": 0.5, "top_k": 20}])
def test_log_probs_are_those_before_any_mask(
    model: VllmModel, folders: dict[str, Path], options: dict[str, Any]
) -> None:
    reference = TransformersModel(folders["tiny"], device="cpu")
    prompt = model.render(MESSAGES)
    completions = model.generate([GenerateRequest(prompt, 9, seed, **options) for seed in range(4)])
    for completion in completions:
        ids = torch.tensor(np.concatenate([prompt, completion.token_ids]).astype(np.int64))[None]
        with torch.no_grad():
            logits = reference.network(ids).logits[0, len(prompt) - 1 : -1]
        full = torch.log_softmax(logits.float() / options.get("temperature", 1.0), -1)
        picked = full[torch.arange(len(completion.token_ids)), ids[0, len(prompt) :]].numpy()
        assert largest_difference([completion.log_probs], [picked]) < 1e-3


def test_new_weights_give_the_new_models_answers(
    model: VllmModel, folders: dict[str, Path]
) -> None:
    before = scores(model)
    version = model.version
    other = TransformersModel(folders["other"], device="cpu")
    assert model.load_weights(folders["other"]) == version + 1
    assert largest_difference(scores(model), scores(other)) < 1e-3
    assert largest_difference(scores(model), before) > 0.01
    own = TransformersModel(folders["tiny"], device="cpu")
    assert model.load_state(own.network.state_dict()) == version + 2
    assert largest_difference(scores(model), before) < 1e-4
    greedy = [GenerateRequest(model.render(MESSAGES), 12, 0, 0.0)]
    assert model.generate(greedy)[0].token_ids.tolist() == (
        own.generate(greedy)[0].token_ids.tolist()
    )


def test_weights_that_cannot_be_taken_leave_the_old_ones_whole(
    model: VllmModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    before, version = scores(model), model.version
    own = TransformersModel(folders["other"], device="cpu")
    named_parameters = dict(own.network.named_parameters())  # lacks the tied lm_head
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        model.load_state(named_parameters)
    with pytest.raises(ModelError, match="architecture"):
        model.load_weights(folders["wider"])
    own.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="can be read"):
        model.load_weights(tmp_path)
    assert model.version == version
    assert largest_difference(scores(model), before) == 0


def test_threads_share_the_engine_and_get_their_own_answers(model: VllmModel) -> None:
    prompt = model.render(MESSAGES)
    alone = [model.generate([GenerateRequest(prompt, 12, seed)])[0] for seed in range(6)]
    answers: dict[int, Any] = {}

    def ask(seed: int) -> None:
        answers[seed] = model.generate([GenerateRequest(prompt, 12, seed)])[0]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, completion in enumerate(alone):
        assert answers[seed].token_ids.tolist() == completion.token_ids.tolist()


def hold(model: VllmModel) -> Callable[[], object]:
    """Let nobody begin until what is returned is called: somebody uses the weights, another waits
    to change them, and those who come after wait for that."""
    engine, go = model._engine, asyncio.Event()

    async def use() -> None:
        async with engine.using():
            await go.wait()

    asyncio.run_coroutine_threadsafe(use(), engine._loop)
    asyncio.run_coroutine_threadsafe(engine.changed(lambda: None), engine._loop)
    return lambda: engine._loop.call_soon_threadsafe(go.set)


def test_tasks_and_threads_are_answered_in_the_same_steps(
    model: VllmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.render(MESSAGES)
    asked = [[GenerateRequest(prompt, 12, seed)] for seed in range(8)]
    alone = [model.generate(requests)[0].token_ids.tolist() for requests in asked]
    engine, steps = model._engine.llm.llm_engine, []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(1) or step())

    async def together() -> list[Any]:
        go = hold(model)
        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(model.generate, requests) for requests in asked[:4]]
            tasks = [asyncio.create_task(model.generate_async(requests)) for requests in asked[4:]]
            while len(asyncio.all_tasks(model._engine._loop)) < 2 + len(asked):
                await asyncio.sleep(0.01)
            go()
            found = [await asyncio.wrap_future(each) for each in threads]
            return found + await asyncio.gather(*tasks)

    answers = [found[0].token_ids.tolist() for found in asyncio.run(together())]
    assert answers == alone
    assert len(steps) <= max(map(len, alone)) + 2 < sum(map(len, alone)) / 3


def test_a_cancelled_task_ends_its_requests(
    model: VllmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.render(MESSAGES)
    request = next(
        request
        for request in (GenerateRequest(prompt, 40, seed) for seed in range(50))
        if len(model.generate([request])[0].token_ids) > 10
    )
    engine, began, go = model._engine.llm.llm_engine, threading.Event(), threading.Event()
    step = engine.step

    def waiting() -> Any:
        began.set()
        assert go.wait(300)
        return step()

    async def cancelled() -> None:
        task = asyncio.create_task(model.generate_async([request]))
        assert await asyncio.to_thread(began.wait, 300)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", waiting)
        asyncio.run(cancelled())
        model._engine.wait(asyncio.sleep(0))
    scores(model)
    assert not engine.has_unfinished_requests()


def test_no_answer_is_of_two_versions(model: VllmModel, folders: dict[str, Path]) -> None:
    prompt = model.render(MESSAGES)
    options: Any = {"top_p": 0.9}  # read again afterwards, with the weights that sampled
    asked = [GenerateRequest(prompt, 12, seed, **options) for seed in range(6)]
    state = TransformersModel(folders["other"], device="cpu").network.state_dict()
    own = model.generate(asked)
    model.load_state(state)
    others = model.generate(asked)
    old = model.load_weights(folders["tiny"])
    expected = {old: own, old + 1: others}

    async def while_they_change() -> list[Any]:
        before = [asyncio.create_task(model.generate_async([request])) for request in asked]
        await asyncio.sleep(0)
        loading = asyncio.create_task(asyncio.to_thread(model.load_state, state))
        during = [asyncio.create_task(model.generate_async([request])) for request in asked]
        assert await loading == old + 1
        after = [model.generate_async([request]) for request in asked]
        return [found[0] for found in await asyncio.gather(*before, *during, *after)]

    answers = asyncio.run(while_they_change())
    assert {answer.version for answer in answers[:6]} == {old}
    assert {answer.version for answer in answers[12:]} == {old + 1}
    for number, answer in enumerate(answers):
        wanted = expected[answer.version][number % 6]
        assert answer.token_ids.tolist() == wanted.token_ids.tolist()
        assert largest_difference([answer.log_probs], [wanted.log_probs]) < 1e-4


def test_a_step_that_fails_is_told_to_all_until_weights_are_loaded(
    model: VllmModel, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, prompt = scores(model), model.render(MESSAGES)
    engine = model._engine.llm.llm_engine

    def broken() -> Any:
        raise RuntimeError("out of memory")

    async def ask() -> list[Any]:
        asked = [model.generate_async([GenerateRequest(prompt, 12, seed)]) for seed in range(4)]
        return await asyncio.gather(*asked, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", broken)
        found = asyncio.run(ask())
    assert [type(each) for each in found] == [ModelError] * 4
    assert all("out of memory" in str(each) for each in found)
    with pytest.raises(ModelError, match="engine failed"):
        scores(model)
    assert not engine.has_unfinished_requests()
    model.load_weights(folders["tiny"])
    assert largest_difference(scores(model), before) < 1e-4


def test_sleep_refuses_and_wake_answers(model: VllmModel) -> None:
    before = scores(model)
    model.sleep()
    with pytest.raises(ModelError, match="asleep"):
        scores(model)
    model.wake()
    assert largest_difference(scores(model), before) < 1e-4


def test_a_killed_engine_comes_back_with_the_acknowledged_weights(
    folders: dict[str, Path],
) -> None:
    with SupervisedModel(f"vllm:{folders['tiny']}", backoff_s=0.01) as model:
        model.load_weights(folders["other"])
        before = scores(model)
        os.kill(model.pid, signal.SIGKILL)
        after = scores(model)
        assert (model.restarts, model.version) == (1, 1)
    assert largest_difference(after, before) < 1e-4


def test_an_adapter_is_served_and_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from pz_agents.models.adapters import add_adapter

    adapters = []
    for seed in (1, 2):
        reference = TransformersModel(folders["tiny"], device="cpu")
        add_adapter(reference.network, rank=4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in reference.network.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        reference.save(tmp_path / str(seed))
        adapters.append(reference)
    with SupervisedModel(f"vllm:{tmp_path / '1'}") as model:
        assert largest_difference(scores(model), scores(adapters[0])) < 1e-3
        assert model.load_weights(tmp_path / "2") == 1
        assert largest_difference(scores(model), scores(adapters[1])) < 1e-3
        assert model.load_weights(folders["other"]) == 2
        whole = TransformersModel(folders["other"], device="cpu")
        assert largest_difference(scores(model), scores(whole)) < 1e-3
    assert largest_difference(scores(adapters[0]), scores(adapters[1])) > 0.01
