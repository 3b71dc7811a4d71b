"""What a chat template is told beside the messages; apart from the templates, whose engine takes time to load."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a template is told beside the messages.

    Attributes:
      tools: descriptions of functions, in OpenAI's form; none if empty.
      variables: further variables of the template, such as enable_thinking.
      add_generation_prompt: whether the text ends where the assistant's answer begins.
      continue_final: the text ends with the last message, which the answer continues; nothing is behind it.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False
