"""ReAct: every turn a thought, then an action; all thoughts stay in the conversation.

The model writes two lines, ``Thought:`` and ``Action:``. Both stay in the prompt exactly as they
were sampled; the environment gets the action in its own tag behind the thought in ``<think>``. A
model whose template has no system message is told nothing and keeps its history all the same, so
that the smallest models can play too.

Source: Yao et al., "ReAct: Synergizing Reasoning and Acting in Language Models", arXiv 2210.03629
(a thought before every action, as there for questions; no examples, which are ``few-shot``'s).
"""

from __future__ import annotations

import re
from dataclasses import replace

from pz_agents.models.protocol import Completion, LanguageModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.conversation import reply_tag
from pz_agents.prompting.templates import Template, find_template, spelled_out
from pz_agents.sdk.types import Action, Ids, Turn
from pz_envs.replies import parse_reply

_SYSTEM = """\
{rules}

Reason and act in turns. Every reply has two lines and ends after the second:
Thought: what the last observation tells you, what is still missing, and what to do next
Action: one command, or the answer where a question is asked
Your earlier thoughts stay in view: build on them, and change the plan when an observation \
contradicts it."""
_REMINDER = "\n\nReply with Thought: and then Action:"

_ACTION = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*(\S.*)$", re.MULTILINE | re.IGNORECASE)
_OBSERVATION = re.compile(r"^[ \t]*Observation[ \t]*:", re.MULTILINE | re.IGNORECASE)
_LABEL = re.compile(r"^\s*Thought[ \t]*:[ \t]*", re.IGNORECASE)
_THINK = re.compile(r"</?think\s*>", re.IGNORECASE)


class ReAct(ZeroShot):
    """Thinks, then acts, and keeps every thought in view.

    Args:
        model: the policy.
        history: most past turns in a prompt; -1 is all of them.

    The others are those of ``ZeroShot``.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        template: str | Template | None = None,
        history: int = -1,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        if not isinstance(template, Template):
            template = find_template(template or model.template)
        if template.system:
            template = replace(template, system=_SYSTEM, reminder=_REMINDER)
        super().__init__(model, temperature, max_new_tokens, template, history, top_p, top_k)

    def _take(self, turn: Turn, prompt: Ids, completion: Completion) -> Action:
        action = super()._take(turn, prompt, completion)
        tag = reply_tag(turn)
        commands = turn.info.get("admissible_commands")
        text = spelled_out(self.template, as_tagged(completion.text, tag), tag, commands)
        return replace(action, text=text)


def as_tagged(text: str, tag: str) -> str:
    """Return a reply of thought and action in the environment's tags.

    What follows the first action, such as an observation made up by the model, is dropped. A reply
    without an action that has the tag itself stays as it is; one with neither is all thought,
    which every environment counts as a reply that cannot be read.
    """
    said = _OBSERVATION.split(text, maxsplit=1)[0]
    found = _ACTION.search(said)
    if found is None:
        if parse_reply(text, tag, "tags").command is not None:
            return text
        return f"<think>{_thought(said)}</think>"
    command = parse_reply(found[1], tag).command or ""
    return f"<think>{_thought(said[: found.start()])}</think>\n<{tag}>{command}</{tag}>"


def _thought(text: str) -> str:
    return _LABEL.sub("", _THINK.sub("", text)).strip()
