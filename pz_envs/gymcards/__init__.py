"""RL4VLM's gym_cards as text: NumberLine, EZPoints, Points24 and Blackjack."""
