import hashlib
import logging
import multiprocessing
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pz_envs import datasets
from pz_envs.errors import ConfigError
from pz_envs.jericho.grammar import Template, read_templates
from pz_envs.jericho.objects import ALL
from pz_envs.jericho.refusals import Refusals

jericho = pytest.importorskip("jericho")

from pz_envs.jericho import zloop  # noqa: E402
from pz_envs.jericho.admissible import AdmissibleCommands, CommandCache  # noqa: E402
from pz_envs.jericho.commands import refusal, refused_verbs  # noqa: E402
from pz_envs.jericho.probe import Probe  # noqa: E402

pytestmark = pytest.mark.data


def story(name):
    path = datasets.find_file("jericho", name)
    if path is None:
        pytest.skip(f"no {name}; set PZ_DATA")
    return path


@pytest.fixture
def game(request):
    path = story(getattr(request, "param", "zork1.z5"))
    frotz = jericho.FrotzEnv(str(path))
    frotz.reset()
    return frotz


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cache for the fast mode's findings along walkthroughs, which take seconds to make."""
    return CommandCache(tmp_path_factory.mktemp("cache") / "commands.sqlite")


def lister(frotz, mode="exact", **kwargs):
    md5 = hashlib.md5(Path(frotz.story_file.decode()).read_bytes()).hexdigest()
    return AdmissibleCommands(frotz, story_md5=md5, mode=mode, **kwargs)


def play(frotz, commands, count, seed=0):
    """Yield before each of ``count`` random admissible steps."""
    rng = random.Random(seed)
    for _ in range(count):
        yield
        listed = commands.commands()
        if not listed or frotz.step(rng.choice(listed))[2]:
            frotz.reset()


def same(one, two):
    return all(np.array_equal(left, right) for left, right in zip(one, two, strict=True))


def stock_effects(frotz, commands, monkeypatch):
    """Return the effects of what jericho's own search finds with the same names."""
    names = list(commands.names())
    vocabulary = commands._story.vocabulary
    monkeypatch.setattr(frotz, "_score_object_names", lambda found: names)
    monkeypatch.setattr(
        jericho.jericho.utl,
        "extract_objs",
        lambda text: {(word, "NOUN") for word, _ in vocabulary.words(text)},
    )
    # The search holds chance still; so must the reference.
    state = frotz.get_state()
    probe = Probe(frotz, compiled=False)
    with probe.remembered():
        found = frotz.get_valid_actions(use_parallel=False)
        probe.restore()
        bindings = frotz.bindings
        refused = refused_verbs(bindings["grammar"], bindings["max_word_length"])
        found = [command for command in found if refusal(command, refused) is None]
        effects = {outcome.effect for outcome in probe.attempt(found)} - {None}
    assert same(state, frotz.get_state())
    return effects


def effects(frotz, listed):
    # Jericho's own loop and object tree, so that nothing is measured by what is under test.
    probe = Probe(frotz, compiled=False)
    with probe.remembered():
        return [outcome.effect for outcome in probe.attempt(listed)]


@pytest.mark.parametrize("game", ["zork1.z5", "detective.z5"], indirect=True)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_listed_command_changes_the_world_and_the_state_stays(game, mode, shared):
    commands = lister(game, mode, cache=shared)
    for _ in play(game, commands, 5):
        before, moves, score = game.get_state(), game.get_moves(), game.get_score()
        listed = commands.commands()
        assert same(before, game.get_state())
        assert (game.get_moves(), game.get_score()) == (moves, score)
        found = effects(game, listed)
        assert None not in found
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("game", ["zork1.z5", "pentari.z5"], indirect=True)
def test_exact_finds_every_effect_that_jericho_finds(game, monkeypatch):
    commands = lister(game)
    compared = 0
    for _ in play(game, commands, 6, seed=3):
        stock = stock_effects(game, commands, monkeypatch)
        assert stock <= set(effects(game, commands.commands()))
        compared += len(stock)
    assert compared > 10


@pytest.mark.parametrize("game", ["zork1.z5", "detective.z5"], indirect=True)
def test_fast_keeps_nearly_every_effect_of_exact(game, shared):
    exact = lister(game)
    fast = lister(game, "fast", cache=shared)
    kept = total = 0
    for _ in play(game, exact, 8, seed=5):
        wanted = set(effects(game, exact.commands()))
        kept += len(wanted & set(effects(game, fast.commands())))
        total += len(wanted)
    assert kept / total >= 0.9


def test_most_moves_of_a_walkthrough_are_admissible(game):
    commands = lister(game)
    walkthrough = game.get_walkthrough()
    hits = 0
    for command in walkthrough[:40]:
        (wanted,) = effects(game, [command])
        # A step with no effect (waiting, examining) has none to find.
        hits += wanted is None or wanted in effects(game, commands.commands())
        game.step(command)
    assert hits / 40 >= 0.85


@pytest.mark.parametrize("game", ["zork1.z5", "detective.z5", "library.z5"], indirect=True)
def test_the_compiled_loop_reaches_the_same_states(game):
    if zloop.loop() is None:
        pytest.skip("no C compiler")
    compiled, plain = Probe(game), Probe(game, compiled=False)
    rng = random.Random(0)
    templates = game.act_gen.templates
    for command in game.get_walkthrough()[:25]:
        name = rng.choice(command.lower().split() or [ALL])
        tried = [command, *(item.replace("OBJ", name) for item in rng.sample(templates, 8))]
        for text in tried:
            seen = []
            for probe in (compiled, plain):
                with probe.remembered():
                    seen.append((probe.run(text), game.get_state(), game._get_world_diff()))
            assert seen[0][0] == seen[1][0]
            assert same(seen[0][1], seen[1][1])
            assert seen[0][2] == seen[1][2]
        game.step(command)


def test_without_a_compiler_the_list_is_the_same(game, monkeypatch):
    listed = lister(game).commands()
    monkeypatch.setattr(zloop, "loop", lambda: None)
    assert lister(game).commands() == listed


def test_chance_does_not_change_the_list(game):
    commands = lister(game)
    first = commands.commands()
    ram, *rest, _, narrative = game.get_state()
    game.set_state((ram, *rest, (987_654, 0, 0), narrative))
    assert commands.commands() == first


def test_a_cached_list_is_the_recomputed_one(tmp_path):
    frotz = jericho.FrotzEnv(str(story("zork1.z5")))
    frotz.reset()
    cached = lister(frotz, cache=CommandCache(tmp_path / "commands.sqlite"))
    fresh = lister(frotz)
    for _ in play(frotz, cached, 30, seed=1):
        assert cached.commands() == fresh.commands()


def test_a_game_that_is_over_has_no_commands(game):
    game.frotz_lib.set_narrative_text(b"****  You have died  ****")
    assert game.game_over()
    assert lister(game).commands() == ()


def test_out_of_time_gives_none_once_logged_and_caches_nothing(game, tmp_path, caplog):
    cache = CommandCache(tmp_path / "commands.sqlite")
    hasty = lister(game, cache=cache, timeout_s=1e-4)
    before = game.get_state()
    with caplog.at_level(logging.WARNING):
        assert hasty.commands() is None
        assert hasty.commands() is None
    assert same(before, game.get_state())
    assert len([record for record in caplog.records if "took longer" in record.message]) == 1
    assert sqlite3.connect(cache.path).execute("SELECT count(*) FROM commands").fetchone() == (0,)
    assert lister(game, cache=cache).commands()


def test_an_unknown_mode_is_refused(game):
    with pytest.raises(ConfigError, match="fast, exact"):
        lister(game, "slow")


def test_two_processes_share_the_cache(game, tmp_path):
    path = tmp_path / "commands.sqlite"
    listed = lister(game, cache=CommandCache(path)).commands()
    code = (
        "import hashlib, sys, jericho\n"
        "from pathlib import Path\n"
        "from pz_envs.jericho import admissible\n"
        "def never(*args, **kwargs): raise SystemExit('searched')\n"
        "admissible.AdmissibleCommands._search = never\n"
        "frotz = jericho.FrotzEnv(sys.argv[1]); frotz.reset()\n"
        "md5 = hashlib.md5(Path(sys.argv[1]).read_bytes()).hexdigest()\n"
        "cache = admissible.CommandCache(sys.argv[2])\n"
        "print(admissible.AdmissibleCommands(\n"
        "    frotz, story_md5=md5, mode='exact', cache=cache).commands())\n"
    )
    arguments = [sys.executable, "-c", code, game.story_file.decode(), str(path)]
    other = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == repr(listed)


def fill(path, start, count):
    cache = CommandCache(path)
    for number in range(start, start + count):
        cache.put(number.to_bytes(4, "big"), (f"take {number}", "look"))


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "commands.sqlite"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=fill, args=(path, start, 60)) for start in (0, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cache = CommandCache(path)
    assert all(cache.get(n.to_bytes(4, "big")) == (f"take {n}", "look") for n in range(100))


def test_a_killed_writer_leaves_a_sound_file(tmp_path):
    path = tmp_path / "commands.sqlite"
    spawn = multiprocessing.get_context("spawn")
    writer = spawn.Process(target=fill, args=(path, 0, 10**6))
    writer.start()
    cache = CommandCache(path)
    while cache.get((50).to_bytes(4, "big")) is None and writer.is_alive():
        pass
    writer.kill()
    writer.join()
    assert cache.get((20).to_bytes(4, "big")) == ("take 20", "look")
    cache.put(b"after", ("north",))
    assert CommandCache(path).get(b"after") == ("north",)


def test_a_corrupt_cache_is_renamed_and_begun_anew(tmp_path, caplog):
    path = tmp_path / "commands.sqlite"
    path.write_bytes(b"this was a database once " * 400)
    cache = CommandCache(path)
    assert cache.get(b"key") is None
    cache.put(b"key", ("north",))
    assert CommandCache(path).get(b"key") == ("north",)
    assert list(tmp_path.glob("commands.sqlite.corrupt-*"))
    assert "damaged" in caplog.text


def test_a_cache_whose_folder_cannot_be_written_works_in_memory(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    cache = CommandCache(blocker / "commands.sqlite")
    cache.put(b"key", ("north",))
    assert cache.get(b"key") == ("north",)


def test_the_memory_forgets_the_least_recently_used(tmp_path):
    cache = CommandCache(tmp_path / "commands.sqlite", in_memory=2)
    for key in (b"a", b"b", b"c"):
        cache.put(key, (key.decode(),))
    assert list(cache._recent) == [b"b", b"c"]
    assert cache.get(b"a") == ("a",)


def test_the_grammar_merges_wordings_of_one_action():
    content = story("detective.z5").read_bytes()
    texts = ["put OBJ in OBJ", "insert OBJ in OBJ", "drop OBJ in OBJ", "examine OBJ", "north"]
    templates = read_templates(content, texts, len)
    assert [item.text for item in templates] == ["put OBJ in OBJ", "examine OBJ", "north"]
    assert "insert OBJ in OBJ" in templates[0].forms
    assert templates[0].many == (True, False)
    assert templates[1].many == (False,)
    assert templates[2].signature is None


@pytest.mark.parametrize("content", [b"", b"\x05" * 40, b"\x05" + bytes(5000), b"\xff" * 70_000])
def test_a_table_of_no_known_format_yields_no_knowledge(content):
    (only,) = read_templates(content, ["put OBJ in OBJ"], len)
    assert only.signature is None
    assert only.many == (True, True)


def template(signature, text="put OBJ in OBJ"):
    return Template(text, text.count("OBJ"), signature, (False,) * text.count("OBJ"))


def test_a_name_refused_beside_good_companions_is_ruled_out():
    refusals = Refusals()
    put, give = template(0), template(1, "give OBJ to OBJ")
    row = [("ghost", "box"), ("ghost", "bag"), ("ghost", "chest")]
    for names in (("lamp", "box"), ("lamp", "bag")):
        refusals.accept(put, names)
    assert refusals.left(put, row) == row
    refusals.refuse(put, row[0], "You can't see any such thing.")
    assert refusals.left(put, row) == row
    refusals.refuse(put, row[1], "You can't see any such thing.")
    assert refusals.left(put, row) == []
    assert refusals.left(give, row) == row


def test_two_different_refusals_rule_nothing_out():
    refusals = Refusals()
    hit = template(0, "hit OBJ")
    for reply in ("Hit it with what?", "Tie it to what?", "Hit it with what?"):
        refusals.refuse(hit, ("lamp",), reply)
    assert refusals.left(hit, [("lamp",)]) == [("lamp",)]
    for _ in range(2):
        refusals.refuse(hit, ("ghost",), "You can't see any such thing.")
    assert refusals.left(hit, [("ghost",), ("lamp",)]) == [("lamp",)]
