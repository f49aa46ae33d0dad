"""One suite over every backend: what a language model promises, each keeps.

The served backend is a real HTTP round trip to a small server on loopback that answers as vLLM
does (token ids and log-probs) from the same weights; ``own`` one to the server of pz itself,
``supervised`` has its weights in another process.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pz_agents.errors import ModelError
from pz_agents.models import GenerateRequest, LanguageModel, load_model, model_identity
from pz_agents.models.openai import OpenAIModel, parse_spec
from pz_agents.models.protocol import is_trainable
from pz_agents.models.recipe import Recipe
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.tiny import build_tiny
from pz_agents.models.transformers import TransformersModel
from pz_agents.serving import ModelServer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "go north or south?"}]


def save_random_model(folder: Path, seed: int, *, sliding: bool = False) -> None:
    """Write a random Qwen2 model with peaked predictions and a Qwen-like ChatML tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    words = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = (*words, *sorted(pre_tokenizers.ByteLevel.alphabet()), "no", "rt")
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(vocabulary)},
        merges=[("n", "o"), ("r", "t")],
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        use_sliding_window=sliding,
        sliding_window=8,
        max_window_layers=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config.repetition_penalty = 2.0  # a folder's own habits must not leak in
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder)


class Handler(BaseHTTPRequestHandler):
    """Answers /completions from a model and /chat/completions with what it was asked."""

    model: TransformersModel
    failures: int = 0
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if type(self).failures > 0:
            type(self).failures -= 1
            self._send(503, {"error": {"message": "loading"}})
        elif body["model"] != "served":
            self._send(404, {"error": {"message": f"no model {body['model']}"}})
        elif self.path.endswith("/chat/completions"):
            last = body["messages"][-1]["content"]
            message = {"role": "assistant", "content": f"{len(body['messages'])}: {last}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._send(200, {"id": "1", "object": "chat.completion", "choices": [choice]})
        elif "prompt_logprobs" in body:
            ids = body["prompt"]
            told = self.model.score(np.asarray(ids[:1]), [np.asarray(ids[1:])])[0].tolist()
            rows = [None, *({str(i): {"logprob": p}} for i, p in zip(ids[1:], told, strict=True))]
            self._send_text({"prompt_logprobs": rows, "text": "", "finish_reason": "length"})
        else:
            [answer] = self.model.generate(
                [
                    GenerateRequest(
                        prompt_ids=np.asarray(body["prompt"], np.int32),
                        max_new_tokens=body["max_tokens"],
                        seed=body["seed"],
                        temperature=body["temperature"],
                        top_p=body["top_p"],
                        top_k=body.get("top_k", 0),
                        stop_ids=tuple(body["stop_token_ids"]),
                        stops=tuple(body.get("stop", ())),
                    )
                ]
            )
            log_probs = {"token_logprobs": answer.log_probs.tolist(), "tokens": []}
            self._send_text(
                {
                    "text": answer.text,
                    "finish_reason": answer.finish,
                    "token_ids": answer.token_ids.tolist(),
                    "logprobs": log_probs,
                }
            )

    def _send_text(self, choice: dict[str, Any]) -> None:
        self._send(
            200, {"id": "1", "object": "text_completion", "choices": [{"index": 0, **choice}]}
        )

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    save_random_model(home / "random", seed=0)
    save_random_model(home / "other", seed=1)
    save_random_model(home / "sliding", seed=2, sliding=True)
    build_tiny(home / "tiny", recipe=Recipe(steps=2, puzzles_a_step=4, games_a_step=2))
    build_tiny(home / "tiny-other", recipe=Recipe(steps=2, puzzles_a_step=4, seed=1))
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="session")
def server(folders: dict[str, Path]) -> Iterator[str]:
    Handler.model = TransformersModel(folders["random"], device="cpu")
    Handler.seen = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    thread.join()
    http.server_close()


LOCAL = ("random", "sliding", "tiny")
VLLM = ("vllm",) if importlib.util.find_spec("vllm") else ()  # `make test-vllm`
BACKENDS = (*LOCAL, "scripted", "served", "own", "supervised", *VLLM)


@pytest.fixture(scope="session")
def own_server(folders: dict[str, Path]) -> Iterator[str]:
    with ModelServer(TransformersModel(folders["random"], device="cpu")) as own:
        yield own.url


@pytest.fixture(scope="session")
def models(folders: dict[str, Path], server: str, own_server: str) -> dict[str, LanguageModel]:
    options = f"tokenizer={folders['random']}&context=512"
    served = f"openai:served@{server}?{options}&concurrency=2"
    own = f"openai:random@{own_server}?{options}&log_probs=processed"
    return {
        **{name: load_model(str(folders[name]), device="cpu") for name in LOCAL},
        "scripted": load_model("scripted:<action>north</action>|look|wait a moment"),
        "served": load_model(served),
        "own": load_model(own),
        "supervised": load_model(f"supervised:{folders['random']}", device="cpu"),
        **{name: load_model(f"vllm:{folders['random']}?required=true") for name in VLLM},
    }


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, models: dict[str, LanguageModel]) -> LanguageModel:
    return models[request.param]


def ask(model: LanguageModel, seed: int = 1, new: int = 12, **options: Any) -> GenerateRequest:
    return GenerateRequest(model.render(MESSAGES), new, seed, **options)


def full_log_probs(
    network: Any, prompt: np.ndarray, tokens: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """The definition: one forward pass over everything, float32 log-softmax, gather."""
    ids = torch.tensor(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    with torch.no_grad():
        logits = network(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    picked = torch.log_softmax(logits, -1)[torch.arange(len(tokens)), ids[0, len(prompt) :]]
    return picked.numpy()


@pytest.mark.parametrize("text", ["", "Numbers: 1 2 3.", "two\n\nlines  and <action>go</action>"])
def test_text_survives_encoding(model: LanguageModel, text: str) -> None:
    ids = model.encode(text)
    assert ids.dtype == np.int32
    assert model.decode(ids) == text


def test_a_completion_describes_itself(model: LanguageModel) -> None:
    for completion in model.generate([ask(model, seed) for seed in range(8)]):
        assert is_trainable(completion)
        assert completion.token_ids.dtype == np.int32
        assert completion.log_probs.dtype == np.float32
        assert (completion.log_probs <= 0).all()
        assert completion.version == model.version
        stopped = completion.finish == "stop"
        assert stopped or len(completion.token_ids) == 12
        shown = completion.token_ids[:-1] if stopped else completion.token_ids
        assert completion.text == model.decode(shown)


def test_a_sample_depends_on_its_own_seed_and_nothing_else(model: LanguageModel) -> None:
    alone = model.generate([ask(model, 7)])[0]
    long = [{"role": "user", "content": "a much longer question " * 4}]
    others = [GenerateRequest(model.render(long), 20, seed) for seed in range(3)]
    together = model.generate([*others, ask(model, 7), ask(model, 8, temperature=0.0)])[3]
    assert together.token_ids.tolist() == alone.token_ids.tolist()
    np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-4)


def test_different_seeds_give_different_samples(model: LanguageModel) -> None:
    texts = {c.text for c in model.generate([ask(model, seed) for seed in range(12)])}
    assert len(texts) > 1


def test_temperature_zero_ignores_the_seed(model: LanguageModel) -> None:
    first, second = model.generate([ask(model, s, temperature=0.0) for s in (1, 2)])
    assert first.token_ids.tolist() == second.token_ids.tolist()


def test_a_reply_ends_after_a_stop_id_and_contains_it(model: LanguageModel) -> None:
    free = model.generate([ask(model, 3)])[0]
    stop = int(free.token_ids[2])
    first = free.token_ids.tolist().index(stop)
    cut = model.generate([ask(model, 3, stop_ids=(stop,)), ask(model, 4)])[0]
    assert cut.finish == "stop"
    assert cut.token_ids.tolist() == free.token_ids[: first + 1].tolist()


def test_a_reply_ends_with_the_token_that_completes_a_stop_text(model: LanguageModel) -> None:
    replies = model.generate([ask(model, seed, new=20) for seed in range(40)])
    seed, free, stop = next(
        (seed, reply, text)
        for seed, reply in enumerate(replies)
        for end in range(6, len(reply.token_ids))
        if (text := model.decode(reply.token_ids[end - 3 : end])).isascii() and len(text) > 1
        if text in reply.text
    )
    ids = free.token_ids
    count = next(n for n in range(20) if stop in model.decode(ids[:n]))
    assert len(model.encode(stop)) > 1
    cut, other, last = model.generate(
        [
            ask(model, seed, new=20, stops=("never", stop)),
            ask(model, seed, new=20),
            ask(model, seed, new=count, stops=(stop,)),
        ]
    )
    for reply in (cut, last):
        assert reply.finish == "stop"
        assert reply.token_ids.tolist() == ids[:count].tolist()
        assert reply.text == model.decode(ids[:count])
        np.testing.assert_allclose(reply.log_probs, free.log_probs[:count], atol=1e-4)
    assert other.token_ids.tolist() == ids.tolist()


def test_nothing_is_sampled_behind_a_stop_text(models: dict[str, LanguageModel]) -> None:
    model = models["random"]
    free = model.generate([ask(model, 3, new=40)])[0]
    stop = model.decode(free.token_ids[2:5])
    passes: list[int] = []
    hook = model.network.register_forward_hook(lambda *_: passes.append(1))
    try:
        cut = model.generate([ask(model, 3, new=40, stops=(stop,))])[0]
    finally:
        hook.remove()
    assert len(passes) == len(cut.token_ids) < len(free.token_ids)


def test_each_request_has_its_own_length(model: LanguageModel) -> None:
    short, longer = model.generate([ask(model, 3, new=2), ask(model, 3, new=9)])
    assert short.finish == "length"
    assert len(short.token_ids) == 2
    assert short.token_ids.tolist() == longer.token_ids[:2].tolist()


def test_scores_are_the_log_probs_that_generate_reports(model: LanguageModel) -> None:
    prompt = model.render(MESSAGES)
    replies = model.generate([ask(model, seed) for seed in range(4)])
    scores = model.score(prompt, [reply.token_ids for reply in replies])
    for score, reply in zip(scores, replies, strict=True):
        np.testing.assert_allclose(score, reply.log_probs, atol=1e-4)


def test_a_conversation_only_grows_at_its_end(model: LanguageModel) -> None:
    first = model.render(MESSAGES)
    reply = np.append(model.encode("north"), model.end_of_turn_id)
    after = model.render([{"role": "user", "content": "Taken."}], continuation=True)
    whole = model.render(
        [
            *MESSAGES,
            {"role": "assistant", "content": "north"},
            {"role": "user", "content": "Taken."},
        ]
    )
    assert np.concatenate([first, reply, after]).tolist() == whole.tolist()


def test_what_does_not_fit_is_refused(model: LanguageModel) -> None:
    for request in (
        GenerateRequest(np.zeros(model.max_context, np.int32) + 5, 1, 1),
        GenerateRequest(np.empty(0, np.int32), 1, 1),
        ask(model, new=0),
    ):
        with pytest.raises(ModelError, match="does not fit"):
            model.generate([request])


def test_no_requests_give_no_completions(model: LanguageModel) -> None:
    assert model.generate([]) == []
    assert model.score(model.render(MESSAGES), []) == []


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_log_probs_are_those_of_a_full_forward_pass(
    models: dict[str, LanguageModel], name: str, temperature: float
) -> None:
    model = models[name]
    requests = [ask(model, seed, temperature=temperature, new=20) for seed in range(3)]
    requests.append(GenerateRequest(model.encode("x"), 5, 1, temperature, top_k=3, top_p=0.5))
    for request, completion in zip(requests, model.generate(requests), strict=True):
        expected = full_log_probs(
            model.network, request.prompt_ids, completion.token_ids, temperature or 1.0
        )
        np.testing.assert_allclose(completion.log_probs, expected, atol=1e-4)


@pytest.mark.parametrize("name", LOCAL)
def test_scores_are_those_of_full_forward_passes(
    models: dict[str, LanguageModel], name: str
) -> None:
    model = models[name]
    prefix = model.render([{"role": "user", "content": "a longer story " * 5}])
    texts = ["go north", "go", "go north east", "take lamp", "x", "", "go north", *"abcdefghijkl"]
    candidates = [model.encode(text) for text in texts]
    for score, candidate in zip(model.score(prefix, candidates), candidates, strict=True):
        np.testing.assert_allclose(
            score, full_log_probs(model.network, prefix, candidate), atol=1e-4
        )


def test_samples_follow_the_predicted_distribution(models: dict[str, LanguageModel]) -> None:
    model = models["random"]
    prompt = model.render(MESSAGES)
    tokens = [
        int(c.token_ids[0])
        for c in model.generate([GenerateRequest(prompt, 1, s, 0.7) for s in range(2000)])
    ]
    ids = torch.tensor(prompt.astype(np.int64))[None]
    with torch.no_grad():
        expected = torch.softmax(model.network(ids).logits[0, -1].float() / 0.7, -1).numpy()
    seen = np.bincount(tokens, minlength=len(expected)) / len(tokens)
    assert 0.5 * np.abs(seen - expected).sum() < 0.1


def test_top_k_and_top_p_keep_the_likeliest_tokens(models: dict[str, LanguageModel]) -> None:
    model = models["random"]
    prompt = model.render(MESSAGES)
    ids = torch.tensor(prompt.astype(np.int64))[None]
    with torch.no_grad():
        probs = torch.softmax(model.network(ids).logits[0, -1].float(), -1)
    ranked = probs.argsort(descending=True).tolist()
    nucleus = int((probs[ranked].cumsum(0) < 0.6).sum()) + 1
    cases = [({"top_k": 2}, set(ranked[:2])), ({"top_p": 0.6}, set(ranked[:nucleus]))]
    for options, allowed in cases:
        requests = [GenerateRequest(prompt, 1, seed, 2.0, **options) for seed in range(60)]
        if "top_p" in options:
            requests = [GenerateRequest(prompt, 1, seed, **options) for seed in range(60)]
        drawn = {int(c.token_ids[0]) for c in model.generate(requests)}
        assert drawn <= allowed
        assert len(drawn) > 1


@pytest.mark.parametrize(("name", "other"), [("random", "other"), ("tiny", "tiny-other")])
def test_loaded_weights_change_the_answers_and_the_version(
    folders: dict[str, Path], name: str, other: str
) -> None:
    model = TransformersModel(folders[name], device="cpu")
    before = model.generate([ask(model)])[0]
    assert model.load_weights(folders[other]) == model.version == 1
    after = model.generate([ask(model)])[0]
    fresh = TransformersModel(folders[other], device="cpu").generate([ask(model)])[0]
    assert after.version == 1
    assert after.log_probs.tolist() != before.log_probs.tolist()
    assert after.log_probs.tolist() == fresh.log_probs.tolist()


def test_loaded_replies_change_the_answers_and_the_version(tmp_path: Path) -> None:
    model = ScriptedModel(["one"])
    (tmp_path / "replies.json").write_text('["two"]')
    assert model.load_weights(tmp_path) == 1
    assert model.generate([ask(model)])[0].text == "two"


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path]) -> None:
    model = TransformersModel(folders["random"], device="cpu")
    with pytest.raises(ModelError, match="architecture"):
        model.load_weights(folders["tiny"])
    assert model.version == 0


def test_small_batches_give_the_same_samples(folders: dict[str, Path]) -> None:
    whole = TransformersModel(folders["random"], device="cpu")
    split = TransformersModel(folders["random"], device="cpu", batch_tokens=150)
    requests = [
        GenerateRequest(whole.render([{"role": "user", "content": "?" * n}]), 8, n)
        for n in (1, 30, 2, 60, 5)
    ]
    for a, b in zip(whole.generate(requests), split.generate(requests), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()


def test_a_folder_names_its_context_and_template(models: dict[str, LanguageModel]) -> None:
    assert (models["tiny"].template, models["tiny"].max_context) == ("compact", 768)
    assert (models["random"].template, models["random"].max_context) == ("chat", 512)


def test_a_served_model_without_a_tokenizer_is_asked_by_messages(server: str) -> None:
    model = load_model(f"openai:served@{server}")
    prompt = np.concatenate(
        [
            model.render([{"role": "system", "content": "Play."}, *MESSAGES]),
            np.append(model.encode("north"), model.end_of_turn_id),
            model.render([{"role": "user", "content": "Naïve?"}], continuation=True),
        ]
    )
    [completion] = model.generate([GenerateRequest(prompt, 16, 5)])
    assert completion.text == "4: Naïve?"
    assert not is_trainable(completion)
    assert [m["role"] for m in Handler.seen[-1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    with pytest.raises(ModelError, match="tokenizer=FOLDER"):
        model.score(prompt, [model.encode("x")])


def test_raw_log_probs_at_other_temperatures_are_not_passed_on(
    models: dict[str, LanguageModel],
) -> None:
    model = models["served"]
    [completion] = model.generate([ask(model, temperature=0.5)])
    assert len(completion.token_ids) > 0
    assert not is_trainable(completion)


def test_a_server_that_is_not_ready_is_asked_again(server: str) -> None:
    model = load_model(f"openai:served@{server}?retries=2")
    Handler.failures = 1
    [completion] = model.generate([ask(model)])
    assert completion.text.startswith("1:")


def test_server_failures_name_the_next_command(server: str) -> None:
    unknown = load_model(f"openai:other@{server}")
    with pytest.raises(ModelError, match=r"status 404.*curl"):
        unknown.generate([ask(unknown)])
    down = load_model("openai:served@http://127.0.0.1:9/v1?retries=0&timeout=5")
    with pytest.raises(ModelError, match=r"No connection.*curl"):
        down.generate([ask(down)])
    with pytest.raises(ModelError, match="Restart the server"):
        load_model(f"openai:served@{server}").load_weights(Path("x"))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("openai:model", "names no served model"),
        ("openai:m@http://h/v1?tokeniser=x", "Did you mean `tokenizer`"),
        ("openai:m@http://h/v1?timeout=0", "timeout"),
        ("tinny", "Did you mean `tiny`"),
        ("/nowhere/at/all", "Allowed"),
    ],
)
def test_specs_that_name_nothing_are_refused(spec: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        load_model(spec)


def test_a_model_name_may_contain_an_at_sign() -> None:
    assert parse_spec("openai:org/a@b@http://h:1/v1").model == "org/a@b"
    assert isinstance(OpenAIModel(parse_spec("openai:m@http://h:1/v1")), OpenAIModel)


def test_identity_is_of_what_decides_the_answers(folders: dict[str, Path]) -> None:
    assert model_identity(str(folders["random"])) != model_identity(str(folders["other"]))
    assert model_identity("openai:m@http://h/v1?timeout=5") == model_identity(
        "openai:m@http://h/v1"
    )
    assert model_identity("scripted:a") != model_identity("scripted:b")
    with pytest.raises(ModelError):
        model_identity("no-such-folder")


def test_a_tokenizer_without_a_chat_template_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(folders["random"], tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_model(str(copy), device="cpu")
