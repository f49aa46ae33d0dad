"""What the language model reads of a state: one text for the prior that plays and for its training.

Models with the template ``chat`` get rules, reply format, past turns, the observation and the
valid actions, after PriorZero (arXiv 2605.12289, 2026); models with the template ``compact`` are
too small for more than the last commands and the observation. Where a prompt does not fit, past
turns are left out first, the oldest before the newest, then the end of the observation and of the
list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pz_agents.errors import ModelError
from pz_agents.models.protocol import LanguageModel, Message
from pz_agents.sdk.types import Ids

LABEL = "Action:"
"""Stands before a scored command; it belongs to the prefix and is never scored."""
REASONING = "Reasoning:"
"""Stands before the thoughts."""

_COMPACT_HISTORY = 3
_COMPACT_CHARS = 400
_RULES = "You are playing a text adventure, one command a turn."
_ANSWER = f"Reply with one line: `{LABEL}`, then one of the valid actions, word for word."
_THINK = (
    f"First think briefly in one paragraph that begins with `{REASONING}`. Then, on a line of its "
    f"own, write `{LABEL}` and one of the valid actions, word for word."
)
_RANK = (
    "Think step by step about which actions bring the game forward. Then list the {top} best of "
    "the valid actions, the best first, one a line, word for word, in this form:\n"
    "1. action\n2. action\nWrite nothing else."
)

Turns = Sequence[tuple[str, str, float]]


def messages_of(
    observation: str,
    instruction: str,
    commands: Sequence[str],
    history: Turns,
    *,
    compact: bool = False,
    reasoning: bool = False,
    top: int = 0,
) -> list[Message]:
    """Return the messages that ask for the next command.

    Args:
        observation: of now.
        instruction: the task's rules; may be empty.
        commands: the valid actions.
        history: past (observation, command, reward) to show, oldest first.
        compact: for models that take no more than the last commands and the observation.
        reasoning: the reply begins with thoughts.
        top: the reply is a ranked list of so many commands; 0: it is one command.
    """
    if compact:
        past = [f"> {command}" for _, command, _ in history[-_COMPACT_HISTORY:]]
        return [{"role": "user", "content": "\n".join([*past, observation.strip()])}]
    answer = _RANK.format(top=top) if top else _THINK if reasoning else _ANSWER
    system = "\n\n".join(part for part in (instruction.strip() or _RULES, answer) if part)
    parts = []
    if history:
        turns = [
            f"Observation: {seen.strip()}\nAction: {command}\nReward: {reward:g}"
            for seen, command, reward in history
        ]
        parts.append("=== GAME HISTORY ===\n" + "\n\n".join(turns))
    parts.append(f"=== CURRENT OBSERVATION ===\n{observation.strip()}")
    parts.append("[Valid Actions] " + "; ".join(commands))
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def prompt_ids(
    model: LanguageModel,
    observation: str,
    instruction: str,
    commands: Sequence[str],
    history: Turns,
    *,
    room: int,
    reasoning: bool = False,
    top: int = 0,
) -> Ids:
    """Return the ids of the longest prompt that leaves ``room`` tokens for what comes after it.

    Args:
        model: renders; its template decides the form.
        observation: see ``messages_of``, as for the other arguments.
        instruction: see there.
        commands: see there.
        history: the most to show.
        room: tokens of label, thoughts and reply.
        reasoning: see there.
        top: see there.

    Raises:
        ModelError: not even a prompt without an observation fits.
    """
    compact = model.template == "compact"
    allowed = model.max_context - room
    for turns, chars in cuts(len(history), _COMPACT_CHARS if compact else None):
        ids = model.render(
            messages_of(
                observation if chars is None else observation.strip()[:chars],
                instruction,
                commands if chars is None else kept(commands, chars),
                history[len(history) - turns :],
                compact=compact,
                reasoning=reasoning,
                top=top,
            )
        )
        if len(ids) <= allowed:
            return ids
    raise ModelError(
        f"No prompt fits {model.name}: its context is {model.max_context} tokens and the reply may "
        f"take {room}. Lower `max_new_tokens`, or take a model with a longer context"
    )


def cuts(turns: int, chars: int | None) -> Iterator[tuple[int, int | None]]:
    """Yield how many past turns and how many characters to show, less and less."""
    yield turns, chars
    while turns:
        turns //= 2
        yield turns, chars
    chars = chars or 8192
    while chars:
        chars //= 2
        yield 0, chars


def kept(commands: Sequence[str], chars: int) -> list[str]:
    """Return the commands from the first on whose letters fit in ``chars``."""
    shown: list[str] = []
    for command in commands:
        chars -= len(command) + 2
        if chars < 0:
            break
        shown.append(command)
    return shown
