"""From turns to token ids and back: prompt templates, conversations, language-model agents."""

from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.conversation import Conversation
from pz_agents.prompting.react import ReAct
from pz_agents.prompting.several import BestOfN, SelfConsistency
from pz_agents.prompting.templates import TEMPLATES, Template, find_template

__all__ = [
    "TEMPLATES",
    "BestOfN",
    "Conversation",
    "ReAct",
    "SelfConsistency",
    "Template",
    "ZeroShot",
    "find_template",
]
