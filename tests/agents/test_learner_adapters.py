"""Adapters and bfloat16: what learns, what plays, what is saved."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_cases import (
    RECIPE,
    gradients,
    loss_of,
    network,
    own_log_probs,
    random_rows,
    updater,
)
from transformers import AutoModelForCausalLM

from pz_agents.errors import ModelError
from pz_agents.models import GenerateRequest, load_model
from pz_agents.models.adapters import add_adapter, has_adapter, merged_state, without_adapter
from pz_agents.models.tiny import tiny_tokenizer
from pz_agents.models.transformers import TransformersModel
from pz_agents.training.update import Updater, autocast_type
from pz_envs.errors import ConfigError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("micro") / "model"
    network(0).save_pretrained(path)
    tiny_tokenizer(RECIPE.context).save_pretrained(path)
    return path


# Adapters


def test_only_the_adapter_learns_and_the_first_pass_is_on_policy(folder):
    policy = TransformersModel(folder)
    rows = own_log_probs(policy.network, random_rows())
    before = {name: tensor.clone() for name, tensor in policy.network.state_dict().items()}
    one = updater(policy.network, lora_rank=4)
    step = one.step_rows(rows)
    one.accumulate(step)
    metrics = one.before_update()
    one.optimizer.step()
    assert metrics["engine_gap"] <= 1e-5
    trained = sum(p.numel() for p in policy.network.parameters() if p.requires_grad)
    assert trained == sum(
        p.numel() for group in one.optimizer.param_groups for p in group["params"]
    )
    after = policy.network.state_dict()
    for name, tensor in after.items():
        plain = name.replace(".base_layer.", ".")
        if "lora_" not in name:
            assert torch.equal(tensor, before[plain])
    assert any(tensor.abs().max() > 0 for name, tensor in after.items() if "lora_B" in name)


def taught(folder, **changes) -> tuple[TransformersModel, Updater]:
    """A policy with an adapter that two updates have changed."""
    policy = TransformersModel(folder)
    one = updater(policy.network, lora_rank=4, learning_rate=0.05, **changes)
    for seed in range(2):
        one.accumulate(one.step_rows(own_log_probs(policy.network, random_rows(seed=seed))))
        one.before_update()
        one.optimizer.step()
        policy.network.zero_grad()
    return policy, one


def replies(policy) -> list[list[int]]:
    requests = [
        GenerateRequest(np.arange(20, 30, dtype=np.int32), max_new_tokens=12, seed=seed)
        for seed in range(6)
    ]
    return [completion.token_ids.tolist() for completion in policy.generate(requests)]


def test_the_model_that_plays_sees_the_adapter_in_place_saved_and_merged(folder, tmp_path):
    start = replies(TransformersModel(folder))
    policy, _ = taught(folder)
    expected = replies(policy)
    assert expected != start

    policy.save(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (folder / "model.safetensors").stat().st_size / 2
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = load_model(str(tmp_path / "adapter"))
    assert replies(loaded) == expected

    merged = TransformersModel(folder)
    merged.load_weights(tmp_path / "adapter")
    assert not has_adapter(merged.network)
    assert replies(merged) == expected
    state = merged_state(policy.network)
    assert state.keys() == network().state_dict().keys()
    rows = own_log_probs(policy.network, random_rows())
    plain = network(5)
    plain.load_state_dict(state)
    for row, other in zip(rows, own_log_probs(plain, rows), strict=True):
        np.testing.assert_allclose(row.log_probs, other.log_probs, atol=1e-5)


def test_learning_goes_on_from_a_saved_adapter_bit_for_bit(folder, tmp_path):
    policy, one = taught(folder)
    policy.save(tmp_path / "policy")
    rows = own_log_probs(policy.network, random_rows(seed=7))

    again = TransformersModel(folder)
    other = updater(again.network, lora_rank=4, learning_rate=0.05)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    again.load_state(saved.state_dict())
    other.load_state(one.state(), copy.deepcopy(one.optimizer.state_dict()))
    for each in (one, other):
        each.accumulate(each.step_rows(rows))
        each.before_update()
        each.optimizer.step()
    left, right = policy.network.state_dict(), again.network.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_module_without_its_adapter_can_be_the_reference(folder):
    policy, _ = taught(folder)
    rows = own_log_probs(policy.network, random_rows())
    start = TransformersModel(folder).network
    found = []
    for reference in (policy.network, start):
        one = updater(policy.network, loss=loss_of(beta=0.5), reference=reference)
        one.accumulate(one.step_rows(rows))
        found.append((gradients(policy.network), one.before_update()["kl"]))
        policy.network.zero_grad()
    assert found[0][1] > 1e-4
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-4)


def test_an_adapter_begins_as_nothing_and_the_same_each_time():
    plain, first, second = network(), network(), network()
    random = torch.get_rng_state()
    add_adapter(first, 4, seed=1)
    add_adapter(second, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    left, right = first.state_dict(), second.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    ids = torch.arange(8)[None]
    with torch.no_grad(), without_adapter(first):
        assert torch.equal(first(ids).logits, plain(ids).logits)
    with torch.no_grad():
        assert torch.equal(first(ids).logits, plain(ids).logits)


def test_an_adapter_without_peft_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'pz-agents\[train\]'"):
        updater(network(), lora_rank=4)


# bfloat16


def test_bfloat16_products_leave_weights_log_probs_and_loss_in_float32():
    rows = own_log_probs(network(), random_rows())
    found = {}
    for precision in ("float32", "bfloat16"):
        module = network()
        one = updater(module, precision=precision)
        value = one.accumulate(one.step_rows(rows))
        found[precision] = (value, gradients(module), one.before_update())
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert value.dtype == found[precision][1].dtype == torch.float32
    exact, rough = found["float32"], found["bfloat16"]
    assert 0 < (exact[1] - rough[1]).norm() / exact[1].norm() < 0.05
    assert 1e-6 < rough[2]["engine_gap"] < 0.1


def test_a_sampler_with_bfloat16_products_agrees_with_such_a_learner(folder):
    policy = TransformersModel(folder)
    one = updater(policy.network, precision="bfloat16")
    policy.autocast = one.autocast
    prompt = np.arange(20, 30, dtype=np.int32)
    (reply,) = policy.generate([GenerateRequest(prompt, max_new_tokens=12, seed=0)])
    assert reply.log_probs.dtype == np.float32
    ids = np.concatenate([prompt, reply.token_ids])
    mask = np.arange(len(ids)) >= len(prompt)
    log_probs = np.concatenate([np.zeros(len(prompt)), reply.log_probs]).astype(np.float32)
    row = replace(
        random_rows((len(ids),))[0],
        ids=ids,
        mask=mask,
        log_probs=log_probs,
        advantages=mask.astype(np.float32),
    )
    one.accumulate(one.step_rows([row]))
    assert one.before_update()["engine_gap"] < 0.05


def test_weights_in_bfloat16_are_trained_in_float32_and_an_adapters_base_stays():
    whole_model, adapted = network().bfloat16(), network().bfloat16()
    updater(whole_model, precision="bfloat16")
    assert {p.dtype for p in whole_model.parameters()} == {torch.float32}
    one = updater(adapted, precision="bfloat16", lora_rank=4)
    kept = {p.requires_grad: p.dtype for p in adapted.parameters()}
    assert kept == {True: torch.float32, False: torch.bfloat16}
    value = one.accumulate(one.step_rows(random_rows()))
    assert torch.isfinite(value)
    assert torch.isfinite(gradients(adapted)).all()


def test_precision_auto_is_float32_without_cuda_and_bfloat16_is_refused_where_there_is_none():
    assert autocast_type("auto", torch.device("cpu")) is None
    assert autocast_type("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ModelError, match=r"\(meta\) has no bfloat16; set `precision`"):
        autocast_type("bfloat16", torch.device("meta"))
