"""Random streams by name: no global state, and a result does not depend on scheduling.

A stream is named by its parts, e.g. ``derive_seed(run_seed, "sampling", episode, turn)``.
The same parts give the same stream in any process and on any platform.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Return a seed in ``[1, 2**63 - 1]`` that is a hash of ``parts``, never 0."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (2**63 - 1) + 1


def generator(*parts: int | str) -> np.random.Generator:
    """Return the counter-based generator of the stream named by ``parts``."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))
