"""The playground's controls in a notebook, as ipywidgets."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from jaxlm._frozen import validated
from jaxlm.errors import InputError
from jaxlm.loading import Loaded
from jaxlm.playground.answers import End, Note, can_chat, example_prompt, failed, side_by_side
from jaxlm.playground.explain import Token
from jaxlm.playground.markup import tokens_html
from jaxlm.playground.settings import USED, Settings, controls

try:
    import ipywidgets as widgets
except ModuleNotFoundError:
    raise InputError("panel: needs the package ipywidgets; pip install 'jaxlm[playground]'.") from None

_STEPS = {"temperature": 0.05, "top_p": 0.01}
NONE = "none"


class Panel:
    """A prompt, one or two models, the settings, and the answers with each token's rivals in its tooltip.

    Display it as the last line of a cell. `generate()` does what the button does, and waits for the end.

    Attributes:
        prompt, first, second: the widgets of what is asked of whom.
        settings: the widgets of the settings, by the names of `Settings`.
        view: everything together.
    """

    def __init__(self, models: Mapping[str, Loaded], *, prompt: str | None = None) -> None:
        """A panel for `models`, by the names to show; it begins with `prompt`, or one that the models know.

        Raises:
            InputError: there are none.
        """
        self._models = dict(models)
        names = list(self._models)
        if not names:
            raise InputError("models: expected at least one, found none; open_models() opens the newest run.")
        wide = widgets.Layout(width="98%")
        begin = example_prompt(self._models.values()) if prompt is None else prompt
        self.prompt = widgets.Textarea(value=begin, description="prompt", layout=wide)
        self.first = widgets.Dropdown(options=names, value=names[0], description="model")
        second = names[1] if len(names) > 1 else NONE
        self.second = widgets.Dropdown(options=[NONE, *names], value=second, description="beside")
        self.settings = {name: _widget(name, control) for name, control in controls().items()}
        self.go = widgets.Button(description="Generate", button_style="primary")
        self.stop = widgets.Button(description="Stop", disabled=True)
        self.status = widgets.Label()
        self.answers = [widgets.HTML(layout=widgets.Layout(width="49%")) for _ in range(2)]
        self.view = widgets.VBox(
            [
                self.prompt, widgets.HBox([self.first, self.second]), *self.settings.values(),
                widgets.HBox([self.go, self.stop, self.status]), widgets.HBox(self.answers),
            ]
        )  # fmt: skip
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.go.on_click(self._start)
        self.stop.on_click(lambda _: self._stopped.set())
        self.settings["strategy"].observe(lambda _: self._show_used(), names="value")
        self._show_used()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widgets, and for a page that was only saved, a line instead of them."""
        bundle: dict[str, Any] = self.view._repr_mimebundle_(**options)
        return bundle | {"text/plain": "The playground's panel: run this cell to see it."}

    def _start(self, _: Any) -> None:
        # In a thread, so that the kernel stays free to hear the stop button.
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self.generate, daemon=True)
            self._thread.start()

    def generate(self) -> None:
        """Asks the chosen models and shows their answers as they come; what is wrong is told beside the buttons."""
        self._stopped.clear()
        self.go.disabled, self.stop.disabled = True, False
        chosen = [name for name in (self.first.value, self.second.value) if name != NONE]
        said: list[list[Token]] = [[] for _ in chosen]
        for box in self.answers:
            box.value = ""
        try:
            settings = validated(Settings, {name: widget.value for name, widget in self.settings.items()})
            self.status.value = "generating"
            panes = {str(i): self._models[name] for i, name in enumerate(chosen)}
            breaks = ["\n\n" if settings.chat and can_chat(self._models[name]) else "" for name in chosen]
            lasting, reasons = "", set[str]()
            for pane, event in side_by_side(panes, self.prompt.value, settings, stopped=self._stopped.is_set):
                i = int(pane)
                if isinstance(event, Note):
                    self.status.value = event.text
                    lasting += f"; {chosen[i]}: {event.text}" if event.lasts else ""
                    continue
                if isinstance(event, Token):
                    said[i].append(event)
                end = event if isinstance(event, End) else None
                reasons |= {end.reason} if end else set()
                self.answers[i].value = tokens_html(
                    said[i], prompt=self.prompt.value + breaks[i], title=chosen[i], end=end
                )
            self.status.value = ("stopped" if "stopped" in reasons else "done") + lasting
        except InputError as error:
            self.status.value = str(error)
        except Exception as error:  # else the status would say for ever what was under way
            self.status.value = failed(error)
        finally:
            self.go.disabled, self.stop.disabled = False, True

    def _show_used(self) -> None:
        used = USED[self.settings["strategy"].value]
        for name in {name for names in USED.values() for name in names}:
            self.settings[name].disabled = name not in used


def _widget(name: str, control: dict[str, Any]) -> Any:
    """The widget for one setting, with its range and its meaning as a tooltip."""
    shared = {"value": control["default"], "description": name.replace("_", " "), "tooltip": control["description"]}
    style = {"description_width": "8em"}
    if "choices" in control:
        return widgets.ToggleButtons(options=control["choices"], **shared)
    if isinstance(control["default"], bool):
        return widgets.Checkbox(indent=False, **shared)
    limits = {"min": control["min"], "max": control["max"]}
    if name in _STEPS:
        return widgets.FloatSlider(step=_STEPS[name], style=style, **limits, **shared)
    if name == "seed":
        return widgets.BoundedIntText(style=style, **limits, **shared)
    return widgets.IntSlider(style=style, **limits, **shared)
