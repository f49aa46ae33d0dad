"""Episodes turn by turn: on a terminal, and as one HTML file that needs nothing else.

Everything shown is in the store: observation, admissible commands, reply with its reasoning folded,
the action read from it, reward and score, tokens with their log-probs as heat, and the visits of a
search. An episode is named ``CELL`` or ``CELL:NUMBER``; a cell by the first letters of its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pz_bench import store
from pz_bench.cell import EpisodeRecord
from pz_bench.steps import COMMANDS, commands_of
from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.replies import parse_reply

_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL | re.IGNORECASE)
_FOLDED_WORDS = 24
_FOLDED_COMMANDS = 6
_MOST_VISITED = 8
_BAR = 24
_COLD = -4.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A cell and those of its episodes that are to be shown, in order of their number."""

    cell: store.CellFile
    episodes: tuple[EpisodeRecord, ...]


def find(runs: Path, reference: str, *, failed_only: bool = False) -> Shown:
    """Return what ``CELL`` or ``CELL:NUMBER`` names.

    Args:
        runs: the store.
        reference: the first letters of a cell's id, and an episode's number.
        failed_only: leave out episodes that succeeded.

    Raises:
        ConfigError: no such cell or episode, or several cells begin so.
        DataError: a file of the store is broken.
    """
    name, colon, number = reference.partition(":")
    folders = {folder.name: folder for folder in store.cell_folders(runs)}
    begin = [folder for cell, folder in folders.items() if name and cell.startswith(name)]
    if len(begin) != 1:
        what = f"{len(begin)} cells begin" if begin else f"no cell of {runs} begins"
        hint = "" if begin else did_you_mean(name, folders)
        raise ConfigError(f"{what} with `{name}`.{hint} The cells there are: pz-bench ls")
    episodes = store.read_episodes(begin[0])
    if colon:
        if not any(str(each.episode) == number for each in episodes):
            raise ConfigError(f"{reference}: the cell has episodes 0 to {len(episodes) - 1}")
        episodes = tuple(each for each in episodes if str(each.episode) == number)
    elif failed_only:
        episodes = tuple(each for each in episodes if not each.success or each.status != "ok")
    return Shown(store.read_cell(begin[0]), episodes)


def overview(shown: Shown) -> RenderableType:
    """Return the list of a cell's episodes for a terminal."""
    table = Table(title=Text(shown.cell.spec.title), box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("episode", "task", "outcome", "score", "turns", "invalid", "tokens", "ended by"):
        table.add_column(head)
    for each in shown.episodes:
        style = "green" if each.success else "red" if each.status != "ok" else ""
        table.add_row(
            Text(str(each.episode)),
            Text(each.task_id),
            Text(outcome(each), style=style),
            Text(f"{each.score:g} of {each.max_score:g}"),
            Text(str(each.turns)),
            Text(str(each.invalid)),
            Text(str(each.sampled_tokens)),
            Text(each.truncated or ("the game" if each.terminated else each.error or "")),
        )
    return table


def outcome(episode: EpisodeRecord) -> str:
    """Return ``success``, ``no success`` or the status of an episode that broke."""
    if episode.status != "ok":
        return episode.status
    return "success" if episode.success else "no success"


def turn_by_turn(shown: Shown, *, full: bool = False) -> RenderableType:
    """Return the shown episodes for a terminal; ``full`` unfolds reasoning and commands."""
    parts: list[RenderableType] = []
    for episode in shown.episodes:
        title = f"{shown.cell.spec.title}, episode {episode.episode}: {outcome(episode)}"
        parts.append(Rule(Text(title)))
        for number, commands in enumerate(commands_of(episode.steps)):
            parts += _step(number, episode.steps[number], commands, full)
        parts.append(Panel(Text(episode.final_observation), title="end", box=box.ROUNDED))
        if episode.error:
            parts.append(Text(episode.error, style="red"))
    return Group(*parts)


def side_by_side(left: Shown, right: Shown, *, full: bool = False) -> RenderableType:
    """Return two episodes next to each other."""
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(turn_by_turn(left, full=full), turn_by_turn(right, full=full))
    return table


def read_reply(text: str) -> tuple[str, str]:
    """Return (reasoning, action) of a reply, tags taken off."""
    thought = "".join(_THOUGHT.findall(text))
    tag = "answer" if "<answer" in text.lower() else "action"
    command = parse_reply(text, tag=tag).command
    return re.sub(r"</?think>", "", thought, flags=re.IGNORECASE).strip(), command or text.strip()


def to_html(shown: Sequence[Shown]) -> str:
    """Return the page: pick an episode on the left, read it on the right, a second one beside it.

    It makes no request; texts are put into it as data, never as markup.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    data = json.dumps([_as_data(each) for each in shown], ensure_ascii=True, allow_nan=False)
    # "<" as an escape: no text can end the script element it stands in.
    return environment.get_template("view.html.j2").render(data=data.replace("<", "\\u003c"))


def to_json(shown: Shown) -> str:
    """Return the cell's spec and its episodes as JSON, each turn with its commands in full."""
    data = _as_data(shown)
    for episode in data["episodes"]:
        for step, commands in zip(episode["steps"], commands_of(episode["steps"]), strict=True):
            step[COMMANDS] = commands
    return json.dumps(data, indent=1, allow_nan=False)


def _as_data(shown: Shown) -> Mapping[str, Any]:
    episodes = []
    for episode in shown.episodes:
        steps = []
        for step in episode.steps:
            thought, action = read_reply(str(step["action"]))
            steps.append({**step, "thought": thought, "command": action})
        values = asdict(replace(episode, steps=())) | {"steps": steps}
        episodes.append(values | {"outcome": outcome(episode)})
    spec = shown.cell.spec
    return {
        "id": shown.cell.id,
        "title": spec.title,
        "env": spec.env,
        "spec": spec.model_dump(mode="json") | {"algorithm": spec.player},
        "episodes": episodes,
    }


def _step(
    number: int, step: Mapping[str, Any], commands: Sequence[str] | None, full: bool
) -> list[RenderableType]:
    thought, action = read_reply(str(step["action"]))
    parts: list[RenderableType] = [
        Panel(Text(str(step["observation"])), title=f"turn {number}", box=box.ROUNDED)
    ]
    if commands is not None:
        parts.append(_commands(commands, action, full))
    if thought:
        words = thought.split()
        kept = words if full else words[:_FOLDED_WORDS]
        more = f" … ({len(words)} words)" if len(kept) < len(words) else ""
        parts.append(Text(f"  thinks: {' '.join(kept)}{more}", style="dim italic"))
    if step.get("pieces"):
        parts.append(_heat(step["pieces"], step["log_probs"]))
    marks = [] if step["valid"] else ["not valid"]
    marks += ["cannot be read"] if step["format_error"] else []
    line = Text(f"> {action}", style="bold cyan")
    tokens = f", {step['tokens']} tokens" if step.get("tokens") else ""
    line.append(f"   reward {step['reward']:+g}, score {step['score']:g}{tokens}", style="dim")
    if marks:
        line.append(f"   {', '.join(marks)}", style="yellow")
    parts.append(line)
    visits = step.get("notes", {}).get("visits")
    if isinstance(visits, Mapping):
        parts.append(_visits(visits, step["notes"].get("prior", {}), action))
    return parts


def _commands(commands: Sequence[str], action: str, full: bool) -> Text:
    """Return the admissible commands in one line, the first few of them unless ``full``."""
    line = Text(f"  {len(commands)} commands: ", style="dim")
    kept = commands if full else commands[:_FOLDED_COMMANDS]
    for place, command in enumerate(kept):
        line.append(" · " if place else "")
        line.append(command, style="bold cyan" if command == action else "")
    if len(kept) < len(commands):
        line.append(f" … and {len(commands) - len(kept)} more")
    return line


def _visits(visits: Mapping[str, int], prior: Mapping[str, float], action: str) -> Table:
    """Return a bar for each of the most visited commands, the chosen one marked."""
    table = Table.grid(padding=(0, 1))
    most = sorted(visits.items(), key=lambda item: -item[1])
    for command, count in most[:_MOST_VISITED]:
        if count > 0:
            chosen = command == action
            table.add_row(
                Text("  ▸" if chosen else "   ", style="cyan"),
                Text(command, style="bold cyan" if chosen else ""),
                Text("█" * max(1, round(_BAR * count / most[0][1])), style="cyan"),
                Text(str(count)),
                Text(f"prior {prior[command]:.2f}" if command in prior else "", style="dim"),
            )
    left = [count for _, count in most[_MOST_VISITED:] if count > 0]
    if left:
        table.add_row("", Text(f"{len(left)} others", style="dim"), "", Text(str(sum(left))))
    return table


def _heat(pieces: Sequence[str], log_probs: Sequence[float | None]) -> Text:
    """Return the sampled tokens, the less likely the redder."""
    text = Text("  ")
    for piece, log_prob in zip(pieces, log_probs, strict=True):
        surprise = 0.0 if log_prob is None else min(1.0, log_prob / _COLD)
        text.append(piece.replace("\n", "⏎"), style=f"on rgb({int(200 * surprise)},0,0)")
    return text
