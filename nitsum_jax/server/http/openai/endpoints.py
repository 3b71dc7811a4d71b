"""POST /v1/completions and /v1/chat/completions, as ASGI applications."""

from nitsum_jax.runtime.backend import Backend
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.answering import Endpoint, Planned
from nitsum_jax.server.http.openai.plan import plan_chat, plan_completion
from nitsum_jax.server.http.openai.requests import ChatRequest, CompletionRequest, Generation
from nitsum_jax.server.http.openai.shapes import ChatShape, CompletionShape, StreamedUsage


class Completions(Endpoint[CompletionRequest]):
    """/v1/completions."""

    kind = CompletionRequest

    async def plan(self, request: CompletionRequest, backend: Backend, asked: GatewayHeaders) -> Planned:
        """See plan_completion and CompletionShape."""
        plan = await plan_completion(request, backend, asked)
        read = backend.model.tokenizer.token_bytes
        shape = CompletionShape(plan, read, request.logprobs, _streamed_usage(request))
        return Planned(plan.calls, shape, shape if request.stream else None)


class ChatCompletions(Endpoint[ChatRequest]):
    """/v1/chat/completions."""

    kind = ChatRequest

    async def plan(self, request: ChatRequest, backend: Backend, asked: GatewayHeaders) -> Planned:
        """See plan_chat and ChatShape."""
        plan = await plan_chat(request, backend, asked)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        shape = ChatShape(plan, backend.model.tokenizer.token_bytes, logprobs, _streamed_usage(request))
        return Planned(plan.calls, shape, shape if request.stream else None)


def _streamed_usage(request: Generation) -> StreamedUsage:
    options = request.stream_options
    if options is None or not options.include_usage:
        return StreamedUsage.NOWHERE
    return StreamedUsage.EVERYWHERE if options.continuous_usage_stats else StreamedUsage.AT_THE_END
