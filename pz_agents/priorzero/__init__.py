"""UniZero and PriorZero: a world model learned from play, a search, and a language model's prior.

``settings`` is what a run is told, ``run`` collects, remembers and learns in turn, ``phases`` says
which half learns when. ``actor`` chooses commands, ``collect`` and ``games`` play many episodes at
once, ``evaluate`` plays each half alone, ``agent`` plays what was learned. Of the language model,
``prior`` asks it, ``language`` trains it on what ``memory`` draws, and ``guidance`` keeps both.
"""
