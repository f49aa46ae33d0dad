"""Sokoban: push every box onto a target; Boxoban levels and solvable ones of our own."""
