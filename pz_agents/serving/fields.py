"""Which fields of a request are understood, may be passed over, or ask for what is not done here.

A field is passed over only where it says who asks, how the request travels, or what is kept of it
elsewhere. Whatever would change the answer is refused by name, and so is a name that nobody knows,
as OpenAI does. A null is as good as an absent field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pz_envs.errors import did_you_mean

Kind = Literal["chat", "text"]

_READ = (
    *("model", "n", "seed", "temperature", "top_p", "top_k", "max_tokens", "stop", "logprobs"),
    *("max_completion_tokens", "stop_token_ids", "stream", "stream_options"),
    *("return_token_ids", "prompt_logprobs"),
)
_READ_BY: Mapping[Kind, tuple[str, ...]] = {"chat": ("messages",), "text": ("prompt",)}

_PASSED_OVER = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority"),
    *("prompt_cache_key", "prompt_cache_retention", "cache_salt", "prediction"),
    "parallel_tool_calls",
)

_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not supported, each with the values that ask for nothing."""

_MESSAGE = ("tool_calls", "function_call", "audio")


def refused(kind: Kind, body: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first field of ``body`` that is not honoured, and why; None where all are."""
    known = (*_READ, *_READ_BY[kind])
    for name, value in body.items():
        if value is None or name in known or name in _PASSED_OVER:
            continue
        if name not in _REFUSED:
            near = did_you_mean(name, (*known, *_REFUSED))
            return name, f"`{name}` is no field of this request.{near} Leave it out"
        harmless = _REFUSED[name]
        if value not in harmless:
            only = f" (only {harmless[0]!r} is, which means the same)" if harmless else ""
            return name, f"`{name}` is not supported here{only}; leave it out"
    return None


def refused_in_message(message: Mapping[str, Any]) -> str | None:
    """Return the first field of a message that carries something else than text."""
    return next((name for name in _MESSAGE if message.get(name)), None)
