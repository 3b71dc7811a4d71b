"""The prompts of smollm2_135m.json."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: plain `text`, or chat `messages` for the model's template.

    `full_logits` asks for the logits of the whole vocabulary at the prompt's last position.
    """

    name: str
    text: str = ""
    messages: tuple[dict[str, str], ...] | None = None
    full_logits: bool = False


def _chat(name: str, *contents: str, system: str | None = None, full_logits: bool = False) -> Prompt:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return Prompt(name, messages=tuple(turns), full_logits=full_logits)


_LONG = """\
The harbour town had grown slowly around its two piers. On the northern one the fishing boats came in before dawn, \
and by the time the church bell rang seven the crates of herring stood in rows along the quay, each with a chalk mark \
that told the buyers where it was to go. The southern pier belonged to the ferries. In summer four of them crossed the \
strait every day, carrying tourists, bicycles, mail and once a week the mobile library; in winter a single boat went \
back and forth, and when the ice was thick it did not go at all. People measured the year by these things rather than \
by the calendar. "When the second ferry comes" meant the middle of May, and "after the library" meant a Thursday.

Marta had taken over the harbour office from her father. She kept the tide tables, collected the mooring fees, wrote \
the weather on a blackboard twice a day and settled quarrels between skippers who both believed that a certain berth \
had been promised to them. The work was not hard, but it was never finished. On the morning this story begins she \
found a letter under the door, without a stamp, addressed in green ink to "The person who counts the boats". She put \
it in her pocket, unlocked the office, lit the stove, and only then, with her coat still on and the kettle beginning \
to hum, did she open the envelope and read the first line. It said:"""

PROMPTS: tuple[Prompt, ...] = (
    _chat("chat_capital", "What is the capital of France?", full_logits=True),
    _chat("chat_story", "Write a short story about a robot who learns to paint."),
    _chat("chat_list", "List three healthy breakfast ideas."),
    _chat("chat_system", "How do I boil an egg?", system="You are a pirate. Answer in one sentence."),
    _chat("chat_turns", "My name is Ada.", "Nice to meet you, Ada!", "What is my name, and how many letters has it?"),
    _chat("chat_code", "Write a Python function that reverses a linked list.", full_logits=True),
    _chat("chat_french", "Traduis en anglais : « Le chat dort sur la chaise. »"),
    Prompt("plain_once", "Once upon a time, in a small village by the sea,"),
    Prompt("plain_science", "Photosynthesis is the process by which"),
    Prompt("one_word", "Hello", full_logits=True),
    Prompt("one_space", " "),
    Prompt("digits", "2, 4, 8, 16, 32, 64, 128, 256, 512,"),
    Prompt("sum", "Question: What is 127 + 385?\nAnswer: 127 + 385 ="),
    Prompt("code_python", "def fibonacci(n):\n    "),
    Prompt("code_c", '#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n\t\tprintf("'),
    Prompt("json", '{"name": "Alice", "age": 30, "languages": ["Python", "Rust"], "address": {'),
    Prompt("german", "Die Hauptstadt von Deutschland ist"),
    Prompt(
        "multilingual", "English: Good morning. Français : Bonjour. Русский: Доброе утро. 日本語: おはよう。 Español:"
    ),
    Prompt("emoji", "I love pizza 🍕 and my cats 🐱🐱! 😀"),
    Prompt("long", _LONG, full_logits=True),
)
