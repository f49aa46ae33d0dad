"""Jericho: Z-machine interactive fiction, made safe for language models.

Importing this package loads no engine; ``pz_envs.jericho.env`` does when an environment is made.
"""

from pz_envs.jericho.games import GAMES, Game, find_game

__all__ = ["GAMES", "Game", "find_game"]
