"""The tools that a chat request offers, and what they make of its prompt, its form and its answer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.structured.forms import FormSpec, combined
from nitsum_jax.runtime.tools.formats import Tool, call_grammar
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.fields import Strict, Unsupported

MAX_TOOLS = 128
_NAME = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")


class FunctionSpec(Strict):
    """A function that the model may call."""

    name: str = _NAME
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments: an object.")
    strict: bool | None = Field(None, description="Calls that tool_choice forces hold the schema either way.")


class ToolSpec(Strict):
    """A tool."""

    type: Literal["function"]
    function: FunctionSpec

    @property
    def tool(self) -> Tool:
        """As grammars take it."""
        return Tool(self.function.name, self.function.parameters or {"type": "object"})

    def rendered(self) -> dict[str, Any]:
        """As templates take it."""
        return self.model_dump(exclude_none=True)


def _read_choice(value: Any) -> str | None:
    """auto, none or required as they are; a named function as "=name"."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name:
            return f"={name}"
    message = 'give none, auto, required, or {"type": "function", "function": {"name": "..."}}'
    raise PydanticCustomError("invalid_value", message)


_CHOSEN = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
ToolChoiceField = Annotated[
    str | None,
    PlainValidator(_read_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _CHOSEN]}),
]
ToolsField = Annotated[list[ToolSpec] | None, Field(max_length=MAX_TOOLS)]


class OffersTools(Strict):
    """The fields of a request."""

    tools: ToolsField = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = Field(None, description="Whether forced calls may be several; true.")

    def offered(self) -> list[ToolSpec]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def check_tools(self, model: ServedModel) -> None:
        """Refuses tools that a model cannot call, and a choice that is none of them."""
        names = [one.function.name for one in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ApiError(400, f"two tools are called {twice}: give each its own name", param="tools")
        if self.tool_choice == "required" and not names:
            raise ApiError(400, "tool_choice is required, and there are no tools: give some", param="tool_choice")
        chosen = self._chosen
        if chosen is not None and chosen not in names:
            raise ApiError(400, f"tool_choice names {chosen[:80]}, which is not in tools", param="tool_choice")
        if self.offered() and model.tools is None:
            message = (
                f"the chat template of {model.name} teaches no way to call tools that is known here: leave tools out"
            )
            raise ApiError(400, message, param="tools", code="not_possible_here")

    def tool_form(
        self, model: ServedModel, form: tuple[str, FormSpec] | None, thinking: bool
    ) -> tuple[str, FormSpec] | None:
        """The form of the answer, with the field that gives it.

        Args:
          model: that answers.
          form: what the answer is held to where it calls no tool.
          thinking: whether it begins in a thought, which is free.
        """
        tools = [one.tool for one in self.offered()]
        chosen = self._chosen
        if chosen is not None:
            tools = [tool for tool in tools if tool.name == chosen]
        must = bool(tools) and self.tool_choice not in (None, "auto")
        calls = None
        if tools and model.tools is not None and (must or form is not None):
            parallel = self.parallel_tool_calls is not False and chosen is None
            calls = call_grammar(model.tools, tools, parallel=parallel, tokenizer=model.tokenizer)
        if calls is None and not thinking:
            return form
        if calls is None and form is None:
            return None
        field, body = ("tool_choice", None) if must or form is None else form
        return field, combined(calls, body, thinking)

    @property
    def _chosen(self) -> str | None:
        return self.tool_choice[1:] if self.tool_choice is not None and self.tool_choice.startswith("=") else None


UNUSED: Mapping[str, Unsupported] = {
    "reasoning_effort": Unsupported("use chat_template_kwargs, as the model's template knows it"),
    "separate_reasoning": Unsupported("thoughts are always apart, in reasoning_content", (True,)),
    "stream_reasoning": Unsupported("thoughts are streamed", (True,)),
    "include_reasoning": Unsupported("thoughts are told, in reasoning_content", (True,)),
}
"""Fields about thoughts."""
