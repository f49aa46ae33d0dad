"""Prompt templates as data, and the functions that fill them in.

``chat`` is for instruction-tuned models: rules and reply format in a system message, then one user
message a turn, in the words of the family's preset (``presets``). ``compact`` is for ``tiny``: the
observation, the commands by number, nothing else, and each turn on its own; a model that small
cannot copy a command, but it can choose one. A template never sees a score, a walkthrough or
anything else the player may not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pz_agents.prompting.presets import GENERIC, PRESETS, Preset
from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.replies import parse_reply


@dataclass(frozen=True, slots=True)
class Template:
    """How a turn becomes a message.

    system: text of the system message with ``{instruction}`` and ``{tag}``; empty for none.
    user: text of a turn with ``{observation}``.
    commands: put behind ``user`` when commands are known, with ``{commands}``.
    separator: between commands.
    reminder: ends every turn.
    by_family: the family's preset says all of the above, ``{system}`` being its system message
        and ``{rules}`` that without the reply's format; the reminder where the template has none,
        and ``history`` where that is -1.
    numbered: list commands as ``1 north``; a reply that is a number then means that command.
    history: most past turns that a prompt shows; None is the whole conversation.
    observation_chars, commands_chars: most characters of each; None is no limit.
    """

    name: str
    system: str = ""
    user: str = "{observation}"
    commands: str = "\n{commands}"
    separator: str = "\n"
    reminder: str = ""
    by_family: bool = False
    numbered: bool = False
    history: int | None = None
    observation_chars: int | None = None
    commands_chars: int | None = None


TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        Template(name="chat", system="{system}", by_family=True, history=-1),
        Template(
            name="compact",
            numbered=True,
            history=0,
            observation_chars=120,
            commands_chars=120,
        ),
    )
}
"""Every built-in template, by name."""


def find_template(name: str) -> Template:
    """Return the built-in template called ``name``.

    Raises:
        ConfigError: there is none; the message names the nearest one.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            f"No prompt template `{name}`.{did_you_mean(name, TEMPLATES)} "
            f"Allowed: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def for_family(template: Template, family: str | None) -> Template:
    """Return ``template`` in the words of a family's preset; as it is unless it is ``by_family``.

    What has been added to the system message, such as guidance for a second attempt, stays.
    """
    if not template.by_family:
        return template
    preset = GENERIC if family is None else PRESETS.get(family, GENERIC)
    return replace(
        template,
        system=_with_rules(template.system, preset),
        user=preset.user,
        commands=preset.commands,
        separator=preset.separator,
        reminder=template.reminder or preset.reminder,
        history=preset.history if template.history == -1 else template.history,
        by_family=False,
    )


def _with_rules(system: str, preset: Preset) -> str:
    """Return ``system`` with the preset's words where its first placeholder stands."""
    name = "{rules}" if system.startswith("{rules}") else "{system}"
    return system.replace(name, preset.rules if name == "{rules}" else preset.system, 1)


def system_text(template: Template, instruction: str, tag: str) -> str:
    """Return the system message, or an empty string where the template has none."""
    template = for_family(template, None)
    return template.system.format(instruction=instruction, tag=tag).strip()


def user_text(template: Template, observation: str, commands: Sequence[str] | None) -> str:
    """Return the message of one turn; what does not fit is left out.

    An observation that is too long keeps its end, where a game says what just happened; commands
    are kept from the first on as long as they fit.
    """
    template = for_family(template, None)
    text = template.user.format(observation=clip(observation.strip(), template.observation_chars))
    shown = shown_commands(template, commands or ())
    if shown:
        text += template.commands.format(commands=template.separator.join(shown))
    return text + template.reminder


def clip(text: str, limit: int | None) -> str:
    """Return ``text``, or its last ``limit`` characters with an ellipsis before them."""
    if limit is None or len(text) <= limit:
        return text
    return ("..." + text[len(text) - limit + 3 :]) if limit > 3 else text[len(text) - limit :]


def shown_commands(template: Template, commands: Sequence[str]) -> list[str]:
    """Return the commands as a message lists them: from the first on, as long as they fit."""
    if template.numbered:
        commands = [f"{number} {command}" for number, command in enumerate(commands, start=1)]
    left = template.commands_chars
    if left is None:
        return list(commands)
    shown: list[str] = []
    for command in commands:
        left -= len(command) + len(template.separator)
        if left < 0:
            break
        shown.append(command)
    return shown


def spelled_out(template: Template, reply: str, tag: str, commands: Sequence[str] | None) -> str:
    """Return ``reply`` with the number of a listed command replaced by the command."""
    if not template.numbered or not commands:
        return reply
    command = parse_reply(reply, tag, "tags").command
    if command is None or not re.fullmatch(r"[1-9][0-9]{0,3}", command):
        return reply
    number = int(command)
    if number > len(shown_commands(template, commands)):
        return reply
    return f"<{tag}>{commands[number - 1]}</{tag}>"
