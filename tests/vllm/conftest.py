"""These tests need vLLM: `make test-vllm` runs them; elsewhere the folder is empty."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
