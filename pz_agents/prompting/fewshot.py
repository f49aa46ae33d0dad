"""Few-shot prompting: an expert's episodes on other instances stand in the system message.

The examples are played here and now by the environment's own expert, from the training split where
the catalogue has one, under seeds that depend on nothing but the environment's id. An instance is
never shown to itself: what has its ``task_id`` is passed over. Where every seed gives the same
instance (a Jericho game), or where there is no training split (published test sets), the examples
are those of the family's other environments, in the catalogue's order. The notes of an episode's
first step name what was shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from pz_agents.errors import AgentError
from pz_agents.models.protocol import Completion, LanguageModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.reflection import fitted_guidance, with_guidance
from pz_agents.prompting.templates import Template, for_family, shown_commands, user_text
from pz_agents.sdk.types import Action, Ids, Turn
from pz_envs.catalog import EnvRow, find, make_env, missing, rows
from pz_envs.errors import ConfigError, DataError
from pz_envs.replies import parse_reply
from pz_envs.seeding import derive_seed
from pz_envs.textenv import TextEnv

_HEAD = "# Examples\nAn expert played other instances; its thoughts are left out."
_SEEDS = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One turn of an example: what was seen, what could be done where that is shown, the move."""

    observation: str
    commands: tuple[str, ...]
    command: str


@dataclass(frozen=True, slots=True)
class Example:
    """The beginning of an expert's episode, as long as it was asked for."""

    task_id: str
    family: str
    tag: str
    instruction: str
    turns: tuple[Seen, ...]


class FewShot(ZeroShot):
    """Shows the model a few episodes of an expert, then plays as ``ZeroShot`` does.

    Examples take at most half of the room for a prompt: what does not fit is left out, whole
    examples first.

    Args:
        model: the policy.
        examples: episodes to show.
        turns: most turns of one.

    The others are those of ``ZeroShot``.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        examples: int = 2,
        turns: int = 12,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        template: str | Template | None = None,
        history: int | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        super().__init__(model, temperature, max_new_tokens, template, history, top_p, top_k)
        if examples < 1 or turns < 1:
            raise ConfigError(f"examples={examples}, turns={turns}: allowed are 1 and above")
        self._examples = examples
        self._turns = turns
        # Replies that are numbers mean nothing without the list; elsewhere it only takes room.
        self._pools: dict[str, tuple[Example, ...]] = {}
        self._shown: dict[str, list[str]] = {}

    def _template_for(self, turn: Turn) -> Template:
        room = self.model.max_context - self._max_new_tokens
        instruction = str(turn.info.get("instruction", ""))
        chosen = self._chosen(turn)
        while True:
            text = examples_text(self.template, chosen, instruction)
            if len(chosen) == 1 or len(self.model.encode(text)) <= room // 2:
                self._shown[turn.episode.key] = [example.task_id for example in chosen]
                return with_guidance(self.template, fitted_guidance(self.model, text, room))
            chosen = chosen[:-1]

    def _chosen(self, turn: Turn) -> list[Example]:
        """Return the first examples of the environment's that are of other instances.

        Raises:
            AgentError: there is none.
        """
        env_id = turn.episode.env_id
        if env_id not in self._pools:
            found = expert_examples(find(env_id), self._turns, commands=self.template.numbered)
            self._pools[env_id] = tuple(itertools.islice(found, self._examples + 1))
        own = turn.info["task_id"]
        chosen = [item for item in self._pools[env_id] if item.task_id != own][: self._examples]
        if not chosen:
            raise AgentError(
                f"few-shot finds no expert's episode to show for {env_id}: neither it nor another "
                "environment of its family that is playable here has an expert on another "
                "instance. Use the agent `zeroshot`"
            )
        return chosen

    def _take(self, turn: Turn, prompt: Ids, completion: Completion) -> Action:
        action = super()._take(turn, prompt, completion)
        shown = self._shown.pop(turn.episode.key, None)
        return action if shown is None else replace(action, notes={"examples": shown})


def expert_examples(row: EnvRow, turns: int, *, commands: bool) -> Iterator[Example]:
    """Yield an expert's episodes of distinct instances, those of ``row`` first, then its family's.

    Args:
        row: where an agent will play.
        turns: most turns of an episode.
        commands: keep what could be done at each turn; some engines take seconds to list it.
    """
    family = [other for other in rows() if other.family == row.family and other.id != row.id]
    seen: set[str] = set()
    for other in (row, *family):
        if not other.expert or missing(other) is not None:
            continue
        split: Literal["train"] | None = "train" if other.train_kwargs else None
        if split is None and other.eval_kwargs:
            continue  # a test set: its questions are no examples
        try:
            env = make_env(other.id, split=split, admissible_commands=commands)
        except (ConfigError, DataError):
            continue  # no training split of it, or none that is here
        with closing(env):
            for number in range(_SEEDS):
                example = _played(env, derive_seed("example", other.id, number) % 2**31, turns)
                if example is not None and example.task_id not in seen:
                    seen.add(example.task_id)
                    yield example


def _played(env: TextEnv, seed: int, turns: int) -> Example | None:
    """Return the first ``turns`` of the expert's episode; None where it knows nothing."""
    observation, info = env.reset(seed=seed, options={"expert": True})
    seen: list[Seen] = []
    while len(seen) < turns:
        command = env.expert_action()
        if command is None:
            break
        # An expert may answer in the family's tag already.
        said = parse_reply(command, env.reply_tag).command or command
        seen.append(Seen(observation, tuple(info["admissible_commands"] or ()), said))
        observation, _, terminated, truncated, info = env.step(command)
        if terminated or truncated:
            break
    if not seen:
        return None
    instruction = str(info["instruction"])
    return Example(str(info["task_id"]), env.family, env.reply_tag, instruction, tuple(seen))


def examples_text(template: Template, examples: Sequence[Example], instruction: str) -> str:
    """Return the examples as a system message shows them, turn by turn.

    Args:
        template: how a turn reads.
        examples: what to show.
        instruction: the player's own rules, which are not repeated.
    """
    parts = [_HEAD]
    for number, example in enumerate(examples, start=1):
        told = replace(for_family(template, example.family), reminder="")
        lines = [f"Example {number}"]
        if example.instruction != instruction:
            lines.append(f"Rules: {example.instruction}")
        for turn in example.turns:
            said = turn.command
            listed = turn.commands[: len(shown_commands(told, turn.commands))]
            if told.numbered and said in listed:
                said = str(listed.index(said) + 1)
            lines.append(user_text(told, turn.observation, turn.commands))
            lines.append(f"Reply: <{example.tag}>{said}</{example.tag}>")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
