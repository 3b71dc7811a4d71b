"""In what form a chat template wants what messages say: as text, or as a list of parts.

Templates of models that see pictures go through the parts of a message, and say nothing when they are given text; other
templates put Python's spelling of a list into the prompt when they are given parts. A template does not tell which kind
it is, so it is asked: it renders a probe, once in either form, and the form that comes out as text is the right one.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nitsum_jax.models.text.chat_sandbox import TooMuchError

Content = str | Sequence[Mapping[str, Any]]
"""What a message says: text, or parts such as {"type": "text", "text": "..."}."""

Messages = Sequence[Mapping[str, Any]]

_NEEDLE = "What is said"
_FILLER = "hello"


class Form(enum.Enum):
    """What a template takes."""

    TEXT = "text"
    PARTS = "parts"
    EITHER = "either"

    def of(self, content: Content) -> Content:
        """Content in this form; parts become text with line breaks between them, as with other servers."""
        if self is Form.TEXT and not isinstance(content, str):
            return "\n".join(part["text"] for part in content)
        if self is Form.PARTS and isinstance(content, str):
            return _parts(content)
        return content if isinstance(content, str) else [dict(part) for part in content]


def probe(render: Callable[[Messages], str]) -> Mapping[str, Form]:
    """The form for each role, that for "user" is the one for roles that are not listed.

    A role that the template is silent about, or refuses, is taken for the user's; a template that cannot be probed is
    taken for one of text.

    Args:
      render: the template.
    """
    forms = {"user": Form.TEXT}
    try:
        forms["user"] = _form(render, "user", (), ()) or _form(render, "user", ("system",), ()) or Form.TEXT
        for role, before, behind in (("system", (), ("user",)), ("assistant", ("user",), ("user",))):
            form = _form(render, role, before, behind, forms["user"])
            if form is not None:
                forms[role] = form
    except TooMuchError:  # the request itself will say so
        pass
    return forms


def _form(
    render: Callable[[Messages], str],
    role: str,
    before: Sequence[str],
    behind: Sequence[str],
    others: Form = Form.TEXT,
) -> Form | None:
    """The form for a role in the midst of others; None if what it says does not come out in any."""

    def rendered(content: Content) -> str | None:
        messages = [
            *({"role": other, "content": others.of(_FILLER)} for other in before),
            {"role": role, "content": content},
            *({"role": other, "content": others.of(_FILLER)} for other in behind),
        ]
        try:
            text = render(messages)
        except TooMuchError:
            raise
        except Exception:  # a template can fail in any way that Python code can
            return None
        return text if _NEEDLE in text else None

    as_text, parts = rendered(_NEEDLE), _parts(_NEEDLE)
    as_parts = rendered(parts)
    if as_text is not None:
        return Form.EITHER if as_parts == as_text else Form.TEXT
    return Form.PARTS if as_parts is not None and repr(parts) not in as_parts else None


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
