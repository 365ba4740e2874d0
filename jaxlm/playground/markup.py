"""Tokens as a piece of HTML, for notebooks: coloured by surprise, with the rivals in each one's tooltip."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from jaxlm.playground.answers import End
from jaxlm.playground.explain import Token

_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.6"


def tokens_html(tokens: Iterable[Token], *, prompt: str = "", title: str = "", end: End | None = None) -> str:
    """An answer as one `<div>` that needs no script, style sheet or outside file.

    Args:
        tokens: of the answer.
        prompt: shown before it, paler.
        title: shown above it.
        end: its figures are shown below it.
    """
    parts = "".join(map(_span, tokens)) + html.escape(end.rest if end else "")
    head = f'<div style="font-weight:600">{html.escape(title)}</div>' if title else ""
    asked = f'<span style="opacity:.6">{html.escape(prompt)}</span>' if prompt else ""
    foot = f'<div style="opacity:.6">{html.escape(figures(end))}</div>' if end else ""
    return f'<div>{head}<div style="{_STYLE}">{asked}{parts}</div>{foot}</div>'


def figures(end: End) -> str:
    """How an answer ended, in the page's words: how many tokens, how fast, how surprising, and why it ended."""
    if not end.tokens:
        return "The settings left nothing to choose." if end.reason == "error" else f"no tokens; ended by {end.reason}"
    rate = (end.tokens - 1) / max(end.seconds - end.first_s, 1e-9)
    then = f", then {rate:.0f} a second" if end.tokens > 1 else ""
    return (
        f"{end.tokens} tokens, first after {end.first_s:.2f} s{then}; perplexity {end.perplexity:.3g}; "
        f"ended by {end.reason}"
    )


def _span(token: Token) -> str:
    # As on the page: nothing for a sure token, half the colour for one of a hundredth or less.
    strength = min(0.5, -math.log10(max(token.prob, 1e-9)) / 4)
    mark = "⏹" if token.ends else token.text or "·"
    return (
        f'<span style="background:rgb(24 89 181 / {strength:.2f});border-radius:3px" '
        f'title="{html.escape(describe(token))}">{html.escape(mark)}</span>'
    )


def describe(token: Token) -> str:
    """A token and its rivals in lines of plain text."""
    lines = [
        f"{visible(token.text)}  id {token.token}  rank {token.rank + 1}  model {percent(token.prob)}  "
        f"after settings {percent(token.kept)}"
    ]
    for rival in token.rivals:
        mark = "▸" if rival.token == token.token else " "
        dropped = "  (dropped)" if rival.kept == 0 else ""
        lines.append(f"{mark} {visible(rival.text)}  {percent(rival.prob)}{dropped}")
    return "\n".join(lines)


def visible(text: str) -> str:
    """A token's text with its blanks to be seen."""
    if not text:
        return "∅"
    text = text.replace("\n", "↵").replace("\t", "⇥")
    start = "␣" if text[0] == " " else text[0]
    return start + (text[1:-1] + ("␣" if text[-1] == " " else text[-1]) if len(text) > 1 else "")


def percent(p: float) -> str:
    """0.1234 as 12.3 %; what is below a thousandth keeps one digit."""
    if p >= 0.001:
        return f"{100 * p:.1f} %"
    return f"{100 * p:.1g} %" if p > 0 else "0 %"
