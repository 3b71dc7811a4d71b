"""The tools that a chat request offers, and what they make of its prompt, its form and its answer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.tools.formats import Tool
from nitsum_jax.runtime.tools.offer import ToolOffer
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.fields import Strict, Unsupported, wrong

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class FunctionSpec(Strict):
    """A function that the model may call."""

    name: FunctionName
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
    raise wrong('give none, auto, required, or {"type": "function", "function": {"name": "..."}}')


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

    @property
    def offer(self) -> ToolOffer:
        """What it says about tools."""
        parallel = self.parallel_tool_calls is not False
        return ToolOffer([one.tool for one in self.tools or ()], self.tool_choice or "auto", parallel)

    def check_tools(self, model: ServedModel) -> None:
        """Refuses tools that a model cannot call, and a choice that is none of them."""
        problem = self.offer.problem(model)
        if problem is not None:
            code = "not_possible_here" if problem.of_model else None
            raise ApiError(400, problem.message, param=problem.field, code=code)


UNUSED: Mapping[str, Unsupported] = {
    "separate_reasoning": Unsupported("thoughts are always apart, in reasoning_content", (True,)),
    "stream_reasoning": Unsupported("thoughts are streamed", (True,)),
    "include_reasoning": Unsupported("thoughts are told, in reasoning_content", (True,)),
}
"""Fields about thoughts."""
