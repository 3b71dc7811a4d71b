"""The tools that a request offers, and what they make of the form and the reading of its answer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.structured.forms import FormSpec, combined
from nitsum_jax.runtime.tools.formats import THINK, Tool, call_grammar
from nitsum_jax.runtime.tools.reader import AnswerReader

_TAIL = 8  # tokens of a prompt in which the beginning of a thought stands


class Problem(NamedTuple):
    """What is wrong with an offer.

    Attributes:
      field: "tools" or "tool_choice".
      message: what to tell.
      of_model: whether another model could do it.
    """

    field: str
    message: str
    of_model: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ToolOffer:
    """What a request says about tools.

    Attributes:
      tools: all of them.
      choice: "auto", "none", "required", or "=name" of the one that must be called.
      parallel: whether forced calls may be several.
    """

    tools: Sequence[Tool] = ()
    choice: str = "auto"
    parallel: bool = True

    @property
    def chosen(self) -> str | None:
        """The tool that must be called."""
        return self.choice[1:] if self.choice.startswith("=") else None

    @property
    def offered(self) -> Sequence[Tool]:
        """Those that the model is told of."""
        return () if self.choice == "none" else self.tools

    def problem(self, model: ServedModel) -> Problem | None:
        """What a model cannot do of it."""
        names = [tool.name for tool in self.tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            return Problem("tools", f"two tools are called {twice}: give each its own name")
        if self.choice == "required" and not names:
            return Problem("tool_choice", "tool_choice is required, and there are no tools: give some")
        if self.chosen is not None and self.chosen not in names:
            return Problem("tool_choice", f"tool_choice names {self.chosen[:80]}, which is not in tools")
        if self.offered and model.tools is None:
            why = f"the chat template of {model.name} teaches no way to call tools that is known here: leave tools out"
            return Problem("tools", why, of_model=True)
        return None

    def form(
        self, model: ServedModel, form: tuple[str, FormSpec] | None, thinking: bool
    ) -> tuple[str, FormSpec] | None:
        """The form of the answer, with the name of the field that gives it.

        Args:
          model: that answers.
          form: what the answer is held to where it calls no tool.
          thinking: whether it begins in a thought, which is free.
        """
        tools = [tool for tool in self.offered if self.chosen in (None, tool.name)]
        must = bool(tools) and self.choice != "auto"
        calls = None
        if tools and model.tools is not None and (must or form is not None):
            parallel = self.parallel and self.chosen is None
            calls = call_grammar(model.tools, tools, parallel=parallel, tokenizer=model.tokenizer)
        if calls is None and (not thinking or form is None):
            return form
        field, body = ("tool_choice", None) if must or form is None else form
        return field, combined(calls, body, thinking)

    def reader(self, model: ServedModel, thinking: bool) -> Callable[[], AnswerReader] | None:
        """Makes what takes an answer apart; None where it is nothing but text."""
        names = [tool.name for tool in self.offered]
        tools = model.tools if names else None
        if tools is None and not model.thinks:
            return None
        return lambda: AnswerReader(tools, names, thinks=model.thinks, thinking=thinking)


def begins_thinking(model: ServedModel, ids: Sequence[int]) -> bool:
    """Whether a prompt ends with the beginning of a thought."""
    if not model.thinks:
        return False
    return model.tokenizer.decode(ids[-_TAIL:], skip_special=False).rstrip().endswith(THINK)
