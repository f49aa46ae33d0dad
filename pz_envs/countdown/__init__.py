"""Countdown: make the target from the numbers, each used exactly once."""
