"""The words of GenEval's prompts: the classes of COCO as GenEval calls them, colours, numbers, relations.

GenEval renames three classes of COCO so that they name one thing: computer mouse, tv remote, computer
keyboard.
"""

from __future__ import annotations

from collections.abc import Mapping

CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,"
    "computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
"""In COCO's order, which is the order of a detector's outputs."""

PEOPLE = frozenset({"person"})

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

COUNTS: Mapping[int, str] = {2: "two", 3: "three", 4: "four"}

RELATIONS: Mapping[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
"""Each relation and its opposite."""

IRREGULAR: Mapping[str, str] = {
    "person": "people",
    "sheep": "sheep",
    "skis": "skis",
    "knife": "knives",
    "broccoli": "broccoli",
    "computer mouse": "computer mice",
    "scissors": "scissors",
}


def plural(name: str) -> str:
    """More than one of a class."""
    hisses = name.endswith(("s", "x", "z", "ch", "sh"))
    return IRREGULAR.get(name) or name + ("es" if hisses else "s")


def plain_plural(name: str) -> str:
    """The plural in GenEval's published files, which know no exceptions: "knifes", "benchs", "skises"."""
    return name + ("es" if name.endswith("s") else "s")


PLURALS: Mapping[str, str] = {name: plural(name) for name in CLASSES}
