"""POST /v1/messages and /v1/messages/count_tokens, as ASGI applications."""

from starlette.types import Receive, Scope, Send

from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.calls import encode
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.answering import Endpoint, Planned, send_json
from nitsum_jax.server.http.anthropic.requests import CountRequest, MessagesRequest
from nitsum_jax.server.http.anthropic.shape import MessageShape
from nitsum_jax.server.http.body import read_object
from nitsum_jax.server.http.openai.plan import plan_chat
from nitsum_jax.server.http.openai.requests import ChatRequest
from nitsum_jax.server.http.tokens import check_model
from nitsum_jax.server.http.translated import as_chat

_OURS = {"stop": "stop_sequences"}


class Messages(Endpoint[MessagesRequest]):
    """Answers as chats do; only the words differ."""

    kind = MessagesRequest

    async def plan(self, request: MessagesRequest, backend: Backend, asked: GatewayHeaders) -> Planned:
        """See plan_chat and MessageShape."""
        plan = await as_chat(request.chat(), _OURS, lambda chat: plan_chat(chat, backend, asked))
        return Planned(plan.calls, MessageShape(plan), bool(request.stream))


class CountTokens(Endpoint[CountRequest]):
    """Counts the tokens of a prompt."""

    kind = CountRequest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        self._state.present()
        request = await read_object(scope, receive, self._checked)
        model = self._state.present().model
        check_model(request.model, model)

        async def count(chat: ChatRequest) -> int:
            chat.check_tools(model)
            (ids,) = await encode([chat.chat_prompt()], model)
            return len(ids)

        await send_json(send, {"input_tokens": await as_chat(request.chat(), _OURS, count)})
