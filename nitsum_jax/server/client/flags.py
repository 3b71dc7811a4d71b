"""The flags of nitsum-generate, and the requests that they describe."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.cli import parse
from nitsum_jax.server.client import identity_flags, powers
from nitsum_jax.server.client.channel import Identity
from nitsum_jax.server.client.layout_plan import PlannedSwitch, parse_plan
from nitsum_jax.server.proto import nitsum_pb2

USAGE = """nitsum-generate asks a nitsum-serve server to continue prompts.

  nitsum-generate --prompt="Once upon a time" --max_tokens=64
  nitsum-generate --chat --prompt="Why is the sky blue?"
  nitsum-generate --prompts_file=prompts.txt --json --layout_plan="0:tp1x4,64:tp4"

Exit status: 0 all complete; 1 a request failed; 2 wrong flags, or a request that the server calls wrong; 3 no
server, or one that is not ready; 130 interrupted."""

_SAMPLING_FLOATS = {
    "temperature": "0 is greedy; higher is more random",
    "top_p": "keep the smallest set of most likely tokens with this probability; 1 keeps all",
    "min_p": "keep tokens at least this many times as likely as the most likely one; 0 keeps all",
    "repetition_penalty": "over prompt and output; 1 is off",
    "presence_penalty": "once per token that is in the output; 0 is off",
    "frequency_penalty": "per occurrence in the output; 0 is off",
}
_SAMPLING_INTS = {
    "top_k": "keep the k most likely tokens; 0 keeps all",
    "seed": "0 to 2^32 - 1; the same seed gives the same output; drawn by the server if not given",
}
# Keys of a line in a .jsonl prompts file, beside those of sampling.
_PROMPT_KEYS = ("prompt", "messages", "prompt_ids")
_REQUEST_KEYS = (
    *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop", "show_special_tokens"),
    *("logprobs", "prompt_logprobs", "logit_bias", "tier", "ttft_ms", "tpot_ms"),
    *powers.FORM_KEYS,
    *powers.CHAT_KEYS,
)


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """What the flags say; `requests` in the order of the prompts."""

    server: str
    requests: tuple[nitsum_pb2.GenerateRequest, ...]
    json: bool
    plan: tuple[PlannedSwitch, ...]
    status: bool
    wait_s: float | None
    timeout_s: float | None
    concurrency: int
    identity: Identity = Identity()


def read_options(argv: Sequence[str]) -> ClientOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line or the prompts file is wrong.
    """
    values = _define()
    parse(values, argv, USAGE)
    given = [name for name in ("prompt", "prompts_file", "prompt_ids") if values[name].value is not None]
    if values.status and not given:
        requests: tuple[nitsum_pb2.GenerateRequest, ...] = ()
    elif len(given) != 1:
        raise InvalidInputError(
            "give exactly one of --prompt, --prompt_ids and --prompts_file (--help lists the flags)"
        )
    else:
        try:
            requests = tuple(_request(values, prompt) for prompt in _prompts(values))
        except (ValueError, TypeError) as error:
            # Protobuf's own checks: numbers out of range, text that is not Unicode.
            raise InvalidInputError(f"this request cannot be sent: {error}") from None
    return ClientOptions(
        server=values.server,
        requests=requests,
        json=values.json,
        plan=parse_plan(values.layout_plan) if values.layout_plan else (),
        status=values.status,
        wait_s=values.wait_seconds if values.wait else None,
        timeout_s=values.timeout,
        concurrency=values.concurrency,
        identity=identity_flags.read(values),
    )


def _define() -> flags.FlagValues:
    values = flags.FlagValues()
    text, flag = flags.DEFINE_string, flags.DEFINE_bool
    identity_flags.define(values)
    text("prompt", None, "the text to be continued, or with --chat what the user says", flag_values=values)
    text("prompt_ids", None, "token ids to be continued, with commas between them", flag_values=values)
    text(
        "prompts_file",
        None,
        "file of prompts, all sent at once: one per line (empty lines are skipped), or, if its name ends in .jsonl, "
        "one JSON object per line with prompt, messages or prompt_ids and any of the flags about the output, which win "
        "over these (logit_bias, json_schema and template_variables are objects, tools is a list); - reads prompts "
        "from standard input",
        flag_values=values,
    )
    flag(
        "chat",
        False,
        "prompts are what a user says to an assistant (needs a model with chat template)",
        flag_values=values,
    )
    text("system", None, "with --chat: the system message", flag_values=values)
    flags.DEFINE_integer(
        "max_tokens",
        None,
        "at most this many new tokens; if not given, as the model says, else 256",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "min_tokens", None, "no stop token or text ends the output before so many tokens", flag_values=values
    )
    flags.DEFINE_integer(
        "logprobs",
        None,
        "with --json: how likely each token was, with so many of the most likely ones at its place, 0 to 20",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "prompt_logprobs",
        None,
        "with --json: the same for the tokens of the prompt, behind its first; --max_tokens may be 0 then",
        flag_values=values,
    )
    flags.DEFINE_list(
        "logit_bias", [], "ID:BIAS pairs with commas between them; -100 forbids a token", flag_values=values
    )
    for name, meaning in _SAMPLING_FLOATS.items():
        flags.DEFINE_float(name, None, meaning, flag_values=values)
    for name, meaning in _SAMPLING_INTS.items():
        flags.DEFINE_integer(name, None, meaning, flag_values=values)
    flags.DEFINE_multi_string("stop", [], "the output ends before this text; any number of these", flag_values=values)
    flags.DEFINE_list("stop_token_ids", [], "the output ends before any of these ids", flag_values=values)
    flag("ignore_eos", False, "go on past the end-of-sequence token of the model", flag_values=values)
    flag("include_stop", False, "the output ends with the stop text that ended it, not before it", flag_values=values)
    flag("show_special_tokens", False, "special tokens in the output are spelled", flag_values=values)
    text("tier", None, "latency tier; the server's default is standard", flag_values=values)
    for name, what in (("ttft_ms", "time to the first token"), ("tpot_ms", "time per token after it")):
        flags.DEFINE_float(
            name, None, f"target for the {what}, milliseconds; if not given, the tier's", flag_values=values
        )
    powers.define(values)
    flag(
        "json",
        False,
        "print one JSON object per request, in the order of the prompts: prompt_ids, output_ids, text, finish_reason, "
        "usage, ttft_ms and tpot_ms (as seen here), with index, request_id, seed, server_ttft_ms, server_tpot_ms; "
        "where there are some, tool_calls, reasoning, stop, logprobs and prompt_logprobs; a failed request has error",
        flag_values=values,
    )
    text(
        "layout_plan",
        None,
        'switches of the server\'s layout, such as "0:tp1x4,16:tp2x2,32:tp4": each is asked for when that many tokens '
        "have come, counted over all streams of this command; 0 is before the first request",
        flag_values=values,
    )
    flag(
        "status",
        False,
        "print model, layout and counters of the server as JSON (at the end, if there are prompts)",
        flag_values=values,
    )
    flag("wait", False, "first wait until the server is ready", flag_values=values)
    flags.DEFINE_float("wait_seconds", 600.0, "longest time that --wait waits", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float(
        "timeout", None, "deadline of each request in seconds; none if not given", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_integer(
        "concurrency", 0, "at most this many requests at once; 0: all", lower_bound=0, flag_values=values
    )
    return values


def _prompts(values: flags.FlagValues) -> list[dict[str, Any]]:
    """The prompts as objects like the lines of a .jsonl file."""
    if values.prompt is not None:
        return [_spoken(values, values.prompt)]
    if values.prompt_ids is not None:
        return [{"prompt_ids": _ids("prompt_ids", values.prompt_ids.split(","))}]
    lines = [line for line in _read(values.prompts_file).splitlines() if line.strip()]
    if not lines:
        raise InvalidInputError(f"--prompts_file={values.prompts_file} has no prompts: write one per line")
    if not values.prompts_file.endswith(".jsonl"):
        return [_spoken(values, line) for line in lines]
    return [_json_line(values, number, line) for number, line in enumerate(lines, start=1)]


def _spoken(values: flags.FlagValues, text: str) -> dict[str, Any]:
    if not values.chat:
        return {"prompt": text}
    system = [{"role": "system", "content": values.system}] if values.system else []
    return {"messages": [*system, {"role": "user", "content": text}]}


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InvalidInputError(f"--prompts_file={path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"--prompts_file={path} is not UTF-8 (byte {error.start}): convert it") from None


def _json_line(values: flags.FlagValues, number: int, line: str) -> dict[str, Any]:
    where = f"--prompts_file={values.prompts_file}, prompt {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"{where} is not JSON ({error}): write one object per line") from None
    if not isinstance(entry, dict) or sum(key in entry for key in _PROMPT_KEYS) != 1:
        raise InvalidInputError(f"{where} must be an object with one of {', '.join(_PROMPT_KEYS)}")
    known = {*_PROMPT_KEYS, *_REQUEST_KEYS, *_SAMPLING_FLOATS, *_SAMPLING_INTS}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise InvalidInputError(f"{where} has the unknown key {unknown[0]!r}: known are {', '.join(sorted(known))}")
    if isinstance(entry.get("prompt"), str) and values.chat:
        return {**entry, **_spoken(values, entry.pop("prompt"))}
    return entry


def _request(values: flags.FlagValues, entry: Mapping[str, Any]) -> nitsum_pb2.GenerateRequest:
    def pick(name: str) -> Any:
        return entry.get(name, values[name].value)

    sampling = {name: pick(name) for name in (*_SAMPLING_FLOATS, *_SAMPLING_INTS)}
    request = nitsum_pb2.GenerateRequest(
        sampling=nitsum_pb2.SamplingParams(**sampling, logit_bias=_bias(pick("logit_bias"))),
        max_tokens=pick("max_tokens"),
        min_tokens=pick("min_tokens"),
        logprobs=pick("logprobs"),
        stop=pick("stop"),
        stop_token_ids=_ids("stop_token_ids", pick("stop_token_ids")),
        ignore_eos=pick("ignore_eos"),
        include_stop=pick("include_stop"),
        show_special_tokens=pick("show_special_tokens"),
        prompt_logprobs=pick("prompt_logprobs"),
        tier=pick("tier"),
        ttft_ms=pick("ttft_ms"),
        tpot_ms=pick("tpot_ms"),
        form=powers.form_of(values, entry),
        return_prompt_ids=values.json,
    )
    if "messages" not in entry and (wrong := [key for key in powers.CHAT_KEYS if pick(key)]):
        raise InvalidInputError(f"{wrong[0]} is for chats: give --chat, or messages")
    if "prompt" in entry:
        request.text = entry["prompt"]
    elif "messages" in entry:
        request.chat.CopyFrom(powers.chat_of(values, entry, entry["messages"]))
    else:
        request.tokens.CopyFrom(nitsum_pb2.TokenPrompt(ids=_ids("prompt_ids", entry["prompt_ids"])))
    return request


def _bias(given: Mapping[str, float] | Sequence[str]) -> dict[int, float]:
    try:
        pairs = given.items() if isinstance(given, Mapping) else [pair.split(":") for pair in given]
        return {int(token): float(bias) for token, bias in pairs}
    except (AttributeError, TypeError, ValueError):
        raise InvalidInputError("logit_bias must be pairs of a token id and a number, such as 50:-100,7:2.5") from None


def _ids(name: str, items: Sequence[Any]) -> list[int]:
    try:
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise InvalidInputError(f"{name} must be token ids, such as 1,2,3") from None
