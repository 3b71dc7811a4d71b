"""POST /v1/messages and /v1/messages/count_tokens."""

from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.calls import encode
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.answering import Endpoint, Planned
from nitsum_jax.server.http.anthropic.requests import CountRequest, MessagesRequest
from nitsum_jax.server.http.anthropic.responses import TokenCount
from nitsum_jax.server.http.anthropic.shape import MessageShape
from nitsum_jax.server.http.openai.plan import plan_chat
from nitsum_jax.server.http.openai.requests import ChatRequest
from nitsum_jax.server.http.translated import as_chat

_OURS = {"stop": "stop_sequences"}


class Messages(Endpoint[MessagesRequest]):
    """Answers as chats do; only the words differ."""

    kind = MessagesRequest

    async def plan(self, request: MessagesRequest, backend: Backend, asked: GatewayHeaders) -> Planned:
        """See plan_chat and MessageShape."""
        plan = await as_chat(request.chat(), _OURS, lambda chat: plan_chat(chat, backend, asked))
        shape = MessageShape(plan)
        return Planned(plan.calls, shape, shape if request.stream else None)


async def count_tokens(request: CountRequest, backend: Backend) -> TokenCount:
    """How many tokens a prompt has."""

    async def count(chat: ChatRequest) -> int:
        chat.check_tools(backend.model)
        (ids,) = await encode([chat.chat_prompt()], backend.model)
        return len(ids)

    return TokenCount(input_tokens=await as_chat(request.chat(), _OURS, count))
