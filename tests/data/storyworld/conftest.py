"""Stories and questions that several tests read."""

from __future__ import annotations

import pytest

from jaxlm.data.storyworld import WORLDS, Question, Story, World, questions, stories


@pytest.fixture(scope="session", params=sorted(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


@pytest.fixture(scope="session")
def told(world: World) -> list[Story]:
    return list(stories(world, 7, "train", {"small": 2000, "rich": 1000}[world.name]))


@pytest.fixture(scope="session")
def asked(world: World) -> list[Question]:
    return list(questions(world, 7, "train", {"small": 800, "rich": 600}[world.name]))
