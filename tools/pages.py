"""Fills in what the documentation takes from the program: ids, definitions, transcripts.

A page marks such a place with a comment, and this script writes what belongs between the comment
and ``<!-- end -->``:

    <!-- family countdown -->                     the family's ids, score and success
    <!-- transcript pz/Countdown-v0 seed=0 -->    an episode, played now; also turns=8 to show
                                                  so many, player=random, and arguments of the
                                                  environment as name=JSON

Run ``python tools/pages.py`` after a change; ``--check`` writes nothing and fails if a page is old.
What cannot be played here (no story file, no Java) keeps the transcript it has.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from pz_envs.catalog import find, make_env, missing, rows
from pz_envs.families import FAMILIES
from pz_envs.seeding import generator
from pz_envs.textenv import TextEnv

DOCS = Path(__file__).resolve().parents[1] / "docs"

_PLACE = re.compile(r"(<!-- (family|transcript) ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_LONG = 700


def filled(text: str) -> str:
    """Return a page with every marked place written anew."""

    def write(match: re.Match[str]) -> str:
        head, kind, words, old, end = match.groups()
        new = family(words) if kind == "family" else transcript(words)
        return f"{head}{old if new is None else new}{end}"

    return _PLACE.sub(write, text)


def family(name: str) -> str:
    """Return what a family's page says of it: every id, the score and the success."""
    chosen = FAMILIES[name]
    lines = ["", "| id | metric | suggested turns | expert |", "|---|---|---|---|"]
    for row in rows():
        if row.family == name:
            expert = "–" if not row.expert else "yes"
            if row.expert and row.expert_score is not None:
                expert = f"to a score of {row.expert_score:g}"
            lines.append(f"| `{row.id}` | {row.metric} | {row.max_turns} | {expert} |")
    lines += ["", f"**Score.** {chosen.score}", "", f"**Success.** {chosen.success}", "", ""]
    return "\n".join(lines)


def transcript(words: str) -> str | None:
    """Return an episode as a page shows it; None where it cannot be played here."""
    env_id, *settings = words.split()
    options = dict(setting.split("=", 1) for setting in settings)
    seed, turns = int(options.pop("seed", 0)), int(options.pop("turns", 100))
    player = options.pop("player", "expert")
    if missing(find(env_id)) is not None:
        return None
    kwargs = {name: json.loads(value) for name, value in options.items()}
    with closing(make_env(env_id, **kwargs)) as env:
        lines = list(_played(env, seed, turns, player))
    given = "".join(f", {name}={value!r}" for name, value in kwargs.items())
    made = f'gymnasium.make("{env_id}"{given})'
    head = f"`{made}`, `reset(seed={seed})`, played by the {player} player:"
    return "\n".join(["", head, "", "```text", *lines, "```", "", ""])


def _played(env: TextEnv, seed: int, turns: int, player: str) -> Iterator[str]:
    observation, info = env.reset(seed=seed, options={"expert": player == "expert"})
    yield _shortened(observation)
    rng = generator(seed)
    for _ in range(turns):
        if player == "expert":
            command = env.expert_action()
        else:
            listed = info["admissible_commands"]
            command = listed[int(rng.integers(len(listed)))] if listed else env.random_action(rng)
        if command is None:
            break
        observation, reward, terminated, truncated, info = env.step(command)
        yield f"> {command}"
        yield _shortened(observation)
        if reward:
            yield f"[reward {float(reward):+.3g}]"
        if terminated or truncated:
            break
    success = "success" if info["success"] else "no success"
    score = f"score {info['score']:g} of {info['max_score']:g}"
    yield f"[after {info['steps']} steps: {score}, {success}]"


def _shortened(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    text = re.sub(r"\n{2,}", "\n", "\n".join(lines)).replace("```", "'''")
    if len(text) <= _LONG:
        return text
    return f"{text[: _LONG // 2].rstrip()} [...] {text[-_LONG // 2 :].lstrip()}"


def main(words: list[str]) -> int:
    """Write all pages, or those named; returns the exit code."""
    check = "--check" in words
    named = [Path(word) for word in words if not word.startswith("-")]
    old = 0
    for path in named or sorted(DOCS.rglob("*.md")):
        text = path.read_text("utf-8")
        new = filled(text)
        if new == text:
            continue
        old += 1
        sys.stdout.write(f"{'old' if check else 'written'}: {path}\n")
        if not check:
            path.write_text(new, "utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
