"""Mathematics questions with one right answer: published sets and a procedural one."""
