"""Find a game's story file and check it, before an interpreter sees a byte of it.

The interpreter answers a bad file by ending the whole process, and an unknown one by a score of 0
for ever, so a file is accepted only when its md5 is the one that the game's bindings were made for.
The header is read to say what is wrong with the others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pz_envs import datasets
from pz_envs.errors import DataError
from pz_envs.jericho.games import MIT_ZORK1_MD5, Game

_UNITS = {3: 2, 4: 4, 5: 4, 8: 8}
_OTHER_FORMATS = {
    b"FORM": "a Blorb container; take the Z-code out of it",
    b"Glul": "a Glulx story, which jericho cannot run",
}


@dataclass(frozen=True, slots=True)
class Story:
    """A checked story file."""

    path: Path
    md5: str

    @property
    def is_mit_zork1(self) -> bool:
        """Whether this is Zork I release 119, whose score is read from the Z-machine."""
        return self.md5 == MIT_ZORK1_MD5


def find_story(game: Game, story: Path | str | None = None) -> Story:
    """Return the checked story file of ``game``.

    Args:
        game: whose story.
        story: a path; without one, the data folders are searched by md5, and zork1 falls back on
            the MIT-licensed release 119.

    Raises:
        DataError: no such file is here, or the file is not the game.
    """
    accepted = (game.md5, MIT_ZORK1_MD5) if game.name == "zork1" else (game.md5,)
    if story is not None:
        return check_story(Path(story), accepted)
    for md5 in accepted:
        path = datasets.find_story(md5)
        if path is not None:
            return check_story(path, accepted)
    source = "zork_mit" if game.name == "zork1" else "jericho"
    raise DataError(
        f"No story file for `{game.name}` ({game.title}) is here. Look for one that can be had: "
        f"pz-envs data get {source}   or put your own {game.file} (md5 {game.md5}) into "
        "$PZ_DATA/jericho"
    )


def check_story(path: Path, accepted: tuple[str, ...]) -> Story:
    """Return ``path`` as a story when its md5 is one of ``accepted``.

    Raises:
        DataError: it cannot be read, is damaged, or is another game or release.
    """
    try:
        data = path.read_bytes()
        str(path).encode("utf-8")
    except (OSError, UnicodeEncodeError, ValueError) as error:
        raise DataError(f"cannot read the story file {str(path)!r}: {error}") from error
    md5 = hashlib.md5(data).hexdigest()
    if md5 in accepted:
        return Story(path.resolve(), md5)
    problem = _header_problem(data)
    if problem is None:
        problem = "it is another game or another release"
    raise DataError(
        f"{path} is not a story file that can be used here: {problem}. Its md5 is {md5}; "
        f"needed: {' or '.join(accepted)}"
    )


def _header_problem(data: bytes) -> str | None:
    """Return what the header says is wrong with a story file, or None."""
    if not data:
        return "it is empty"
    if data[:4] in _OTHER_FORMATS:
        return f"it is {_OTHER_FORMATS[data[:4]]}"
    if data[0] not in _UNITS:
        return f"its first byte is {data[0]}, where Z-machine versions 3, 4, 5 and 8 are supported"
    if len(data) < 64:
        return f"it has {len(data)} bytes, fewer than a header's 64"
    length = int.from_bytes(data[0x1A:0x1C], "big") * _UNITS[data[0]]
    if length > len(data):
        return f"it is truncated: {len(data)} bytes of the {length} that its header announces"
    return None
