"""The one-layer model that the tests of whole runs start from, and the runtimes they have."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.runtime import open_runtime


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "model"
    torch.manual_seed(0)
    recipe = Recipe(layers=1, hidden=32, key_value_heads=1, feed_forward=32, context=128)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder)
    tiny_tokenizer(recipe.context).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["local", "ray"])
def runtime_name(request):
    """Both runtimes; Ray is started once for all the tests of a file."""
    if request.param == "local":
        yield "local"
        return
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    handler = signal.getsignal(signal.SIGTERM)
    session = open_runtime("ray", cpus=2)
    assert signal.getsignal(signal.SIGTERM) is handler, "Ray's own exits without a checkpoint"
    yield "ray"
    session.close()


@pytest.fixture
def runtime(runtime_name):
    with contextlib.closing(open_runtime(runtime_name)) as opened:
        yield opened
