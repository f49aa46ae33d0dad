"""Any language model behind an OpenAI-compatible server, and what it serves written down."""

from pz_agents.serving.api import Call
from pz_agents.serving.server import ModelServer

__all__ = ["Call", "ModelServer"]
