"""What may be typed into a game: the input rules, as pure functions.

The interpreter was written for a keyboard. A NUL crashes it, control characters are its hot keys,
a backslash begins its own escape language (one of them loops for ever), a newline is two commands,
and a few verbs write files or throw the story away. So a command is printable ASCII on one line of
at most 100 characters, and a command with a refused verb in any of its clauses never arrives.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

MAX_LENGTH = 100

_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
    | dict.fromkeys(map(chr, range(32)), " ")
    | {"\x7f": " ", "\\": " "}
)
_CLAUSES = re.compile(r"[.,;:!?\"'()]|\b(?:then|and|oops|o)\b")
_FILLERS = frozenset(
    ("the", "a", "an", "please", "now", "of", "game", "on", "off", "to", "my", "this")
)

_ALONE = ("save", "restore", "restart", "quit", "q", "script", "undo", "die", "resume")
_ALWAYS = ("restore", "restart", "quit", "unscript", "noscript", "transcript", "replay")
_INFORM_ALWAYS = ("recording",)
_DEBUGGING = (
    *("purloin", "abstract", "gonear", "goto", "showobj", "showverb", "tree", "scope", "trace"),
    *("random", "actions", "messages", "routines", "changes", "daemons", "timers"),
)

_REFUSAL = re.compile(
    r"(?i)don't know the word|not a verb i recogni[sz]e|can't see any|\bi beg your pardon"
    r"|was no verb in|^\[!: \w+ error|\bno command entered|which do you mean"
    r"|what do you want to (?!do\b)|(?:don't|didn't) understand|only understood you as far as"
    r"|sentence isn't one i recogni[sz]e|you used the word|doesn't (?:know|recogni[sz]e) the word"
    r"|(?:isn't|not) in the vocabulary|not used in this game|did(?:n't| not) make sense"
    r"|noun missing|not something you need to refer to|not clear what you're referring"
    r"|grunk not (?:see|know what that)|^what grunk |not a trick you know|^\"?huh\?"
    r"|use multiple (?:direct |indirect )?objects|can't begin with a comma|seem to have said too"
)


@dataclass(frozen=True, slots=True)
class RefusedVerbs:
    """The verbs that one game must not hear, cut to the length its dictionary keeps.

    ``alone`` are refused as a whole clause, fillers apart ("save the game", not "save the cat");
    ``always`` also before other words.
    """

    length: int
    alone: frozenset[str]
    always: frozenset[str]


def refused_verbs(grammar: str, length: int) -> RefusedVerbs:
    """Work out a game's refused verbs.

    Its own synonyms are found in its grammar (``die/q/quit``, ``pause/save/suspen``). In games
    that were published with Inform's debugging verbs those are refused too: ``purloin`` is no way
    to win a benchmark.

    Args:
        grammar: jericho's templates, separated by ``;``, verbs by ``/``.
        length: how many letters of a word the game tells apart.
    """
    alone = {word[:length] for word in _ALONE}
    always = {word[:length] for word in _ALWAYS}
    if length >= 9:  # Infocom's games cut it to `record`, which one of them needs as a verb
        always |= set(_INFORM_ALWAYS)
    verbs: set[str] = set()
    for template in grammar.split(";"):
        head, _, rest = template.strip().partition(" ")
        names = {word[:length] for word in head.split("/")}
        verbs |= names
        if not rest and names & (alone | always):
            alone |= names
    if "purloin" in verbs:
        always |= {word[:length] for word in _DEBUGGING}
    return RefusedVerbs(length, frozenset(alone), frozenset(always))


def tidy(text: str) -> str:
    """Return ``text`` as one line of printable ASCII without backslashes, spaces collapsed.

    Typographic quotes and dashes become plain, accents fall off, everything else is dropped.
    """
    if not (text.isascii() and text.isprintable()) or "\\" in text:
        text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY))
        text = " ".join(text.split()).encode("ascii", "ignore").decode("ascii")
    return " ".join(text.split())


def refusal(command: str, refused: RefusedVerbs) -> str | None:
    """Return why a tidy command is refused, as a sentence for the player, or None."""
    if not command:
        return "That is no command: it has no printable characters."
    if len(command) > MAX_LENGTH:
        return f"That is no command: it has more than {MAX_LENGTH} characters."
    lowered = command.lower()
    if lowered[0] in "#$":
        return f"Commands that begin with `{lowered[0]}` are not allowed here."
    for clause in _CLAUSES.split(lowered):
        words = [word for word in clause.split() if word not in _FILLERS]
        if not words:
            continue
        verb = words[0][: refused.length]
        if verb in refused.always or (verb in refused.alone and len(set(words)) == 1):
            return f"`{words[0]}` is not allowed here; keep playing."
    return None


def was_refused(text: str) -> bool:
    """Return whether a game's answer says that its parser did not take the command."""
    return _REFUSAL.search(text) is not None
