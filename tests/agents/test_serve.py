"""The OpenAI-compatible server, asked with the openai client and with raw HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pz_agents.errors import ModelError
from pz_agents.models import GenerateRequest, load_model
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.transformers import TransformersModel
from pz_agents.serving import ModelServer

MESSAGES: Any = [{"role": "user", "content": "go north or south?"}]
CHAT = json.dumps(MESSAGES).encode()


class Counting(ScriptedModel):
    """Notes the size of every batch; the first batch waits until the others have come."""

    def __init__(self) -> None:
        super().__init__(["north", "south", "east"])
        self.batches: list[int] = []
        self.go = threading.Event()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        self.batches.append(len(requests))
        assert self.go.wait(60)
        return super().generate(requests)


class Sharing(ScriptedModel):
    """Shares its batches as vLLM does: it answers when four are asking, or scoring, at once."""

    shares_batches = True

    def __init__(self) -> None:
        super().__init__(["north", "south", "east"])
        self.meeting = threading.Barrier(4, timeout=60)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        self.meeting.wait()
        return super().generate(requests)

    def score(self, prefix_ids: Any, candidates: Sequence[Any]) -> list[Any]:
        self.meeting.wait()
        return [np.full(len(candidate), -1.0, np.float32) for candidate in candidates]


class Endless(ScriptedModel):
    """Is asked as vLLM is, and never answers; notes what was begun and what was ended."""

    shares_batches = True

    def __init__(self) -> None:
        super().__init__(["never"])
        self.begun, self.ended = threading.Event(), threading.Event()

    async def generate_async(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        self.begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.ended.set()
        return []


class Prompt(ScriptedModel):
    """Answers at once, by the path that can be ended."""

    async def generate_async(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        return self.generate(requests)


class Updated(ScriptedModel):
    """Gets new weights while it answers."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        sampled = super().generate(requests)
        self.version += 1
        return sampled


@pytest.fixture(scope="module")
def model(micro: Path) -> TransformersModel:
    return TransformersModel(micro, device="cpu", name="micro")


@pytest.fixture(scope="module")
def served(model: TransformersModel) -> Iterator[ModelServer]:
    with ModelServer(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: ModelServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="any", max_retries=0)


@pytest.fixture
def scripted() -> Iterator[openai.OpenAI]:
    model = ScriptedModel(["one two", "<action>go</action> END and more"], name="scripted")
    with ModelServer(model) as server:
        yield openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)


def post(server: ModelServer, path: str, data: bytes, key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(server.root + path, data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_chat_is_what_the_model_itself_samples(
    client: openai.OpenAI, model: TransformersModel
) -> None:
    answer = client.chat.completions.create(
        model="micro", messages=MESSAGES, max_tokens=7, seed=5, temperature=0.7, logprobs=True
    )
    [own] = model.generate([GenerateRequest(model.render(MESSAGES), 7, 5, 0.7)])
    [choice] = answer.choices
    assert choice.message.content == own.text
    assert choice.finish_reason == own.finish
    told = [token.logprob for token in choice.logprobs.content]
    np.testing.assert_allclose(told, own.log_probs, atol=1e-5)
    assert answer.usage.completion_tokens == len(own.token_ids)
    assert answer.usage.prompt_tokens == len(model.render(MESSAGES))


def test_an_answer_names_the_weights_that_sampled_it_not_those_of_now() -> None:
    model = Updated(["north"])
    with ModelServer(model) as server:
        for version in (0, 1):
            _, answer = post(server, "/v1/chat/completions", b'{"messages": %s}' % CHAT)
            assert answer["system_fingerprint"] == f"version-{version}"
            assert model.version == version + 1


def test_token_ids_go_in_and_come_out_untouched(
    client: openai.OpenAI, model: TransformersModel
) -> None:
    prompts = [[70, 80, 90], [71, 81]]
    answer = client.completions.create(
        model="micro",
        prompt=prompts,
        max_tokens=5,
        seed=3,
        n=2,
        logprobs=0,
        extra_body={"return_token_ids": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for number, prompt in ((0, prompts[0]), (2, prompts[1])):
        [own] = model.generate([GenerateRequest(np.asarray(prompt, np.int32), 5, 3)])
        choice: Any = answer.choices[number]
        assert choice.token_ids == own.token_ids.tolist()
        assert choice.prompt_token_ids == prompt
        np.testing.assert_allclose(choice.logprobs.token_logprobs, own.log_probs, atol=1e-5)
    assert answer.choices[0].token_ids != answer.choices[1].token_ids  # type: ignore[attr-defined]


def test_a_conversation_goes_on_from_the_sampled_ids(
    client: openai.OpenAI, model: TransformersModel
) -> None:
    extra = {"extra_body": {"return_token_ids": True}, "max_tokens": 6}
    first: Any = client.chat.completions.create(model="micro", messages=MESSAGES, seed=1, **extra)
    reply = first.choices[0]
    onwards = [
        *MESSAGES,
        {"role": "assistant", "content": reply.message.content},
        {"role": "user", "content": "and then?"},
    ]
    second: Any = client.chat.completions.create(model="micro", messages=onwards, seed=1, **extra)
    begun = [*reply.prompt_token_ids, *reply.token_ids]
    assert second.choices[0].prompt_token_ids[: len(begun)] == begun
    rest = model.render([{"role": "user", "content": "and then?"}], continuation=True)
    assert second.choices[0].prompt_token_ids[-len(rest) :] == rest.tolist()


def test_a_stop_text_is_cut_off_wherever_it_is_in_the_tokens(scripted: openai.OpenAI) -> None:
    answer: Any = scripted.chat.completions.create(
        model="scripted",
        messages=MESSAGES,
        seed=1,
        stop=["END", "never"],
        extra_body={"return_token_ids": True},
    )
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("<action>go</action> ", "stop")
    assert bytes(choice.token_ids).decode() == "<action>go</action> END"
    answer = scripted.chat.completions.create(model="scripted", messages=MESSAGES, seed=0, stop=" ")
    assert answer.choices[0].message.content == "one"


def test_a_stream_says_the_same(scripted: openai.OpenAI) -> None:
    whole = scripted.chat.completions.create(model="scripted", messages=MESSAGES, seed=0)
    parts = list(
        scripted.chat.completions.create(
            model="scripted",
            messages=MESSAGES,
            seed=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices] == [None, "stop"]
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens
    streamed = scripted.completions.create(model="scripted", prompt="x", seed=0, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == "one two"


def test_messages_may_be_in_parts_and_by_the_developer(scripted: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "go "}, {"type": "text", "text": "on"}]
    messages: Any = [
        {"role": "developer", "content": "Play."},
        {"role": "user", "content": parts},
    ]
    answer = scripted.chat.completions.create(model="default", messages=messages, seed=0)
    assert answer.choices[0].message.content == "one two"


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["micro"]
    assert client.models.retrieve("micro").id == "micro"
    with pytest.raises(openai.NotFoundError, match="this server has `micro`"):
        client.models.retrieve("other")


def test_a_models_name_may_have_slashes() -> None:
    with ModelServer(ScriptedModel(["x"], name="scripted:a/b")) as server:
        asked = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        assert asked.models.retrieve("scripted:a/b").id == "scripted:a/b"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"n": 0}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
        ({"stop": 3}, 400, "stop"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logit_bias": {"3": 5}}, 400, "logit_bias"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, 400, "tool_choice"),
        ({"function_call": {"name": "f"}}, 400, "function_call"),
        ({"best_of": 4}, 400, "best_of"),
        ({"min_tokens": 5}, 400, "min_tokens"),
        ({"ignore_eos": True}, 400, "ignore_eos"),
        ({"guided_json": {"type": "object"}}, 400, "guided_json"),
        ({"guided_regex": "a+"}, 400, "guided_regex"),
        ({"guided_choice": ["a", "b"]}, 400, "guided_choice"),
        ({"guided_grammar": "root"}, 400, "guided_grammar"),
        ({"structured_outputs": {"regex": "a+"}}, 400, "structured_outputs"),
        ({"modalities": ["audio"]}, 400, "modalities"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 400, "messages"),
        ({"max_token": 3}, 400, "max_token"),
        ({"stream_options": "x"}, 400, "stream_options"),
        ({"stream_options": {"include_usage": "x"}}, 400, "include_usage"),
        ({"stream": "yes"}, 400, "stream"),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"prompt_logprobs": 5}, 400, "prompt_logprobs"),
        ({"stop_token_ids": [2**70]}, 400, "stop_token_ids"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    served: ModelServer, change: dict[str, Any], status: int, param: str
) -> None:
    body = {"model": "micro", "messages": MESSAGES, "max_tokens": 2, **change}
    code, answer = post(served, "/v1/chat/completions", json.dumps(body).encode())
    assert (code, answer["error"]["param"]) == (status, param)
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


def test_values_that_ask_for_nothing_and_who_asks_are_no_reason_to_refuse(
    served: ModelServer,
) -> None:
    body = {
        "messages": [*MESSAGES, {"role": "assistant", "content": "x", "tool_calls": []}],
        "max_tokens": 2,
        **{"best_of": 1, "min_tokens": 0, "ignore_eos": False, "guided_json": None},
        **{"modalities": ["text"], "tools": [], "tool_choice": "none", "function_call": "auto"},
        **{"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}},
        **{"parallel_tool_calls": True, "stream_options": None, "add_special_tokens": False},
    }
    status, answer = post(served, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 200, answer


def test_a_field_that_nobody_knows_is_told_with_the_nearest(served: ModelServer) -> None:
    body = {"prompt": "x", "max_token": 3}
    status, answer = post(served, "/v1/completions", json.dumps(body).encode())
    assert (status, answer["error"]["param"]) == (400, "max_token")
    assert "Did you mean `max_tokens`?" in answer["error"]["message"]


def test_a_completions_log_probs_are_those_of_its_own_tokens_alone(served: ModelServer) -> None:
    for count, status in ((0, 200), (1, 200), (3, 400)):
        body = {"prompt": "x", "max_tokens": 2, "logprobs": count}
        code, answer = post(served, "/v1/completions", json.dumps(body).encode())
        assert code == status, answer
    assert answer["error"]["param"] == "logprobs"


@pytest.mark.parametrize("outside", [99_999_999, -1, 272])
def test_a_token_id_outside_the_vocabulary_is_refused_with_its_size(
    served: ModelServer, model: TransformersModel, outside: int
) -> None:
    assert model.vocabulary == 272
    body = json.dumps({"prompt": [5, outside], "max_tokens": 2}).encode()
    status, answer = post(served, "/v1/completions", body)
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert f"{outside}; micro has 272 tokens" in answer["error"]["message"]


def bare_request(
    server: ModelServer, method: str, path: str, **headers: str
) -> tuple[int, Any, bytes]:
    """Return the status, the headers and the body of a request without a body."""
    connection = http.client.HTTPConnection(server.root.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("PUT", "/v1/models", 405, "GET, HEAD"),
        ("DELETE", "/v1/models/micro", 405, "GET, HEAD"),
        ("OPTIONS", "/v1/chat/completions", 405, "POST"),
        ("PATCH", "/v1/completions", 405, "POST"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("PUT", "/nothing", 404, None),
        ("FROB", "/v1/models", 501, None),
    ],
)
def test_methods_that_a_page_does_not_take_are_errors_in_openais_shape(
    served: ModelServer, method: str, path: str, status: int, allow: str | None
) -> None:
    code, headers, body = bare_request(served, method, path)
    assert (code, headers["Allow"]) == (status, allow)
    assert headers["Content-Type"] == "application/json"
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_head_is_get_without_a_body(served: ModelServer) -> None:
    for path, status in (("/v1/models", 200), ("/health", 200), ("/v1/completions", 405)):
        code, headers, body = bare_request(served, "HEAD", path)
        assert (code, body) == (status, b"")
        assert int(headers["Content-Length"]) > 0


def test_a_content_length_below_0_is_told_as_such(served: ModelServer) -> None:
    code, _, body = bare_request(served, "POST", "/v1/completions", **{"Content-Length": "-5"})
    assert code == 400
    assert "-5" in json.loads(body)["error"]["message"]


def test_a_client_that_leaves_ends_what_it_asked_for() -> None:
    model = Endless()
    body = b'{"prompt": "x"}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with ModelServer(model) as server:
        address = server.root.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=60) as client:
            client.sendall(head.encode() + body)
            assert model.begun.wait(60)
            assert not model.ended.is_set()
        assert model.ended.wait(60)


def test_a_client_that_stays_gets_its_answers_on_one_connection() -> None:
    with ModelServer(Prompt(["north"])) as server:
        address = server.root.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        for _ in range(2):
            connection.request("POST", "/v1/completions", b'{"prompt": "x"}')
            assert json.load(connection.getresponse())["choices"][0]["text"] == "north"
        connection.close()


@pytest.mark.parametrize(
    ("path", "data", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[1]", 400),
        ("/v1/completions", b'{"prompt": ""}', 400),
        ("/v1/completions", b'{"prompt": {}}', 400),
        ("/v1/embeddings", b"{}", 404),
    ],
)
def test_other_bodies_and_pages_are_errors_in_openais_shape(
    served: ModelServer, path: str, data: bytes, status: int
) -> None:
    code, answer = post(served, path, data)
    assert code == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_the_context_is_named_as_openai_names_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="micro", prompt="x" * 500, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"


def test_a_key_is_demanded_where_one_is_set() -> None:
    with ModelServer(ScriptedModel(["x"]), key="secret") as server:
        body = json.dumps({"prompt": "x"}).encode()
        assert post(server, "/v1/completions", body)[0] == 401
        assert post(server, "/v1/completions", body, key="wrong")[0] == 401
        assert post(server, "/v1/completions", body, key="secret")[0] == 200


def test_requests_that_arrive_together_share_a_batch() -> None:
    model = Counting()
    answers: dict[int, str] = {}
    with ModelServer(model) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60)

        def ask(seed: int) -> None:
            answer = client.completions.create(model="default", prompt="x", seed=seed)
            answers[seed] = answer.choices[0].text

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while server._batcher._waiting.qsize() + sum(model.batches) < 12:
            assert time.monotonic() < end
            time.sleep(0.01)
        model.go.set()
        for thread in threads:
            thread.join()
    assert sum(model.batches) == 12
    assert len(model.batches) < 12
    assert answers == {seed: ("north", "south", "east")[seed % 3] for seed in range(12)}


def test_an_engine_that_shares_its_batches_is_asked_side_by_side() -> None:
    model = Sharing()
    prompt = model.encode("which way?").tolist()
    body = {"prompt": prompt, "max_tokens": 8, "prompt_logprobs": 0}
    with ModelServer(model) as server, ThreadPoolExecutor(4) as pool:
        answers = pool.map(
            lambda seed: post(
                server, "/v1/completions", json.dumps({**body, "seed": seed}).encode()
            ),
            range(4),
        )
        found = [(status, told["choices"][0]) for status, told in answers]
    assert [status for status, _ in found] == [200] * 4
    assert [choice["text"] for _, choice in found] == ["north", "south", "east", "north"]
    assert all(len(choice["prompt_logprobs"]) == len(prompt) for _, choice in found)


def test_one_request_that_fails_leaves_the_others_alone() -> None:
    def reply(prompt: str, seed: int) -> str:
        if "bad" in prompt:
            raise ModelError("no answer to that")
        return "fine"

    with ModelServer(ScriptedModel(reply)) as server:
        body = json.dumps({"prompt": ["good", "bad"]}).encode()
        code, answer = post(server, "/v1/completions", body)
        assert (code, answer["error"]["type"]) == (500, "server_error")
        assert "no answer to that" in answer["error"]["message"]
        assert post(server, "/v1/completions", b'{"prompt": "good"}')[0] == 200


def test_a_port_that_is_taken_is_named(served: ModelServer) -> None:
    port = int(served.root.rpartition(":")[2])
    with pytest.raises(ModelError, match=f"{port}.*--port"):
        ModelServer(ScriptedModel(["x"]), port=port)


def test_a_server_that_is_away_for_a_while_is_asked_again(micro: Path) -> None:
    first = ModelServer(ScriptedModel(["before"]))
    port = int(first.root.rpartition(":")[2])
    model = load_model(f"openai:default@{first.url}?retries=8")
    request = GenerateRequest(model.render(MESSAGES), 16, 0)
    assert model.generate([request])[0].text == "before"
    first.close()
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(model.generate([request])[0].text))
    thread.start()
    time.sleep(1.0)
    with ModelServer(ScriptedModel(["after"]), port=port):
        thread.join(timeout=120)
    assert answers == ["after"]


def test_the_command_serves_until_ctrl_c() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pz_agents.cli", "serve", "--model", "scripted:hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        assert found, line
        client = openai.OpenAI(base_url=found[0], api_key="any", max_retries=0)
        answer = client.chat.completions.create(model="default", messages=MESSAGES)
        assert answer.choices[0].message.content == "hello"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors
