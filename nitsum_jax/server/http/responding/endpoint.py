"""POST /v1/responses, as an ASGI application."""

from nitsum_jax.runtime.backend import Backend
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.answering import Endpoint, Planned
from nitsum_jax.server.http.openai.plan import plan_chat
from nitsum_jax.server.http.responding.requests import ResponseRequest
from nitsum_jax.server.http.responding.shape import ResponseShape
from nitsum_jax.server.http.translated import as_chat

_OURS = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "messages": "input",
}


class Responses(Endpoint[ResponseRequest]):
    """Answers as chats do; only the words differ."""

    kind = ResponseRequest

    async def plan(self, request: ResponseRequest, backend: Backend, asked: GatewayHeaders) -> Planned:
        """See plan_chat and ResponseShape."""
        plan = await as_chat(request.chat(), _OURS, lambda chat: plan_chat(chat, backend, asked))
        shape = ResponseShape(request, plan, backend.model.tokenizer.token_bytes)
        return Planned(plan.calls, shape, shape if request.stream else None)
