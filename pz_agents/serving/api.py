"""OpenAI's requests and answers as plain data: from a body to ``GenerateRequest``s, and back.

Pure functions of the body and the model; no HTTP. Beside OpenAI's own fields it reads those of vLLM
that keep tokens whole: prompts of token ids, ``return_token_ids``, ``stop_token_ids``, ``top_k``
and ``prompt_logprobs``. A conversation that goes on from a reply given here is continued from the
ids that were sampled, never from its text read again (``Memory``). What cannot be done is refused
by name; nothing that changes the meaning of a request is skipped.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pz_agents.models.protocol import (
    Completion,
    GenerateRequest,
    LanguageModel,
    Message,
    tokens_to_stop,
)
from pz_agents.sdk.types import Ids, LogProbs
from pz_agents.serving.fields import Kind, refused, refused_in_message
from pz_envs.seeding import derive_seed

_TEXT_TOKENS = 16
_MOST_CHOICES = 128
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """A request that is refused, with HTTP status, field and code as OpenAI would tell them.

    ``allow`` are the methods that a page takes, where the wrong one was used.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.allow = allow
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One choice that was served: what the model read and what it sampled."""

    kind: Kind
    prompt_ids: Ids
    completion: Completion
    temperature: float
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A body that was understood; ``requests`` are its prompts times its choices."""

    kind: Kind
    requests: tuple[GenerateRequest, ...]
    stops: tuple[str, ...]
    log_probs: bool
    token_ids: bool
    prompt_log_probs: bool
    stream: bool
    stream_usage: bool
    messages: tuple[Message, ...] = ()


class Memory:
    """Which token ids the conversations consist of that replies were given in.

    Args:
        most: conversations that are remembered; the oldest is forgotten.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._ids: OrderedDict[tuple[tuple[str, str], ...], Ids] = OrderedDict()

    def add(self, model: LanguageModel, call: Call) -> None:
        """Remember the conversation that ``call`` ended; its first telling is kept."""
        sampled = call.completion.token_ids
        if len(sampled) == 0:
            return
        if sampled[-1] != model.end_of_turn_id:
            sampled = np.append(sampled, np.int32(model.end_of_turn_id))
        ids = np.concatenate([call.prompt_ids, sampled])
        key = (*_key(call.messages), ("assistant", call.completion.text))
        with self._lock:
            self._ids.setdefault(key, ids)
            while len(self._ids) > self._most:
                self._ids.popitem(last=False)

    def render(self, model: LanguageModel, messages: Sequence[Message]) -> Ids:
        """Return the prompt's ids: those of the longest beginning that is known, and the rest."""
        key = _key(messages)
        for length in range(len(messages) - 1, 0, -1):
            with self._lock:
                ids = self._ids.get(key[:length])
            if ids is not None:
                rest = model.render(messages[length:], continuation=True)
                return np.concatenate([ids, rest])
        return model.render(messages)


def parse(
    kind: Kind, body: Mapping[str, Any], model: LanguageModel, memory: Memory, seed: int
) -> Asked:
    """Return what ``body`` asks for.

    Args:
        kind: ``chat`` for ``/chat/completions``, ``text`` for ``/completions``.
        body: the request's JSON.
        model: renders and encodes.
        memory: of the conversations so far.
        seed: for a body that has none; choice k > 0 draws from a stream of its own.

    Raises:
        ApiError: a field is wrong, missing or not supported; the prompt is too long.
    """
    if (found := refused(kind, body)) is not None:
        raise ApiError(found[1], param=found[0])
    messages: tuple[Message, ...] = ()
    if kind == "chat":
        messages = _messages(body)
        prompts = [memory.render(model, messages)]
    else:
        prompts = _prompts(body, model)
    choices = _number(body, "n", 1, 1, _MOST_CHOICES, whole=True)
    seed = int(_number(body, "seed", seed, -(2**63), 2**63 - 1, whole=True)) % 2**63
    stops = _stops(body)
    base = GenerateRequest(
        prompt_ids=prompts[0],
        max_new_tokens=1,
        seed=seed,
        temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        top_k=max(0, int(_number(body, "top_k", 0, -1, 2**31, whole=True))),
        stop_ids=_stop_ids(body),
        stops=stops,
    )
    requests = tuple(
        replace(
            base,
            prompt_ids=prompt,
            max_new_tokens=_room(kind, body, model, len(prompt)),
            seed=seed if choice == 0 else derive_seed(seed, "choice", choice),
        )
        for prompt in prompts
        for choice in range(int(choices))
    )
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(
            f'`stream_options` must be an object, e.g. {{"include_usage": true}}; '
            f"got {options!r:.80}",
            param="stream_options",
        )
    return Asked(
        kind=kind,
        requests=requests,
        stops=stops,
        log_probs=_flag(body, "logprobs") if kind == "chat" else _own_only(body, "logprobs"),
        token_ids=_flag(body, "return_token_ids"),
        prompt_log_probs=_own_only(body, "prompt_logprobs"),
        stream=_flag(body, "stream"),
        stream_usage=_flag(options, "include_usage"),
        messages=messages,
    )


def cut(completion: Completion, stops: Sequence[str], model: LanguageModel) -> Completion:
    """Return ``completion`` up to the first of the ``stops`` in its text.

    The ids end with the token that completed the stop text, the text before it.
    """
    places = [place for stop in stops if (place := completion.text.find(stop)) >= 0]
    if not places:
        return completion
    count = tokens_to_stop(model.decode, completion.token_ids, stops)
    return replace(
        completion,
        token_ids=completion.token_ids[:count],
        log_probs=completion.log_probs[:count],
        text=completion.text[: min(places)],
        finish="stop",
    )


def answer(
    asked: Asked,
    completions: Sequence[Completion],
    model: LanguageModel,
    prompt_log_probs: Sequence[LogProbs] = (),
) -> dict[str, Any]:
    """Return the JSON of a whole answer."""
    choices = []
    for index, (request, completion) in enumerate(zip(asked.requests, completions, strict=True)):
        choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish}
        if asked.kind == "chat":
            choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
        else:
            choice["text"] = completion.text
        choice["logprobs"] = _log_probs(asked, completion, model) if asked.log_probs else None
        if asked.token_ids:
            choice["token_ids"] = completion.token_ids.tolist()
            choice["prompt_token_ids"] = np.asarray(request.prompt_ids).tolist()
        if prompt_log_probs:
            ids = np.asarray(request.prompt_ids).tolist()
            told = prompt_log_probs[index].tolist()
            rows = [{str(i): {"logprob": p}} for i, p in zip(ids[1:], told, strict=True)]
            choice["prompt_logprobs"] = [None, *rows]
        choices.append(choice)
    read = sum(len(request.prompt_ids) for request in asked.requests)
    sampled = sum(len(completion.token_ids) for completion in completions)
    return {
        **_head(asked, model, {completion.version for completion in completions}),
        "choices": choices,
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": sampled,
            "total_tokens": read + sampled,
        },
    }


def chunks(asked: Asked, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a streamed answer: each choice in one part, then its end, then usage."""
    chat = asked.kind == "chat"
    head = {key: whole[key] for key in ("id", "created", "model", "system_fingerprint")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    parts: list[dict[str, Any]] = []
    for choice in whole["choices"]:
        first = {key: value for key, value in choice.items() if key != "message"}
        first["finish_reason"] = None
        last: dict[str, Any] = {"index": choice["index"], "finish_reason": choice["finish_reason"]}
        if chat:
            first["delta"] = {"role": "assistant", "content": choice["message"]["content"]}
            last["delta"] = {}
        else:
            last["text"] = ""
        parts += [{**head, "choices": [first]}, {**head, "choices": [last]}]
    if asked.stream_usage:
        parts.append({**head, "choices": [], "usage": whole["usage"]})
    return parts


def _head(asked: Asked, model: LanguageModel, versions: Set[int]) -> dict[str, Any]:
    """Return what an answer begins with; ``versions`` of the weights sampled its choices."""
    prefix, kind = ("chatcmpl", "chat.completion") if asked.kind == "chat" else ("cmpl", "")
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind or "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": f"version-{'+'.join(map(str, sorted(versions)))}",
    }


def _log_probs(asked: Asked, completion: Completion, model: LanguageModel) -> dict[str, Any] | None:
    if len(completion.log_probs) != len(completion.token_ids):
        return None
    tokens = [
        model.decode(completion.token_ids[n : n + 1]) for n in range(len(completion.token_ids))
    ]
    told = completion.log_probs.tolist()
    if asked.kind == "text":
        starts = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
        return {
            "tokens": tokens,
            "token_logprobs": told,
            "top_logprobs": None,
            "text_offset": starts,
        }
    return {
        "content": [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in zip(tokens, told, strict=True)
        ]
    }


def _messages(body: Mapping[str, Any]) -> tuple[Message, ...]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError("`messages` must be a list of one or more messages", param="messages")
    messages: list[Message] = []
    for index, each in enumerate(given):
        role = each.get("role") if isinstance(each, dict) else None
        if role not in _ROLES:
            raise ApiError(
                f"messages[{index}] has the role {role!r}. Allowed: {', '.join(_ROLES)}",
                param="messages",
            )
        if (carried := refused_in_message(each)) is not None:
            raise ApiError(
                f"messages[{index}] has `{carried}`, which is not supported here; only text is",
                param="messages",
            )
        content = each.get("content")
        if isinstance(content, list):
            if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                raise ApiError(f"messages[{index}]: only text is understood", param="messages")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise ApiError(f"messages[{index}] has no text in `content`", param="messages")
        messages.append({"role": _ROLES[role], "content": content})
    return tuple(messages)


def _prompts(body: Mapping[str, Any], model: LanguageModel) -> list[Ids]:
    prompt = body.get("prompt")
    several: list[Any] = [prompt]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        several = prompt
    prompts = [_prompt(each, model) for each in several]
    if any(len(ids) == 0 for ids in prompts):
        raise ApiError("`prompt` is empty; at least one token is needed", param="prompt")
    return prompts


def _prompt(prompt: Any, model: LanguageModel) -> Ids:
    if isinstance(prompt, str):
        return model.encode(prompt)
    if isinstance(prompt, list) and all(type(each) is int for each in prompt):
        size = int(getattr(model, "vocabulary", 2**31))  # a server's is not known here
        outside = next((each for each in prompt if not 0 <= each < size), None)
        if outside is not None:
            raise ApiError(
                f"`prompt` has the token id {outside}; {model.name} has {size} tokens, "
                f"0 to {size - 1}",
                param="prompt",
            )
        return np.asarray(prompt, np.int32)
    raise ApiError("`prompt` must be text, token ids, or a list of either", param="prompt")


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or any(not isinstance(each, str) for each in stops):
        raise ApiError("`stop` must be a text or a list of texts", param="stop")
    return tuple(each for each in stops if each)


def _stop_ids(body: Mapping[str, Any]) -> tuple[int, ...]:
    given = body.get("stop_token_ids") or []
    if not isinstance(given, list) or any(
        type(each) is not int or not 0 <= each < 2**31 for each in given
    ):
        raise ApiError("`stop_token_ids` must be a list of token ids", param="stop_token_ids")
    return tuple(dict.fromkeys(given))


def _room(kind: Kind, body: Mapping[str, Any], model: LanguageModel, prompt: int) -> int:
    left = model.max_context - prompt
    name = "max_tokens"
    if body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"
    standard = max(left, 1) if kind == "chat" else _TEXT_TOKENS
    wanted = int(_number(body, name, standard, 1, 2**31, whole=True))
    if wanted > left:
        raise ApiError(
            f"This model's context is {model.max_context} tokens; the prompt has {prompt} and "
            f"`{name}` is {wanted}. Shorten one of them",
            param=name,
            code="context_length_exceeded",
        )
    return wanted


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(f"`{name}` must be true or false; got {value!r:.80}", param=name)
    return bool(value)


def _own_only(body: Mapping[str, Any], name: str) -> bool:
    """Return whether log-probs are asked for; those of other tokens than the text's are not known.

    1 asks for the likeliest token's too, but is what clients send that want the text's alone.
    """
    value = body.get(name)
    if value is None or value is False:
        return False
    if value is not True and value not in (0, 1):
        raise ApiError(
            f"`{name}` can be 0 or 1 here, for the log-probs of the text's own tokens; "
            f"got {value!r:.80}",
            param=name,
        )
    return True


def _number(
    body: Mapping[str, Any],
    name: str,
    standard: float,
    least: float,
    most: float,
    *,
    whole: bool = False,
) -> Any:
    value = body.get(name)
    if value is None:
        return standard
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise ApiError(
            f"`{name}` must be {kind} from {least:g} to {most:g}; got {value!r:.80}", param=name
        )
    return value


def _key(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)
