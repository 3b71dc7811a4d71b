"""The two APIs of OpenAI that take a prompt or a conversation: requests, plans, answers."""
