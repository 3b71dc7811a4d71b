"""OpenAI's Responses API: stateless, whole or streamed."""
