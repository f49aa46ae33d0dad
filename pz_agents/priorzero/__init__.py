"""UniZero, and what guides it: a world model learned from play, and the search that plays by it.

``settings`` is what a run is told, ``actor`` chooses commands by search, ``collect`` plays many
episodes at once, ``run`` collects, remembers and learns in turn, ``agent`` plays what was learned.
"""
