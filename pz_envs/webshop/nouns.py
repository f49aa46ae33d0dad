"""The nouns of a title without a tagger: every word that no closed word class holds.

The original asks spaCy for the nouns and proper nouns of a title. Where a data folder brings that
list (``title_nouns.json``) it is used; this is the stand-in elsewhere. It is exact in outcome when
the goal's own product is bought; for other products the type factor of the reward can differ from
the original's, which is why the environment reports where its nouns came from.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]+(?:[-'][^\W\d_]+)*")

_CLOSED_TEXT = """
a an the this that these those each every all any both some no such own same other another
i you he she it we they me him her us them my your his its our their mine yours who whom whose
which what and or but nor so yet if than then because while as of in on at by for from to with
without within into onto over under above below between among through during before after
since until against about around across along near off out up down per via plus not only just
also too very more most less least much many few is are was were be been being am do does did
has have had can could will would shall should may might must one two three four five six seven
eight nine ten great good best new free big small large little easy perfect ideal suitable
compatible adjustable available soft high low long short full extra multi non anti ultra super
"""
_CLOSED = frozenset(_CLOSED_TEXT.split())


def title_nouns(title: str) -> tuple[str, ...]:
    """Return the lower-cased words of ``title`` outside the closed classes, in order."""
    return tuple(word for word in _WORD.findall(title.lower()) if word not in _CLOSED)
