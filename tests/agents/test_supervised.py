"""Engines that are killed, hang, or fail half-way through new weights, for real."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from faulty_engine import BigramModel, write_bigram

from pz_agents.errors import EngineMissing, ModelError
from pz_agents.models import GenerateRequest, load_model, model_identity
from pz_agents.models.supervised import SupervisedModel
from pz_agents.models.transformers import TransformersModel

MESSAGES = [{"role": "user", "content": "go where?"}]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigram(tmp_path_factory.mktemp("first") / "model", seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigram(tmp_path_factory.mktemp("other") / "model", seed=2)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def engine(first: Path, control: Path) -> Iterator[SupervisedModel]:
    with SupervisedModel(
        f"{first}|{control}", factory="faulty_engine:load", backoff_s=0.01, retries=2
    ) as model:
        yield model


def requests(model: Any, count: int = 4) -> list[GenerateRequest]:
    return [GenerateRequest(model.render(MESSAGES), 20, seed) for seed in range(count)]


def tokens(completions: list[Any]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def answers_as(model: Any, reference: Any) -> bool:
    """Return whether ``model`` has exactly the reference's weights, as far as scores tell."""
    prefix = reference.render(MESSAGES)
    candidates = [reference.encode(text) for text in ("go north", "look", "take all")]
    pairs = zip(model.score(prefix, candidates), reference.score(prefix, candidates), strict=True)
    return all(np.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)


def kill_when_hanging(control: Path) -> threading.Thread:
    def wait_and_kill() -> None:
        marker = control / "hanging"
        end = time.monotonic() + 120
        while not (marker.exists() and marker.read_text()) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(int(marker.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_an_engine_killed_while_it_generates_is_replaced_at_its_version(
    engine: SupervisedModel,
    other: Path,
    control: Path,
) -> None:
    assert engine.load_weights(other) == 1
    (control / "hang").touch()
    killer = kill_when_hanging(control)
    completions = engine.generate(requests(engine))
    killer.join()
    assert tokens(completions) == tokens(BigramModel(other).generate(requests(engine)))
    assert {completion.version for completion in completions} == {1}
    assert engine.restarts == 1
    assert answers_as(engine, BigramModel(other))


def test_transformers_killed_while_they_generate_give_the_same_samples(
    micro: Path, control: Path
) -> None:
    spec = f"{micro}|{control}"
    with SupervisedModel(spec, device="cpu", factory="faulty_engine:load") as engine:
        (control / "hang").touch()
        killer = kill_when_hanging(control)
        completions = engine.generate(requests(engine))
        killer.join()
        assert engine.restarts == 1
        reference = TransformersModel(micro, device="cpu")
        assert tokens(completions) == tokens(reference.generate(requests(engine)))


def test_an_engine_that_hangs_is_killed_and_replaced(first: Path, control: Path) -> None:
    with SupervisedModel(
        f"{first}|{control}", factory="faulty_engine:load", backoff_s=0.01, timeout_s=15
    ) as engine:
        (control / "hang").touch()
        completions = engine.generate(requests(engine))
        assert tokens(completions) == tokens(BigramModel(first).generate(requests(engine)))
        assert engine.restarts == 1
        hung = int((control / "hanging").read_text())
        assert not psutil.pid_exists(hung)


def test_weights_that_half_arrived_are_loaded_again_whole(
    engine: SupervisedModel,
    other: Path,
    control: Path,
) -> None:
    (control / "die-loading").touch()
    assert engine.load_weights(other) == engine.version == 1
    assert engine.restarts == 1
    assert answers_as(engine, BigramModel(other))


@pytest.mark.parametrize("fault", ["always-die-loading", "always-raise-loading"])
def test_weights_that_never_arrive_leave_the_old_version_whole(
    engine: SupervisedModel,
    first: Path,
    other: Path,
    control: Path,
    fault: str,
) -> None:
    (control / fault).touch()
    with pytest.raises(ModelError):
        engine.load_weights(other)
    (control / fault).unlink()
    assert engine.version == 0
    assert answers_as(engine, BigramModel(first))
    assert engine.load_weights(other) == 1
    assert answers_as(engine, BigramModel(other))


def test_acknowledged_weights_outlive_their_folder(
    engine: SupervisedModel,
    other: Path,
    tmp_path: Path,
) -> None:
    published = shutil.copytree(other, tmp_path / "published")
    engine.load_weights(published)
    shutil.rmtree(published)
    os.kill(engine.pid, signal.SIGKILL)
    assert answers_as(engine, BigramModel(other))


def test_an_engine_that_dies_every_time_is_given_up_by_name(
    engine: SupervisedModel, control: Path
) -> None:
    (control / "always-die-loading").touch()
    with pytest.raises(ModelError, match="lost 3 times in `load_weights`"):
        engine.load_weights(Path(engine._worker.kwargs["spec"].partition("|")[0]))


def test_a_request_that_is_refused_is_not_repeated(engine: SupervisedModel) -> None:
    pid = engine.pid
    with pytest.raises(ModelError, match="does not fit"):
        engine.generate([GenerateRequest(engine.render(MESSAGES), 10_000, 1)])
    with pytest.raises(ModelError, match="No weights"):
        engine.load_weights(Path("/nowhere"))
    assert (engine.restarts, engine.pid) == (0, pid)


def test_closing_ends_the_process(first: Path, control: Path) -> None:
    model = SupervisedModel(f"{first}|{control}", factory="faulty_engine:load")
    pid = model.pid
    assert psutil.pid_exists(pid)
    model.close()
    assert not psutil.pid_exists(pid)


def test_a_model_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(ModelError, match="No model"):
        load_model("supervised:/nowhere/at/all")


def test_without_vllm_transformers_serve_unless_it_is_required(
    micro: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pz_agents.models.vllm.available", lambda: False)
    model = load_model(f"vllm:{micro}", device="cpu")
    assert isinstance(model, TransformersModel)
    assert [record.message for record in caplog.records] == [
        f"vLLM is not installed; transformers serves {micro} instead"
    ]
    with pytest.raises(EngineMissing, match="pip install"):
        load_model(f"vllm:{micro}?required=true")
    with pytest.raises(ModelError, match="Did you mean `required`"):
        load_model(f"vllm:{micro}?requird=true")


def test_a_demanded_engine_that_is_missing_exits_3(
    micro: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pz_agents import cli

    monkeypatch.setattr("pz_agents.models.vllm.available", lambda: False)
    words = ["pz-agents", "serve", "--model", f"vllm:{micro}?required=true"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "pip install" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_identity_is_of_the_weights_and_of_who_samples(micro: Path) -> None:
    assert model_identity(f"supervised:{micro}") == model_identity(str(micro))
    assert model_identity(f"vllm:{micro}?batch=8") == model_identity(f"vllm:{micro}")
    assert model_identity(f"vllm:{micro}") != model_identity(str(micro))
