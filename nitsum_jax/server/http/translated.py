"""Requests of other APIs that are answered as chats: what is wrong is told by the names of their own fields."""

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from nitsum_jax.server.http.errors import ApiError, of_validation
from nitsum_jax.server.http.openai.requests import ChatRequest

_Result = TypeVar("_Result")


async def as_chat(
    body: Mapping[str, Any], names: Mapping[str, str], use: Callable[[ChatRequest], Awaitable[_Result]]
) -> _Result:
    """Reads the body of a chat request that stands for another one, and uses it.

    Args:
      body: of the chat.
      names: of fields of chats, and what they are called in the other API.
      use: of the request.

    Raises:
      ApiError: with the other API's names.
    """
    try:
        return await use(ChatRequest.model_validate(body))
    except (ValidationError, ApiError) as found:
        error = of_validation(found) if isinstance(found, ValidationError) else found
    field = (error.param or "").split("[")[0].split(".")[0]
    if field not in names:
        raise error
    param = names[field] + (error.param or "")[len(field) :]
    raise dataclasses.replace(error, param=param, message=error.message.replace(error.param or field, param))
