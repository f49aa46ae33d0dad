"""The algorithm x environment x model matrix: cells, runner, store, statistics, leaderboards."""
