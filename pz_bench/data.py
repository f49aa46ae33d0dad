"""Which files decide what is played: their hashes are part of a cell's id.

A story is known by its md5, every other file by its sha256. Files that the environment's arguments
name (``source``, ``story``, ``game``, ``path``) and published files that an argument asks for by
name (``tasks``, ``boxoban``, ``products_1000``) count as well as those that the environment looks
for by itself, those of the training split among them. Where nothing is named and nothing is
published, the program makes the tasks and there is no file.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pz_envs.catalog import EnvRow, find
from pz_envs.files import sha256_file

Kwargs = Mapping[str, Any]
Hashes = dict[str, str]


def data_identity(env_id: str, env_kwargs: Kwargs) -> Hashes:
    """Return file name -> hash of what would be played from here; empty where no file decides.

    A file that is named and not here has no hash: making the environment says that it is missing.
    ALFWorld plays generated households where none of its files is here.

    Raises:
        ConfigError: no such environment.
    """
    row = find(env_id)
    given = {**row.kwargs, **row.eval_kwargs, **env_kwargs}
    found = dict(_looked_for(env_id))
    named = _NAMED.get(row.family)
    if named is not None:
        found |= {name: hash_of(path) for name, path in named(given)}
    return found


@functools.cache
def _looked_for(env_id: str) -> Mapping[str, str]:
    """Return the hashes of the files that the environment looks for without being told."""
    row = find(env_id)
    if row.family == "jericho":
        return _story(row)
    if row.family not in ("math", "alfworld") or row.dataset is None:
        return {}
    from pz_envs.datasets import find_file

    if row.family == "math":
        from pz_envs.mathqa.sets import SETS

        files = SETS[row.kwargs["dataset"]].files.values()
        names = [name for choices in files for name in choices]
    else:
        names = [f"games_{split}.tar.xz" for split in ("train", "valid_seen", "valid_unseen")]
    found = {name: find_file(row.dataset, name) for name in dict.fromkeys(names)}
    return {name: sha256_file(path) for name, path in found.items() if path is not None}


def _story(row: EnvRow) -> Mapping[str, str]:
    from pz_envs.datasets import DATASETS, find_story
    from pz_envs.jericho.games import GAMES

    game = next(game for game in GAMES if game.name == row.kwargs["game"])
    fallback = game.name == "zork1" and find_story(game.md5) is None
    return {"story": DATASETS["zork_mit"].files[0].sha256 if fallback else game.md5}


Named = Iterator[tuple[str, Path]]


def _countdown(given: Kwargs) -> Named:
    from pz_envs.countdown.tasks import FILES
    from pz_envs.datasets import find_file

    source = given.get("source", "generated")
    if source == "tasks":
        yield from _present((name, find_file("countdown", name)) for name in FILES.values())
    elif source != "generated":
        yield from _own(source)


def _sokoban(given: Kwargs) -> Named:
    from pz_envs.datasets import find_file

    source = given.get("source", "generated")
    if source != "boxoban":
        yield from _own(source) if source != "generated" else ()
        return
    difficulty = given.get("difficulty", "unfiltered")
    splits = dict.fromkeys(("train", given["split"]))
    folders = ["hard"] if difficulty == "hard" else [f"{difficulty}/{each}" for each in splits]
    for folder in folders:
        number = 0
        while path := (
            find_file("boxoban", f"{folder}/{number:03}.txt")
            or find_file("boxoban", f"{folder.replace('/', '_')}_{number:03}.txt.gz")
        ):
            yield f"{folder}/{number:03}", path
            number += 1


def _math(given: Kwargs) -> Named:
    from pz_envs.datasets import find_file
    from pz_envs.mathqa.sets import SETS

    if given.get("path") is not None:
        yield from _own(given["path"])
    elif (chosen := SETS.get(given.get("dataset", "generated"))) is not None:
        names = (name for choices in chosen.files.values() for name in choices)
        yield from _present((name, find_file("math", name)) for name in names)


def _webshop(given: Kwargs) -> Named:
    from pz_envs.datasets import find_file

    source = given.get("source", "builtin")
    if source == "products_1000":
        names = ("products_1000.jsonl.gz", "items_ins_v2_1000.json")
        yield from _present((name, find_file("webshop", name)) for name in names)
    elif source != "builtin":
        yield from _own(source, header=True)


def _alfworld(given: Kwargs) -> Named:
    yield from _own(given.get("source"))


def _textworld(given: Kwargs) -> Named:
    for name, path in _own(given.get("game")):
        beside = path.with_suffix(".json")
        yield from _present([(name, path), (beside.name, beside if beside.is_file() else None)])


def _jericho(given: Kwargs) -> Named:
    for _, path in _own(given.get("story")):
        yield "given story", path


_NAMED: Mapping[str, Callable[[Kwargs], Named]] = {
    "countdown": _countdown,
    "sokoban": _sokoban,
    "math": _math,
    "webshop": _webshop,
    "alfworld": _alfworld,
    "textworld": _textworld,
    "jericho": _jericho,
}


def _present(found: Iterable[tuple[str, Path | None]]) -> Named:
    return ((name, path) for name, path in found if path is not None)


def _own(named: Any, header: bool = False) -> Named:
    """Yield the file, or the files of the folder, that an argument names, if it is here.

    With ``header`` a shop folder's header stands for it: it holds the hashes of its files.
    """
    path = Path(str(named)).expanduser()
    if named is None or not path.exists():
        return
    if header:
        from pz_envs.webshop.layout import HEADER

        if (path / HEADER).is_file():
            path = path / HEADER
    yield path.name, path


def hash_of(path: Path, pattern: str = "*") -> str:
    """Return the sha256 of a file; of a folder, that of the names and hashes of its files."""
    if path.is_file():
        status = path.stat()
        return _hash_of_version(str(path.resolve()), status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob(pattern) if each.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {hash_of(file)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=65_536)
def _hash_of_version(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(path)
