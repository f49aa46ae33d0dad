"""From turns to token ids and back: prompt templates, conversations, language-model agents."""

from pz_agents.prompting.agents import BestOfN, ZeroShot
from pz_agents.prompting.conversation import Conversation
from pz_agents.prompting.templates import TEMPLATES, Template, find_template

__all__ = ["TEMPLATES", "BestOfN", "Conversation", "Template", "ZeroShot", "find_template"]
