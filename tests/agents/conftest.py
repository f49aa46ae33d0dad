"""The one-layer model that the tests of whole runs start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "model"
    torch.manual_seed(0)
    recipe = Recipe(layers=1, hidden=32, key_value_heads=1, feed_forward=32, context=128)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder)
    tiny_tokenizer(recipe.context).save_pretrained(folder)
    return folder
