"""The ORZ hybrid: a world model and a language model, trained side by side on one game.

The world model's half is UniZero's loop as it stands (``priorzero``). The language model's half
samples answers to prompts made of states that the world model's play came to (``prompt``), tries
each in the true game (``trials``, here or in ``engines`` on a runtime), and learns from what that
paid by PPO or GRPO (``half``). ``settings`` and ``presets`` say how, by the names that ORZ uses.
"""
