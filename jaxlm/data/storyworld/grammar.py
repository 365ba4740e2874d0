"""One sentence at a time: the state of a story, the kinds of sentence, and the choices that make one.

`next_sentence` is the whole grammar, as a function of the state and of `choose`, which makes every choice: drawn at
random when a story is told, read from the text when it is scored, taken in turn when all sentences are listed. So the
three cannot disagree about a probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from jaxlm.data.storyworld.world import World


class State(NamedTuple):
    """What is true after the sentences so far.

    Tuples run in parallel: `people`, `at`, `moods` and `got`; `things`, `colours` and `holders`.
    """

    people: tuple[str, ...] = ()
    at: tuple[str, ...] = ()  # the place of each person
    moods: tuple[str, ...] = ()  # of each person; "" where none was told
    got: tuple[str, ...] = ()  # the thing that each person was given last; "" where none was
    places: tuple[str, ...] = ()  # every place named so far
    things: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    told: tuple[tuple[str, str], ...] = ()  # the facts (what, of whom) of the last sentence, not to be repeated at once
    subject: str = ""  # whom a pronoun in the next sentence would mean; "" where that is not clear
    arrived: bool = False  # the last sentence introduced a person, who may own a thing
    since: int = 0  # sentences since the last introduction
    n_body: int = 0  # sentences that introduce nobody and nothing

    def place(self, who: str) -> str:
        return self.at[self.people.index(who)]

    def holder(self, thing: str) -> str:
        return self.holders[self.things.index(thing)]

    def colour(self, thing: str) -> str:
        return self.colours[self.things.index(thing)]

    def mood(self, who: str) -> str:
        return self.moods[self.people.index(who)]

    def last_got(self, who: str) -> str:
        return self.got[self.people.index(who)]


class Choose(Protocol):
    """Makes one choice: an element of `options`, uniformly or by `weights` (which need not sum to 1)."""

    def __call__(self, name: str, options: Sequence[str], weights: Sequence[float] | None = None) -> str: ...


Slots = dict[str, str]
Kind = Callable[[World, State, Choose], tuple[Slots, State]]


def next_sentence(world: World, state: State, choose: Choose) -> tuple[str | None, State]:
    """Chooses the next sentence of a story, or its end.

    Args:
        world: the world.
        state: what the sentences so far have said.
        choose: makes the choices named "end", "kind", one per slot of the kind, "wording" and "form", in this order.

    Returns:
        The sentence and the state after it; None and the same state where the story ends.
    """
    end = 0.0 if len(state.people) < world.n_people or state.arrived else world.ending[state.n_body]
    if end > 0.0 and choose("end", ("end", "more"), (end, 1.0 - end)) == "end":
        return None, state
    kind = choose("kind", *kinds_next(world, state))
    slots, after = KINDS[kind](world, state, choose)
    wording = choose("wording", *world.wordings_of[kind])
    if not world.pronoun:
        return wording.format_map(slots), after
    who = slots.get("who", "")
    if wording.startswith("{who}"):
        if who == state.subject:
            form = choose("form", ("name", "pronoun"), (1.0 - world.pronoun, world.pronoun))
            slots = {**slots, "who": world.pronoun_of(who)} if form == "pronoun" else slots
        other = slots.get("other")
        clear = other is None or world.pronoun_of(other) != world.pronoun_of(who)
        return wording.format_map(slots), after._replace(subject=who if clear else "")
    return wording.format_map(slots), after._replace(subject="")


def kinds_next(world: World, state: State) -> tuple[Sequence[str], Sequence[float]]:
    """The kinds of sentence that can come next, and their weights, which sum to 1."""
    pairs: list[tuple[str, float]] = []
    left = 1.0
    if state.arrived:
        still_to_come = world.n_people - len(state.people) + 1
        own = 1.0 if world.min_things - len(state.things) >= still_to_come else world.own
        pairs, left = [("own", own)], 1.0 - own
    if len(state.people) < world.n_people:
        arrive = world.arrive[state.since] if state.people else 1.0
        pairs, left = [*pairs, ("arrive", left * arrive)], left * (1.0 - arrive)
    if left > 0.0:
        body = world.body
        left_out = [kind for kind, possible in _POSSIBLE.items() if kind in body and not possible(state)]
        scale = left / (1.0 - sum(body[kind] for kind in left_out))
        pairs += [(kind, scale * weight) for kind, weight in body.items() if kind not in left_out]
    return [kind for kind, _ in pairs], [weight for _, weight in pairs]


def _but(options: Sequence[str], *left_out: str) -> tuple[str, ...]:
    return tuple(option for option in options if option not in left_out)


def _untold(state: State, fact: str, options: Sequence[str]) -> Sequence[str]:
    """The options whose `fact` was not told by the last sentence."""
    told = [subject for what, subject in state.told if what == fact]
    return _but(options, *told) if told else options


def _put(values: tuple[str, ...], index: int, value: str) -> tuple[str, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _said(state: State, *told: tuple[str, str]) -> State:
    return state._replace(told=told, arrived=False, since=state.since + 1, n_body=state.n_body + 1)


# Introductions: of the people, one after the other, each in a place and some with a thing.


def _arrive(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """A new person, in a place that the story has or in a new one."""
    who = choose("who", _but(world.names, *state.people))
    place = _choose_place(world, choose, state.places, state.places, world.arrive_new)
    after = state._replace(
        people=(*state.people, who),
        at=(*state.at, place),
        moods=(*state.moods, ""),
        got=(*state.got, ""),
        places=_with_place(state, place),
        told=(("where", who),),
        arrived=True,
        since=0,
    )
    return {"who": who, "place": place}, after


def _own(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """The person just introduced has a new thing, of any colour."""
    who = choose("who", (state.people[-1],))
    thing = choose("thing", _but(world.things, *state.things))
    colour = choose("colour", world.colours)
    after = state._replace(
        things=(*state.things, thing),
        colours=(*state.colours, colour),
        holders=(*state.holders, who),
        told=(("with", thing), ("hue", thing)),
        arrived=False,
    )
    return {"who": who, "colour": colour, "thing": thing}, after


# Events: they change the state.


def _move(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """Anyone goes to another place: mostly one of the story's, each equally likely, at times a new one."""
    who = choose("who", state.people)
    index = state.people.index(who)
    place = _choose_place(world, choose, _but(state.places, state.at[index]), state.places, world.move_new)
    after = _said(state, ("where", who))._replace(at=_put(state.at, index, place), places=_with_place(state, place))
    return {"who": who, "place": place}, after


def _choose_place(world: World, choose: Choose, known: Sequence[str], named: Sequence[str], chance_new: float) -> str:
    """One of `known`, or with `chance_new` one that is not yet `named`, while fewer than `max_places` are."""
    if len(named) == world.max_places:
        return choose("place", known)
    new = _but(world.places, *named)
    if not known:
        return choose("place", new)
    weights = [(1.0 - chance_new) / len(known)] * len(known) + [chance_new / len(new)] * len(new)
    return choose("place", (*known, *new), weights)


def _with_place(state: State, place: str) -> tuple[str, ...]:
    return state.places if place in state.places else (*state.places, place)


def _give(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """Any thing goes from its holder to anyone else."""
    thing = choose("thing", state.things)
    who = choose("who", (state.holder(thing),))
    other = choose("other", _but(state.people, who))
    holders = _put(state.holders, state.things.index(thing), other)
    got = _put(state.got, state.people.index(other), thing)
    after = _said(state, ("with", thing), ("got", other))._replace(holders=holders, got=got)
    return {"thing": thing, "who": who, "other": other}, after


def _paint(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """The holder of any thing gives it another colour."""
    thing = choose("thing", state.things)
    who = choose("who", (state.holder(thing),))
    colour = choose("colour", _but(world.colours, state.colour(thing)))
    colours = _put(state.colours, state.things.index(thing), colour)
    after = _said(state, ("hue", thing), ("with", thing))._replace(colours=colours)
    return {"thing": thing, "who": who, "colour": colour}, after


def _feel(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """Anyone comes into another mood."""
    who = choose("who", state.people)
    mood = choose("mood", _but(world.moods, state.mood(who)))
    moods = _put(state.moods, state.people.index(who), mood)
    return {"who": who, "mood": mood}, _said(state, ("felt", who))._replace(moods=moods)


def _act(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """Anyone does something that changes nothing."""
    slots = {"who": choose("who", state.people), "act": choose("act", world.acts)}
    return slots, _said(state)


def _greet(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """Anyone does something to anyone else that changes nothing."""
    who = choose("who", state.people)
    return {"who": who, "other": choose("other", _but(state.people, who))}, _said(state)


# Recaps: any fact that the last sentence did not tell, of anyone or anything. What they say follows from the state.


def _where(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    who = choose("who", _untold(state, "where", state.people))
    return {"who": who, "place": choose("place", (state.place(who),))}, _said(state, ("where", who))


def _with(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    thing = choose("thing", _untold(state, "with", state.things))
    return {"thing": thing, "who": choose("who", (state.holder(thing),))}, _said(state, ("with", thing))


def _got(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """What someone was given last, whether they still have it or not."""
    who = choose("who", _given(state))
    return {"who": who, "thing": choose("thing", (state.last_got(who),))}, _said(state, ("got", who))


def _hue(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    thing = choose("thing", _untold(state, "hue", state.things))
    return {"thing": thing, "colour": choose("colour", (state.colour(thing),))}, _said(state, ("hue", thing))


def _found(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    """The place of a thing is its holder's: two steps, of which the sentence says both."""
    thing = choose("thing", _untold(state, "found", state.things))
    who = choose("who", (state.holder(thing),))
    place = choose("place", (state.place(who),))
    after = _said(state, ("found", thing), ("with", thing), ("where", who))
    return {"thing": thing, "who": who, "place": place}, after


def _felt(world: World, state: State, choose: Choose) -> tuple[Slots, State]:
    who = choose("who", _moody(state))
    return {"who": who, "mood": choose("mood", (state.mood(who),))}, _said(state, ("felt", who))


def _given(state: State) -> Sequence[str]:
    return _untold(state, "got", [who for who in state.people if state.last_got(who)])


def _moody(state: State) -> Sequence[str]:
    return _untold(state, "felt", [who for who in state.people if state.mood(who)])


KINDS: dict[str, Kind] = {
    "arrive": _arrive, "own": _own,
    "move": _move, "give": _give, "paint": _paint, "feel": _feel, "act": _act, "greet": _greet,
    "where": _where, "with": _with, "got": _got, "hue": _hue, "found": _found, "felt": _felt,
}  # fmt: skip
EVENTS = ("move", "give", "paint", "feel")
RECAPS = ("where", "with", "got", "hue", "found", "felt")

# Kinds that are not always possible.
_POSSIBLE: dict[str, Callable[[State], bool]] = {
    "give": lambda state: bool(state.things) and len(state.people) > 1,
    "paint": lambda state: bool(state.things),
    "greet": lambda state: len(state.people) > 1,
    "where": lambda state: bool(_untold(state, "where", state.people)),
    "with": lambda state: bool(_untold(state, "with", state.things)),
    "got": lambda state: bool(_given(state)),
    "hue": lambda state: bool(_untold(state, "hue", state.things)),
    "found": lambda state: bool(_untold(state, "found", state.things)),
    "felt": lambda state: bool(_moody(state)),
}
