"""What generated games say: a grammar in the format of the game files, without their text.

The sentences that an agent meets in play ("You arrive at desk 1. On the desk 1, you see nothing.")
are the game's interface and the same as ALFWorld's; the rules that produce them, and the list that
``help`` prints, are pz's own. A test holds a generated game against the same game under the grammar
that the alfworld package ships.
"""

from __future__ import annotations

import functools
import itertools
import json

_HERE = "atlocation(a:agent, l:location) & receptacleatlocation(r:receptacle, l:location)"
_BESIDE = (
    f"{_HERE} & objectatlocation(o:object, l:location) & not_inreceptacle(o:object, r:receptacle)"
)
_ACTIONS = {
    "look": ("look", "#surroundings#"),
    "inventory": ("inventory", "#carried#"),
    "help": ("help", "#commands#"),
    "goToLocation": ("go to {r}", "You arrive at {r.name}. #contents#"),
    "openObject": ("open {r}", "You open the {r.name}. #contents#"),
    "closeObject": ("close {r}", "You close the {r.name}."),
    "examineReceptacle": ("examine {r}", "#contents#"),
    "examineObject": ("examine {o}", "#condition#"),
    "pickupObject": ("take {o} from {r}", "You pick up the {o.name} from the {r.name}."),
    "putObject": ("move {o} to {r}", "You move the {o.name} to the {r.name}."),
    "heatObject": ("heat {o} with {r}", "You heat the {o.name} using the {r.name}."),
    "coolObject": ("cool {o} with {r}", "You cool the {o.name} using the {r.name}."),
    "cleanObject": ("clean {o} with {r}", "You clean the {o.name} using the {r.name}."),
    "toggleObject": ("use {o}", "You turn on the {o.name}."),
    "sliceObject": ("slice {co} with {ko}", "You sliced the {co.name} with the {ko.name}."),
}
_COMMANDS = (
    "go to RECEPTACLE, open RECEPTACLE, close RECEPTACLE, take THING from RECEPTACLE, "
    "move THING to RECEPTACLE, heat, cool or clean THING with RECEPTACLE, use THING, "
    "slice THING with THING, examine THING or RECEPTACLE, look, inventory, help"
)


def grammar_text(task: str) -> str:
    """Return a game file's grammar.

    Args:
        task: what ``Your task is to: `` begins, without the full stop.
    """
    rules = _rules() | {"task": [{"rhs": f"Your task is to: {task}."}]}
    return f'grammar :: """\n{json.dumps(rules)}\n""";\n{_actions()}'


@functools.cache
def _actions() -> str:
    blocks = [
        f'action {name} {{\n template :: "{template}";\n feedback :: "{feedback}";\n}}'
        for name, (template, feedback) in _ACTIONS.items()
    ]
    return "\n".join(blocks) + "\n"


@functools.cache
def _rules() -> dict[str, list[dict[str, str]]]:
    seen = "you see [{a(o) | inreceptacle(o:object, r:receptacle)}]."
    rules = {
        "intro": [("", "-= Welcome to TextWorld, ALFRED! =-\n\n#surroundings#\n\n#task#")],
        "surroundings": [
            (_HERE, "You are facing the #place#. Next to it, you see #beside#."),
            ("", "You are in the middle of a room. Looking quickly around you, you see #places#."),
        ],
        "place": [("", f"{{r.name | {_HERE}}}")],
        "beside": [("", f"[{{a(o) | {_BESIDE}}}]")],
        "places": [("", "[{a(r) | receptacleatlocation(r:receptacle, l:location)}]")],
        "contents": [
            (
                "openable(r:receptacle) & opened(r:receptacle)",
                f"The {{r.name}} is open. In it, {seen}",
            ),
            ("openable(r:receptacle)", "The {r.name} is closed."),
            ("", f"On the {{r.name}}, {seen}"),
        ],
        "carried": [
            ("holdsany(a:agent)", "You are carrying: [{a(o) | holds(a:agent, o:object)}]."),
            ("", "You are not carrying anything."),
        ],
        "condition": [*_conditions(), ("", "There's nothing special about {o.name}.")],
        "commands": [("", f"Commands: {_COMMANDS}.")],
        "list_empty": [("", "nothing")],
        "list_separator": [("", ", ")],
        "list_last_separator": [("", ", and ")],
    }
    return {
        name: [{"condition": given, "rhs": _with_article(text)} for given, text in cases]
        for name, cases in rules.items()
    }


def _conditions() -> list[tuple[str, str]]:
    """Return what examining says of clean, hot, cool and sliced things, the fullest case first."""
    cases = []
    for clean, heat, sliced in itertools.product((1, 0), ("hot", "cool", ""), (1, 0)):
        facts = ["isclean"] * clean + [f"is{heat}"] * bool(heat) + ["issliced"] * sliced
        words = " and ".join([heat] * bool(heat) + ["clean"] * clean)
        if facts == ["iscool"]:
            words = "cold"
        if sliced:
            words = f"{words} sliced".strip()
        if facts:
            given = " & ".join(f"{fact}(o:object)" for fact in facts)
            cases.append((given, f"This is a {words} {{o.name}}."))
    return sorted(cases, key=lambda case: -case[0].count("&"))


def _with_article(text: str) -> str:
    """Write ``a(o)`` out: ``o.indefinite + ' ' + o.name``."""
    for variable in "or":
        text = text.replace(f"a({variable})", f"{variable}.indefinite + ' ' + {variable}.name")
    return text
