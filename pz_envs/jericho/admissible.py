"""The commands that would change something now: Jericho's valid actions, faster.

Every template of the game's grammar is filled with the names of the things in reach, tried, and
taken back; commands that leave the same world are one effect, listed once by its plainest wording
(without ``all``, fewest words, the verb that players use most, fewest letters, the alphabet).

``exact`` keeps every effect that Jericho's own search finds with the same names. It leaves out
only what the story's grammar makes redundant: other wordings of the same action on the same kinds
of objects, ``all`` where the grammar takes one object, and names that the parser has refused twice
in the same words for a sentence of the same kinds of objects. What it can miss so: a routine that
looks at the very verb typed. ``fast`` also leaves out templates that neither occur in the game's
walkthrough nor had an effect at states sampled along it, so its list draws on the walkthrough (a
game without one keeps every template); and two-object sentences with ``all`` or nothing held.
Neither lists what the input rules refuse (``quit``).

A searched list depends on the state and the story alone, never on what was tried before: chance is
held still, so a list does not tell the next roll of the dice. A cached list is that of the first
state met with the same world (object tree without Jericho's noise, special memory) and the same
``look`` and ``inventory``; a hidden counter that none of these shows is not told apart.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pz_envs.errors import ConfigError, require
from pz_envs.jericho.command_cache import CommandCache
from pz_envs.jericho.commands import RefusedVerbs, refusal, refused_verbs, tidy
from pz_envs.jericho.grammar import HOLE, Template, read_nouns, read_templates
from pz_envs.jericho.objects import ALL, Surroundings, Thing, Vocabulary, things
from pz_envs.jericho.probe import Probe
from pz_envs.jericho.refusals import ENOUGH, Refusals

__all__ = ["AdmissibleCommands", "CommandCache"]

Mode = Literal["fast", "exact"]
READ_CHAR = 246
"""The Z-machine's opcode while a game waits for a single key."""
_LOG = logging.getLogger(__name__)

_VERSION = "1"
_BATCH = 256
"""Commands tried between two looks at the clock."""
_EARLY_BATCH = 16
"""The same while every two-object sentence may teach something about the next."""
_PRIOR_TRIES = 8000
"""Commands tried along the walkthrough, over all its sampled states, for the fast mode."""
_PRIOR_STATES = 64


@dataclass(frozen=True, slots=True)
class _Story:
    """What a story file says once and for all."""

    templates: tuple[Template, ...]
    vocabulary: Vocabulary
    refused: RefusedVerbs
    walkthrough: tuple[str, ...]


Attempt = tuple[Template, tuple[str, ...]]
"""A template and the names that fill it."""


class _OutOfTime(Exception):
    """The search used up its time; internal to this module."""


class AdmissibleCommands:
    """Lists the admissible commands of a raw ``jericho.FrotzEnv``'s current state.

    Args:
        frotz: the engine; its state is left exactly as found.
        story_md5: md5 of the story file, part of the cache key.
        mode: ``"exact"`` or ``"fast"``; see the module's docstring.
        cache: where lists are kept; None keeps none.
        timeout_s: seconds after which ``commands`` gives up.

    Raises:
        ConfigError: an unknown mode, or jericho is not installed.
    """

    def __init__(
        self,
        frotz: Any,
        *,
        story_md5: str,
        mode: Mode = "fast",
        cache: CommandCache | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        if mode not in ("fast", "exact"):
            raise ConfigError(f"mode is {mode!r}; allowed: fast, exact")
        self._frotz = frotz
        self._probe = Probe(frotz)
        self._mode = mode
        self._md5 = story_md5
        self._cache = cache
        self._timeout = timeout_s
        self._warned = False
        bindings = frotz.bindings or {}
        self._story = _story(
            frotz.story_file.decode(),
            story_md5,
            tuple(frotz.act_gen.templates),
            bindings.get("grammar", ""),
            bindings.get("max_word_length", 9),
            bindings.get("walkthrough", ""),
        )
        engine = require("jericho.version", "pz-envs[jericho]").__version__
        self._engine = f"jericho {engine} pz {_VERSION}"
        self._likely: frozenset[str] | None = None
        self._priors: dict[bytes, tuple[str, ...]] = {}
        self._guide: tuple[AdmissibleCommands, list[Any]] | None = None
        self._counts_turns = False
        self._tries = 0

    def commands(self) -> tuple[str, ...] | None:
        """Return the current state's commands, plainest first, or None when time ran out.

        A game that is over, or that waits for a single key, has none. Nothing is cached when time
        runs out.
        """
        frotz = self._frotz
        if frotz.game_over() or frotz.victory() or frotz._emulator_halted():
            return ()
        if frotz.frotz_lib.get_opcode() == READ_CHAR:
            return ()
        deadline = time.monotonic() + self._timeout
        with self._probe.remembered():
            surroundings = self._surroundings()
            key = self._key(surroundings)
            found = self._cache.get(key) if self._cache is not None else None
            if found is None:
                try:
                    found = self._search(surroundings, deadline)
                except _OutOfTime:
                    self._warn()
                    return None
                if self._cache is not None:
                    self._cache.put(key, found)
        return found

    def names(self) -> tuple[str, ...]:
        """Return the names of the things in reach, ``all`` last, as the search uses them."""
        with self._probe.remembered():
            found = self._things(self._surroundings(), time.monotonic() + self._timeout)
        return (*(thing.name for thing in found), ALL)

    def _surroundings(self) -> Surroundings:
        (look, refused), (inventory, _) = (self._probe.ask(text) for text in ("look", "inventory"))
        # Some games count no turns; what the parser refuses is then not known from them.
        self._counts_turns = not refused
        here, carried = self._probe.objects().around(self._frotz.player_obj_num)
        return Surroundings(
            look.decode("cp1252", "replace"),
            inventory.decode("cp1252", "replace"),
            tuple(self._probe.name(number) for number in here),
            tuple(self._probe.name(number) for number in carried),
        )

    def _key(self, surroundings: Surroundings, kind: str = "") -> bytes:
        parts = [self._md5, self._engine, kind or self._mode, self._probe.world.hex()]
        parts += [*surroundings.here, "", *surroundings.carried, ""]
        # Counters in a status line would make every turn a state of its own.
        parts += [_without_digits(surroundings.look), _without_digits(surroundings.inventory)]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()

    def _things(self, surroundings: Surroundings, deadline: float) -> tuple[Thing, ...]:
        recognized = require("jericho.util", "pz-envs[jericho]").recognized

        def examine(name: str) -> str | None:
            if time.monotonic() > deadline:
                raise _OutOfTime
            reply, _ = self._probe.ask(f"examine {name}")
            text = reply.decode("cp1252", "replace").translate(_CLEAN).strip()
            return text if recognized(text) else None

        return things(surroundings, self._story.vocabulary, examine)

    def _search(self, surroundings: Surroundings, deadline: float) -> tuple[str, ...]:
        templates = self._story.templates
        if self._mode == "fast":
            likely = self._likely_templates(deadline)
            templates = tuple(item for item in templates if item.text in likely)
        found = self._effects(templates, surroundings, deadline, frugal=self._mode == "fast")
        return tuple(sorted((command for command, _ in found.values()), key=_plainness))

    def _effects(
        self,
        templates: Sequence[Template],
        surroundings: Surroundings,
        deadline: float,
        *,
        frugal: bool,
    ) -> dict[bytes, tuple[str, list[str]]]:
        """Return effect → (plainest command, the templates that have it)."""
        in_reach = self._things(surroundings, deadline)
        refusals = Refusals()
        self._tries = 0
        found: dict[bytes, tuple[str, list[str]]] = {}
        for batch in _batches(templates, in_reach, refusals, frugal):
            if time.monotonic() > deadline:
                raise _OutOfTime
            commands = [_fill(template, names) for template, names in batch]
            outcomes = self._probe.attempt(commands)
            self._tries += len(commands)
            for (template, names), command, outcome in zip(batch, commands, outcomes, strict=True):
                effect, refused, reply = outcome
                if not self._counts_turns or not names:
                    pass
                elif refused:
                    refusals.refuse(template, names, reply)
                else:
                    refusals.accept(template, names)
                if effect is not None and refusal(command, self._story.refused) is None:
                    best, sources = found.setdefault(effect, (command, []))
                    sources.append(template.text)
                    found[effect] = (min(best, command, key=_plainness), sources)
        return found

    def _likely_templates(self, deadline: float) -> frozenset[str]:
        """Return the templates that the walkthrough uses, or with an effect somewhere along it.

        The latter are found once for a story, by the frugal search at states spread over the
        walkthrough, on an engine of its own. What each state says is cached, so that a search
        which ran out of time goes on where it stopped.
        """
        if self._likely is None:
            length = self._story.vocabulary.length
            steps = [
                " ".join(word[:length] for word in step.lower().split())
                for step in self._story.walkthrough
            ]
            likely = {
                item.text
                for item in self._story.templates
                if item.signature is None or _spelled_out(item, steps, length)
            }
            if not self._story.walkthrough:
                likely = {item.text for item in self._story.templates}
            tries = 0
            for index in range(_PRIOR_STATES if self._story.walkthrough else 0):
                if tries < _PRIOR_TRIES:
                    count, *found = self._prior(index, deadline)
                    tries += int(count)
                    likely.update(found)
            self._likely = frozenset(likely)
            self._guide = None
        return self._likely

    def _prior(self, index: int, deadline: float) -> tuple[str, ...]:
        """Return how many commands were tried at one state of the walkthrough, and what worked."""
        name = f"{self._md5} {self._engine} prior {index} of {_PRIOR_STATES}"
        key = hashlib.blake2b(name.encode(), digest_size=16).digest()
        found = self._cache.get(key) if self._cache is not None else self._priors.get(key)
        if found is not None:
            return found
        if self._guide is None:
            self._guide = self._walk()
        walker, states = self._guide
        # Bits reversed: wherever the tries run out, the states are spread over the whole way.
        place = int(f"{index:06b}"[::-1], 2)
        walker._frotz.set_state(states[place * len(states) // _PRIOR_STATES])
        templates = self._story.templates
        with walker._probe.remembered():
            effects = walker._effects(templates, walker._surroundings(), deadline, frugal=True)
        # What many templates do is the passing of time, not their own doing.
        most = len(templates) // 4
        told = {text for _, texts in effects.values() if len(set(texts)) <= most for text in texts}
        found = (str(walker._tries), *sorted(told))
        self._priors[key] = found
        if self._cache is not None:
            self._cache.put(key, found)
        return found

    def _walk(self) -> tuple[AdmissibleCommands, list[Any]]:
        """Play the walkthrough on a new engine and return it with every state on the way."""
        old = self._frotz
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frotz = type(old)(old.story_file.decode(), seed=old.bindings["seed"])
        frotz._bindings, frotz.act_gen = old.bindings, old.act_gen
        states = []
        for command in self._story.walkthrough:
            if frotz.frotz_lib.get_opcode() != READ_CHAR:
                states.append(frotz.get_state())
            frotz.step(tidy(command))
            if frotz.game_over() or frotz.victory():
                break
        return AdmissibleCommands(frotz, story_md5=self._md5, mode="exact"), states

    def _warn(self) -> None:
        if not self._warned:
            _LOG.warning(
                "admissible commands of story %s (%s) took longer than %.1f s; none are given",
                self._md5,
                self._mode,
                self._timeout,
            )
            self._warned = True


_CLEAN = str.maketrans("\n*-", "   ")
_DIGITS = str.maketrans("", "", "0123456789")


def _without_digits(text: str) -> str:
    return text.translate(_DIGITS)


def _batches(
    templates: Sequence[Template], in_reach: Sequence[Thing], refusals: Refusals, frugal: bool
) -> Iterator[list[Attempt]]:
    """Yield what to try, in batches; what one batch teaches is left out of the next.

    The first templates of each signature go ahead, since they teach most.
    """
    fillings = {
        many: _fillings(many, in_reach, frugal) for many in {item.many for item in templates}
    }
    for holes in range(3):
        waves: list[list[Template]] = [[] for _ in range(ENOUGH + 1)]
        seen: Counter[int] = Counter()
        for template in templates:
            if template.holes == holes:
                signature = -1 if template.signature is None else template.signature
                teaches = holes and signature >= 0 and seen[signature] < ENOUGH
                waves[seen[signature] if teaches else ENOUGH].append(template)
                seen[signature] += 1
        for number, wave in enumerate(waves):
            early = holes == 2 and number < ENOUGH
            batch: list[Attempt] = []
            for template in wave:
                for row in fillings[template.many]:
                    batch += [(template, names) for names in refusals.left(template, row)]
                    if len(batch) >= (_EARLY_BATCH if early else _BATCH):
                        yield batch
                        batch = []
                if early and batch:
                    yield batch
                    batch = []
            if batch:
                yield batch


def _fillings(
    many: tuple[bool, ...], in_reach: Sequence[Thing], frugal: bool
) -> list[list[tuple[str, ...]]]:
    """Return the names to fill holes with, in rows with the same first name.

    Args:
        many: per hole, whether ``all`` may fill it.
        in_reach: the things to name.
        frugal: of two things, one must be held.
    """
    if not many:
        return [[()]]
    names = [thing.name for thing in in_reach]
    choices = [[*names, ALL] if each else names for each in many]
    if len(many) == 1:
        return [[(name,) for name in choices[0]]]
    if not frugal:
        return [[(one, two) for two in choices[1] if one != two] for one in choices[0]]
    held = {thing.name for thing in in_reach if thing.held}
    return [
        [(one, two) for two in names if one != two and (one in held or two in held)]
        for one in names
    ]


def _spelled_out(template: Template, walkthrough: Sequence[str], length: int) -> bool:
    """Return whether a command of the walkthrough has one of the template's forms."""
    for text in (template.text, *template.forms):
        words = (".+" if word == HOLE else re.escape(word[:length]) for word in text.split())
        form = re.compile(" ".join(words))
        if any(form.fullmatch(command) for command in walkthrough):
            return True
    return False


def _fill(template: Template, names: Sequence[str]) -> str:
    text = template.text
    for name in names:
        text = text.replace(HOLE, name, 1)
    return text


@functools.lru_cache(maxsize=65536)
def _plainness(text: str) -> tuple[bool, int, int, int, str]:
    """Sort key of a command or template: no ``all``, fewest words, commonest verb, shortest."""
    usage = require("jericho.util", "pz-envs[jericho]").verb_usage_count(text)
    words = text.split()
    return ALL in words, len(words), -usage, len(text), text


@functools.lru_cache(maxsize=8)
def _story(
    path: str, md5: str, templates: tuple[str, ...], grammar: str, length: int, walkthrough: str
) -> _Story:
    story = Path(path).read_bytes()
    refused = refused_verbs(grammar, length)
    allowed = [text for text in templates if refusal(text, refused) is None]
    known = read_templates(story, allowed, _plainness)
    return _Story(
        templates=tuple(sorted(known, key=lambda item: (item.holes, _plainness(item.text)))),
        vocabulary=Vocabulary(*read_nouns(story)),
        refused=refused,
        walkthrough=tuple(walkthrough.split("/")) if walkthrough else (),
    )
