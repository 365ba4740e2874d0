"""Each command that docs/clusters.md shows, read by the program that it is for."""

from __future__ import annotations

import re
import shlex

import pytest


@pytest.fixture(scope="module")
def commands(checkout):
    """The lines of the page's shell blocks, without prompts, comments and what the shell does itself."""
    page = (checkout / "docs" / "clusters.md").read_text()
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S))
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", text, flags=re.S).splitlines():
        if line.startswith(("jaxlm ", "prefect ")):
            line = re.sub(
                r"\b(SCHEDULE_)?ID\b", "01234567-89ab-4def-8123-456789abcdef", line
            )  # for the reader to fill in
            found.append(shlex.split(line, comments=True))
    return found


def test_every_command_of_ours_is_understood(commands):
    from jaxlm.cli import app

    ours = [words[1:] for words in commands if words[0] == "jaxlm"]
    assert len(ours) >= 8
    for words in ours:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert command.__name__.removesuffix("_flows") in words[0], words
        assert bound.arguments or words == ["serve-flows"], words


def test_every_command_of_prefects_is_understood(commands):
    from prefect.cli._app import _app

    theirs = [words[1:] for words in commands if words[0] == "prefect"]
    assert len(theirs) >= 8
    for words in theirs:
        command, _, _ = _app.parse_args(words, exit_on_error=False, print_error=False)
        assert callable(command), words
