"""Agents for text environments: language models, rollouts, algorithms, trainers, and an SDK."""
