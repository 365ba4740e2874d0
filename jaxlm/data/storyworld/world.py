"""The worlds: every word, wording and probability of the stories, in one frozen dataclass to tune.

A sentence is chosen in three steps: a kind given the state, the words for the kind's slots given the state, a wording
of the kind. `KINDS` of `jaxlm.data.storyworld.grammar` says what each kind does; here is how often, in which words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from jaxlm.errors import InputError

Weights = tuple[tuple[str, float], ...]

# The class of words that fills each slot of a wording. A word belongs to one class only, and no fixed word of a wording
# belongs to any: so a sentence has one reading.
SLOTS = {
    "who": "names", "other": "names", "place": "places", "thing": "things", "colour": "colours",
    "act": "acts", "mood": "moods",
}  # fmt: skip
PRONOUNS = ("He", "She")


@dataclass(frozen=True)
class World:
    """Everything that decides a world's stories and questions. Change a copy with `dataclasses.replace`.

    Attributes:
        names, places, things, colours, acts, moods: the words a story draws on.
        kinds: weights of the kinds of sentence that are no introductions; those impossible at the moment are left out.
        wordings: for each kind its wordings and their probabilities, which sum to 1.
        ending: probability that the story ends after 0, 1, 2, ... sentences that are no introductions, once everybody
            is introduced; the last is 1.
        questions: the types of question, asked in turn.
        n_people: people in a story.
        arrive: probability that the next of them is introduced after 0, 1, 2, ... sentences since the introduction of
            the last; the last is 1, so (1.0,) introduces all of them first.
        max_places: a story names at most this many places.
        arrive_new, move_new: probability that a person is introduced in, and that a move goes to, a place not yet
            named, while fewer than `max_places` are.
        min_things: a story has at least this many things, and at most one for each person.
        own: probability that a person is introduced with a thing (1 where `min_things` asks for it).
        pronoun: probability that a sentence about the subject of the last one says She or He.
        girls: the names that go with She; the others go with He.
        min_candidates: a question is asked only where at least this many answers are possible.
        keep_last: a question whose answer is the candidate that the story mentions last is kept with this probability,
            so that naming the last mention is no good strategy.
        held_out: the share of all stories in each of the validation and test splits.
    """

    name: str
    names: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    colours: tuple[str, ...]
    acts: tuple[str, ...]
    kinds: Weights
    wordings: tuple[tuple[str, Weights], ...]
    ending: tuple[float, ...]
    questions: tuple[str, ...]
    n_people: int
    arrive: tuple[float, ...]
    max_places: int
    arrive_new: float
    move_new: float
    min_things: int
    own: float
    moods: tuple[str, ...] = ()
    pronoun: float = 0.0
    girls: tuple[str, ...] = ()
    min_candidates: int = 3
    keep_last: float = 0.5
    held_out: float = 0.1

    def __post_init__(self) -> None:
        if not 2 <= self.min_things <= self.n_people < self.max_places or {self.ending[-1], self.arrive[-1]} != {1.0}:
            raise InputError(
                f"world {self.name!r} has min_things={self.min_things}, n_people={self.n_people}, max_places="
                f"{self.max_places}, ending[-1]={self.ending[-1]} and arrive[-1]={self.arrive[-1]}: make "
                "2 <= min_things <= n_people < max_places, ending[-1] = 1 and arrive[-1] = 1"
            )

    def pronoun_of(self, who: str) -> str:
        return PRONOUNS[who in self.girls]

    @cached_property
    def body(self) -> dict[str, float]:
        """The kinds of sentence that are no introductions, and their probabilities."""
        total = sum(weight for _, weight in self.kinds)
        return {kind: weight / total for kind, weight in self.kinds}

    @cached_property
    def wordings_of(self) -> dict[str, tuple[tuple[str, ...], tuple[float, ...]]]:
        """For each kind its wordings and their probabilities."""
        return {kind: (tuple(w for w, _ in ways), tuple(p for _, p in ways)) for kind, ways in self.wordings}

    @cached_property
    def max_tokens(self) -> int:
        """No story has more words and marks than this: every introduction, and the longest sentence to the last."""
        longest = {
            kind: max(len(re.findall(r"\w+|[^\w\s]", re.sub(r"{\w+}", "word", wording))) for wording, _ in ways)
            for kind, ways in self.wordings
        }
        opening = self.n_people * (longest["arrive"] + longest["own"])
        return opening + (len(self.ending) - 1) * max(longest[kind] for kind in self.body)

    @cached_property
    def class_of(self) -> dict[str, str]:
        """The class of each word that fills slots."""
        words = {word: name for name in set(SLOTS.values()) for word in getattr(self, name)}
        return words | dict.fromkeys(PRONOUNS, "names") if self.pronoun else words

    @cached_property
    def readings(self) -> dict[str, list[tuple[str, str, list[str]]]]:
        """For each shape of sentence, its words in slots replaced by classes, the (kind, wording, slots) giving it."""
        readings: dict[str, list[tuple[str, str, list[str]]]] = {}
        for kind, ways in self.wordings:
            for wording, _ in ways:
                slots = re.findall(r"{(\w+)}", wording)
                shape = re.sub(r"{(\w+)}", lambda slot: f"<{SLOTS[slot[1]]}>", wording)
                readings.setdefault(shape, []).append((kind, wording, slots))
        return readings


def _even(*wordings: str) -> Weights:
    return tuple((wording, 1.0 / len(wordings)) for wording in wordings)


_GIRLS = "Anna Clara Emma Grace Iris Kate Mia Olga Rosa Tina Wendy Bella"
_BOYS = "Ben David Felix Henry Jack Leo Noah Paul Sam Victor Adam Carl"
_PLACES = (
    "kitchen garden barn attic cellar library market orchard forest meadow harbour tower bakery chapel cave mill park "
    "school village castle valley stable museum hall"
)
_THINGS = (
    "lamp ball kite drum book cup hat key rope bell basket coin flute box ring scarf doll bottle brush clock mirror "
    "blanket shell ladder candle spoon puppet bucket"
)
_COLOURS = "red blue green yellow white black brown pink grey purple golden silver"
_ACTS = (
    "smiled laughed sang danced yawned waved rested hummed cheered whistled sneezed sighed waited nodded jumped "
    "giggled frowned clapped stretched coughed"
)
_WALKING = ("went", "walked", "ran", "hurried", "came", "rushed", "strolled", "moved")
# A thing looked at by its own name, so that owner and colour stand as far after it as in the recaps.
_OWN = ("A {thing} belonged to {who}; the {thing} first looked {colour}.", 1.0)

SMALL = World(
    name="small",
    names=tuple(_GIRLS.split()[:8] + _BOYS.split()[:8]),
    places=tuple(_PLACES.split()[:16]),
    things=tuple(_THINGS.split()[:16]),
    colours=tuple(_COLOURS.split()[:8]),
    acts=tuple(_ACTS.split()[:8]),
    kinds=(
        ("move", 0.12), ("give", 0.13), ("act", 0.02),
        ("where", 0.12), ("with", 0.19), ("got", 0.20), ("hue", 0.22),
    ),
    wordings=(
        ("arrive", (("{who} lived in the {place}.", 1.0),)),
        ("own", (_OWN,)),
        ("move", _even(*(f"{{who}} {verb} to the {{place}}." for verb in _WALKING[:3]))),
        (
            "give",
            _even(
                "{who} handed the {thing} over to {other}; {other} gladly took the {thing}.",
                "{who} passed the {thing} on to {other}; {other} gladly took the {thing}.",
            ),
        ),
        ("act", (("{who} {act}.", 1.0),)),
        ("where", (("{who} was in the {place}.", 0.7), ("{who} stayed in the {place}.", 0.3))),
        ("with", (("The {thing} belonged to {who}.", 1.0),)),
        ("got", (("{who} last got the {thing}.", 1.0),)),
        ("hue", (("The {thing} still looked {colour}.", 1.0),)),
    ),
    ending=(0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.5, 1.0),
    questions=("where", "with", "hue", "got"),
    n_people=3,
    arrive=(0.5, 0.5, 1.0),
    max_places=4,
    arrive_new=0.5,
    move_new=0.2,
    min_things=2,
    own=0.8,
)  # fmt: skip

_MORE_GIRLS = "Lucy Nora Sofia Eva"
_MORE_BOYS = "Max Oscar Peter Tom"
_MORE_PLACES = "bedroom temple tent cottage"
_MORE_THINGS = "letter wagon violin vase"

RICH = World(
    name="rich",
    names=tuple(f"{_GIRLS} {_MORE_GIRLS} {_BOYS} {_MORE_BOYS}".split()),
    girls=tuple(f"{_GIRLS} {_MORE_GIRLS}".split()),
    places=tuple(f"{_PLACES} {_MORE_PLACES}".split()),
    things=tuple(f"{_THINGS} {_MORE_THINGS}".split()),
    colours=tuple(_COLOURS.split()),
    acts=tuple(_ACTS.split()),
    moods=("happy", "sad", "tired", "hungry", "angry", "proud", "calm", "bored", "lonely", "excited"),
    kinds=(
        ("move", 0.14), ("give", 0.10), ("paint", 0.05), ("feel", 0.10), ("act", 0.02), ("greet", 0.02),
        ("where", 0.17), ("with", 0.14), ("got", 0.22), ("hue", 0.13), ("found", 0.12), ("felt", 0.12),
    ),
    wordings=(
        ("arrive", (("{who} lived in the {place}.", 1.0),)),
        ("own", (_OWN,)),
        (
            "move",
            _even(
                *(f"{{who}} {verb} to the {{place}}." for verb in _WALKING),
                "Then {who} went to the {place}.", "Later {who} walked to the {place}.",
            ),
        ),
        (
            "give",
            _even(
                "{who} gave the {thing} away to {other}; {other} gladly took the {thing}.",
                "{who} sent the {thing} off to {other}; {other} soon took the {thing}.",
                "{who} handed the {thing} over to {other}; {other} gladly took the {thing}.",
                "{who} passed the {thing} on to {other}; {other} soon took the {thing}.",
            ),
        ),
        ("paint", (("Thanks to {who} the {thing} now looked {colour}.", 1.0),)),
        ("feel", _even("{who} now felt {mood}.", "{who} suddenly felt {mood}.")),
        ("act", (("{who} {act}.", 1.0),)),
        ("greet", (("{who} greeted {other}.", 0.5), ("{who} thanked {other}.", 0.5))),
        (
            "where",
            (
                ("{who} was in the {place}.", 0.6), ("{who} stayed in the {place}.", 0.2),
                ("{who} remained in the {place}.", 0.2),
            ),
        ),
        ("with", (("The {thing} belonged to {who}.", 1.0),)),
        ("got", (("{who} last got the {thing}.", 0.7), ("{who} last received the {thing}.", 0.3))),
        ("hue", (("The {thing} still looked {colour}.", 1.0),)),
        ("found", (("The {thing} stayed with {who} over in the {place}.", 1.0),)),
        ("felt", (("{who} still felt {mood}.", 1.0),)),
    ),
    ending=(*[0.0] * 10, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.35, 0.5, 1.0),
    questions=("where", "with", "hue", "got", "found", "felt"),
    n_people=4,
    arrive=(0.5, 0.5, 0.5, 1.0),
    max_places=6,
    arrive_new=0.6,
    move_new=0.15,
    min_things=3,
    own=0.7,
    pronoun=0.6,
)  # fmt: skip

WORLDS: dict[str, World] = {"small": SMALL, "rich": RICH}
