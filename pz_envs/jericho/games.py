"""The games that jericho 3.3.1 supports, as data: importable where jericho is not installed.

A game is known by the md5 of its story file, since every release is another game to the engine:
scores are read from addresses that move. Maximum scores are those that jericho's bindings give.
"""

from __future__ import annotations

from dataclasses import dataclass

from pz_envs.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Game:
    """One game: its short name, title, story file and what its score can be.

    ``start_score`` is what the score counter shows before the first command; it is not always 0,
    so the sum of an episode's rewards is not its score.
    """

    name: str
    title: str
    md5: str
    file: str
    max_score: int
    start_score: int = 0
    has_walkthrough: bool = True

    @property
    def camel(self) -> str:
        """The game's part of its id, as in ``pz/Zork1-v0``."""
        return self.name.capitalize()


GAMES: tuple[Game, ...] = (
    Game("905", "9:05", "4c5067169b834d247a30bb08d1039896", "905.z5", 1),
    Game("acorncourt", "The Acorn Court", "a61400439aa76f8faba3b8f01edd4a72", "acorncourt.z5", 30),
    Game("advent", "Adventure", "ee2242e155fd8910921b0f8e04019a3a", "advent.z5", 350, 36),
    Game(
        "adventureland",
        "Adventureland",
        "a42545bd17330ae5e6fed02270ccfb4a",
        "adventureland.z5",
        100,
    ),
    Game("afflicted", "Afflicted", "064272be87de7106192b6fb743c4dfc4", "afflicted.z8", 75),
    Game("anchor", "Anchorhead", "c043df8624e0e1e9fda92f1a74b6e402", "anchor.z8", 100),
    Game("awaken", "The Awakening", "9ba48c72d96ab3e7956a8570b12d34d6", "awaken.z5", 50),
    Game("balances", "Balances", "f2cb8f94a7e8df3b850a758da26fa387", "balances.z5", 51),
    Game("ballyhoo", "Ballyhoo", "5d54e326815b0ed3aff8efb8ff02ef2f", "ballyhoo.z3", 200),
    Game("curses", "Curses", "f06a42a29a5a4e6aa70958c9ae4c37cd", "curses.z5", 550),
    Game("cutthroat", "Cutthroats", "216eeeba1c8017a77343dc8482f6f185", "cutthroat.z3", 250),
    Game("deephome", "Deephome", "5e56a6e5cdeecded434a8fd8012fc2c6", "deephome.z5", 300, 1),
    Game("detective", "Detective", "822655c9be83e292e06d3d3b1d6a9734", "detective.z5", 360, 10),
    Game("dragon", "Dragon Adventure", "96d314997e5d3a5a793c83845977d44d", "dragon.z5", 25),
    Game("enchanter", "Enchanter", "ad3cdea88d81033fe29167688bd98c31", "enchanter.z3", 400),
    Game("enter", "The Enterprise Incidents", "4c48ba2c5523d78c5f7f9b7809d16b1d", "enter.z5", 20),
    Game("gold", "Goldilocks is a FOX!", "f275ddf32ce8a9e744d53c3b99c5a658", "gold.z5", 100),
    Game(
        "hhgg",
        "The Hitchhiker's Guide to the Galaxy",
        "6666389f60e0c8e4ceb08242a263bb52",
        "hhgg.z3",
        400,
    ),
    Game("hollywood", "Hollywood Hijinx", "1ea91a064941a3f612b20833f0a47df7", "hollywood.z3", 150),
    Game("huntdark", "Hunter, in Darkness", "253b02c8012710577085b9fd3a155cb7", "huntdark.z5", 1),
    Game("infidel", "Infidel", "425fa66869309d7ed7f8ef04a492fbb7", "infidel.z3", 400),
    Game("inhumane", "Inhumane", "84d3ce7ccfafb873736490811a0cc78c", "inhumane.z5", 90),
    Game("jewel", "The Jewel of Knowledge", "1eef9c0fa009ca4adf4872cfc5249d45", "jewel.z5", 90),
    Game("karn", "Return to Karn", "ec55791be814db3663ad1aec0d6b7690", "karn.z5", 170),
    Game(
        "library",
        "All Quiet on the Library Front",
        "daf57133d346442b983bd333fb586cc4",
        "library.z5",
        30,
    ),
    Game("loose", "Mother Loose", "31a0c1e360dce94aa5bece5240691d17", "loose.z5", 50),
    Game("lostpig", "Lost Pig", "aaf0b90fbb31717481c02832bf412070", "lostpig.z8", 7),
    Game(
        "ludicorp",
        "The Ludicorp Mystery",
        "646a63307f77dcdcd011f330277ae262",
        "ludicorp.z5",
        150,
        1,
    ),
    Game("lurking", "The Lurking Horror", "5f42ff092a2f30471ae98150ef4da2e1", "lurking.z3", 100),
    Game("moonlit", "The Moonlit Tower", "bf75b9651cff0e2d04302f19c443588e", "moonlit.z5", 1),
    Game("murdac", "Monsters of Murdac", "570179d4f21b2f600862dbffbb5afc3e", "murdac.z5", 250),
    Game(
        "night", "Night at the Computer Center", "72125f159cccd581786ac16a2828d4e3", "night.z5", 10
    ),
    Game("omniquest", "OMNIQuest", "80ea198bca425b6d819c74bfa854236e", "omniquest.z5", 50),
    Game("partyfoul", "Party Foul", "d221daa82708c4e54447f1a884c239ef", "partyfoul.z8", 1),
    Game("pentari", "Pentari: First Light", "f24c6863468823b744e910ccfe997c6d", "pentari.z5", 70),
    Game("planetfall", "Planetfall", "6487dc814b280f5603c53155de378d27", "planetfall.z3", 80),
    Game("plundered", "Plundered Hearts", "6ae4fd54b7e55675ec7e54ec4dd26462", "plundered.z3", 25),
    Game("reverb", "Reverberations", "be6d5fa9587a079782b64739e629461f", "reverb.z5", 50),
    Game("seastalker", "Seastalker", "ee339dbdbb0792f67e20bd71bafe0ea5", "seastalker.z3", 100),
    Game(
        "sherbet",
        "The Meteor, the Stone and a Long Glass of Sherbet",
        "53bf7a60017e06998cc1542cf35f76fa",
        "sherbet.z5",
        30,
        has_walkthrough=False,
    ),
    Game(
        "sherlock",
        "Sherlock: The Riddle of the Crown Jewels",
        "35240654d83f9e7073973d338f9657b8",
        "sherlock.z5",
        100,
    ),
    Game("snacktime", "Snack Time!", "0ff228d12d7cb470dc1a8e9a5151769b", "snacktime.z8", 50),
    Game("sorcerer", "Sorcerer", "20f1468a058d0a6de016ae70022e651c", "sorcerer.z3", 400),
    Game("spellbrkr", "Spellbreaker", "7a92ce19a39bedd970d0f1e296981f71", "spellbrkr.z3", 600),
    Game("spirit", "Spiritwrak", "808039c4e9554bdd15d7793539b3bd97", "spirit.z5", 250),
    Game("temple", "The Temple", "22a0ddac6be15540616c10f1007197f3", "temple.z5", 35),
    Game("theatre", "Theatre", "33dcc5085acb290d1817e07653c13480", "theatre.z5", 50),
    Game("trinity", "Trinity", "3bf1a444a1fc2057130ecb9806117233", "trinity.z4", 100),
    Game("tryst205", "Tryst of Fate", "fc65ad8d4588da92fd39871f6f7463db", "tryst205.z5", 350),
    Game("weapon", "The Weapon", "c632204be3849d6c5bb6f4eb5aca3cc0", "weapon.z5", 1),
    Game("wishbringer", "Wishbringer", "87ed53d854f7e57c36106fca3b9cf5a6", "wishbringer.z3", 100),
    Game(
        "yomomma",
        "Raising the Flag on Mount Yo Momma",
        "5b10162a7a134e7b4c381ecedfb4bc44",
        "yomomma.z8",
        35,
    ),
    Game(
        "zenon",
        "Escape from the Starship Zenon",
        "631cc926b4251f5a5f646d3a6bdac8c6",
        "zenon.z5",
        20,
    ),
    Game("zork1", "Zork I", "b732a93a6244ddd92a9b9a3e3a46c687", "zork1.z5", 350),
    Game("zork2", "Zork II", "5bcd91ee055e9bd42812617571be227b", "zork2.z5", 400),
    Game("zork3", "Zork III", "ffda9ee2d428fa2fa8e75a1914ff6959", "zork3.z5", 7),
    Game(
        "ztuu",
        "Zork: The Undiscovered Underground",
        "d8e1578470cbc676e013e03d72c93141",
        "ztuu.z5",
        100,
    ),
)
"""Every supported game, by name."""

MIT_ZORK1_MD5 = "1d4606016ea58ee038da53d994392323"
"""Zork I release 119, which its owner published under the MIT licence; it stands in for zork1."""


def find_game(name: str) -> Game:
    """Return the game called ``name``.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    for game in GAMES:
        if game.name == name:
            return game
    names = [game.name for game in GAMES]
    raise ConfigError(
        f"No game `{name}`.{did_you_mean(name, names)} jericho supports: {', '.join(names)}"
    )
