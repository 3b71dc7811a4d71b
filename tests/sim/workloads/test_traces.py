"""Trace readers: each format from a hand-made snippet, errors that point at the line, and speed."""

import datetime
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads.stand_ins import STAND_INS, open_trace
from nitsum_jax.sim.workloads.traces import FORMATS, TraceFlag, parse_trace, parse_trace_flag, read_trace, to_csv
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-01-02 18:59:58.5000000,374,44
2023-01-02 19:00:00.0000000,396,109
2023-01-02 18:59:59.2500000,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-03-04 23:59:58.500000+00:00,374,44
2024-03-05 00:00:00+00:00,396,109
2024-03-04 23:59:59.250000+00:00,879,55
"""
MOONCAKE = """{"timestamp": 1500, "input_length": 374, "output_length": 44, "hash_ids": [0, 1]}

{"timestamp": 3000, "input_length": 396, "output_length": 109, "hash_ids": []}
{"timestamp": 2250, "input_length": 879, "output_length": 55, "hash_ids": [7]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,374,44,418,Conversation log
6.5,GPT-4,396,109,505,API log
5.75,ChatGPT,879,55,934,Conversation log
7,ChatGPT,500,0,500,Conversation log
"""
PLAIN = """arrival_s,prompt_tokens,output_tokens,tier
0,374,44,chat
1.5,396,109,chat
0.75,879,55,night
"""
JSONL = """{"arrival_s": 0, "prompt_tokens": 374, "output_tokens": 44, "tier": "chat"}
{"arrival_s": 1.5, "prompt_tokens": 396, "output_tokens": 109, "tier": "chat"}
{"tier": "night", "arrival_s": 0.75, "prompt_tokens": 879, "output_tokens": 55}
"""
EXPECTED = [(0.0, 374, 44), (0.75, 879, 55), (1.5, 396, 109)]


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("azure", AZURE_2023),
        ("azure", AZURE_2024),
        ("mooncake", MOONCAKE),
        ("burstgpt", BURSTGPT),
        ("csv", PLAIN),
        ("jsonl", JSONL),
    ],
)
def test_every_format_reads_the_same(form: str, text: str, named: bool, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "some.trace"
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n"), text.rstrip("\n")):
        path.write_bytes(content.encode())
        read = read_trace(path, "t", form if named else None)
        rows = [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in read.workload.requests]
        assert [r[1:] for r in rows] == [e[1:] for e in EXPECTED]
        assert [r[0] for r in rows] == pytest.approx([e[0] for e in EXPECTED], abs=1e-6)
        assert read.workload.name == "some"
        assert read.workload.seconds == pytest.approx(1.5 + 0.75)
        assert {r.tier for r in read.workload.requests} == {"t"}
        assert (read.skipped, read.raised) == ((1, 0) if form == "burstgpt" else (0, 0))


@pytest.mark.parametrize("text", [PLAIN, JSONL])
def test_plain_formats_may_name_tiers(text: str) -> None:
    own = parse_trace(lines(text), "f", None).workload
    assert [r.tier for r in own.requests] == ["chat", "night", "chat"]
    with pytest.raises(InvalidInputError, match=r"^f:2: the request names no tier"):
        parse_trace(lines(AZURE_2023), "f", None)
    with pytest.raises(InvalidInputError, match=r"^f:2: the request names no tier"):
        parse_trace(["arrival_s,prompt_tokens,output_tokens,tier\n", "0,1,1,\n"], "f", None)


def test_columns_may_stand_in_any_order_with_others_between() -> None:
    text = 'Tier , output_tokens,note,PROMPT_TOKENS,arrival_s\nx,2,"a,\nb",3,4.5\n'
    (request,) = parse_trace(lines(text), "f", "t").workload.requests
    assert request == TraceRequest(4.5, 3, 2, "t")


def test_plain_arrivals_stay_where_they_are_and_public_ones_begin_at_zero() -> None:
    plain = parse_trace(["arrival_s,prompt_tokens,output_tokens\n", "7,1,1\n"], "f", "t").workload
    assert (plain.requests[0].arrival_s, plain.seconds) == (7, 8)
    azure = parse_trace(lines(AZURE_2023)[:2], "f", "t").workload
    assert (azure.requests[0].arrival_s, azure.seconds) == (0, 1)


def test_requests_without_tokens() -> None:
    text = "arrival_s,prompt_tokens,output_tokens\n0,0,5\n1,5,0\n2,0,0\n3,4,4\n"
    read = parse_trace(lines(text), "f", "t")
    assert read.workload.requests == (TraceRequest(0, 1, 5, "t"), TraceRequest(3, 4, 4, "t"))
    assert (read.skipped, read.raised) == (2, 1)


def test_reading_ends_at_until() -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens\n" + "".join(f"{100 + i},m,1,1\n" for i in range(9)) + "bad\n"
    )
    assert len(parse_trace(lines(text), "f", "t", until_s=5).workload) == 6
    with pytest.raises(InvalidInputError, match=r"^f:11:"):
        parse_trace(lines(text), "f", "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f:1: this is the first line of no known trace format"),
        ("a,b,c\n1,2,3\n", "f:1: this is the first line of no known trace format"),
        ('{"a": 1}\n', "f:1: this is the first line of no known trace format"),
        ("{oops\n", "f:1: not valid JSON"),
        (AZURE_2023 + "2023-01-02 19:00:00,12\n", "f:5: 2 columns, but the header has 3"),
        (AZURE_2023 + "2023-01-02 19:00:00,x,1\n", "f:5: ContextTokens 'x' must be a whole number"),
        (AZURE_2023 + "2023-01-02 19:00:00,1,1.5\n", "f:5: GeneratedTokens '1.5' must be a whole number"),
        (AZURE_2023 + "2023-01-02 19:00:00,-1,1\n", "f:5: ContextTokens '-1' must be a whole number, 0 or more"),
        (AZURE_2023 + "yesterday,1,1\n", "f:5: TIMESTAMP 'yesterday' is not a valid time"),
        (BURSTGPT + "nan,m,1,1,2,l\n", "f:6: Timestamp 'nan' is not a valid time"),
        (PLAIN + "-1,1,1,t\n", "f:5: arrival_s '-1' is not a valid time"),
        (PLAIN + '1,1,1,"t\n', "f:5: "),
        (MOONCAKE + "[1]\n", "f:5: not a JSON object"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 2}\n', "f:5: 'output_length' is missing"),
        (MOONCAKE + '{"timestamp": 1, "input_length": true, "output_length": 1}\n', "f:5: input_length True must be"),
        (MOONCAKE + '{"timestamp": "1", "input_length": 1, "output_length": 1}\n', "f:5: timestamp '1' is not a valid"),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "f:5: timestamp nan is not a valid"),
        (JSONL + '{"arrival_s": 1, "prompt_tokens": 1, "output_tokens": 1, "tier": 3}\n', "f:4: tier 3 must be a name"),
        ("arrival_s,prompt_tokens,output_tokens\n", "f: the trace has no requests"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,0\n", "f: the trace has no requests"),
    ],
)
def test_errors_are_one_line_and_name_the_place(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as e:
        parse_trace(lines(text), "f", "t" if "tier 3" not in message else None)
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)


def test_a_named_format_must_fit() -> None:
    with pytest.raises(InvalidInputError, match=r"^f:1: column 'Request tokens' is missing"):
        parse_trace(lines(AZURE_2023), "f", "t", "burstgpt")
    with pytest.raises(InvalidInputError, match=r"^f: unknown trace format 'parquet': use one of azure"):
        parse_trace(lines(AZURE_2023), "f", "t", "parquet")


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match=r"none\.csv: cannot read the trace: No such file"):
        read_trace(tmp_path / "none.csv", "t")
    (tmp_path / "bytes").write_bytes(b"arrival_s\xff\n")
    with pytest.raises(InvalidInputError, match="bytes: the trace is not UTF-8"):
        read_trace(tmp_path / "bytes", "t")


@given(
    st.lists(
        st.builds(
            TraceRequest, st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["a", "b.c"])
        ),
        min_size=1,
    )
)
def test_plain_csv_round_trip(requests: list[TraceRequest]) -> None:
    requests.sort(key=lambda r: r.arrival_s)
    written = to_csv(Workload(tuple(requests), "w", 2e6))
    assert parse_trace(lines(written), "f", None).workload.requests == tuple(requests)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chat:a.csv", TraceFlag("chat", "a.csv", None)),
        ("chat:a.csv:azure", TraceFlag("chat", "a.csv", "azure")),
        ("*:dir:x/a:jsonl", TraceFlag(None, "dir:x/a", "jsonl")),
        ("chat:C:\\a.csv", TraceFlag("chat", "C:\\a.csv", None)),
        ("chat:dir:x/a.csv", TraceFlag("chat", "dir:x/a.csv", None)),
        ("chat:azure-conv-like", TraceFlag("chat", "azure-conv-like", None)),
    ],
)
def test_flags(text: str, expected: TraceFlag) -> None:
    assert parse_trace_flag(text) == expected


@pytest.mark.parametrize("text", ["", "chat", "chat:", ":a.csv", "chat:a.csv:", "chat::azure", "chat:a.csv:azur"])
def test_wrong_flags(text: str) -> None:
    with pytest.raises(InvalidInputError, match="--trace=") as e:
        parse_trace_flag(text)
    assert ("use one of azure, mooncake" in str(e.value)) == (text == "chat:a.csv:azur")


def test_a_flag_opens_files_and_stand_ins(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text(MOONCAKE)
    assert len(open_trace(parse_trace_flag(f"t:{tmp_path}/a.jsonl")).workload) == 3
    assert len(open_trace(parse_trace_flag(f"t:{tmp_path}/a.jsonl"), seconds=0.5).workload) == 1
    one, again, other = (
        open_trace(parse_trace_flag("t:azure-code-like"), seed=s, seconds=60).workload for s in (1, 1, 2)
    )
    assert one == again != other
    assert one.seconds == 60
    assert one.tiers == ("t",)
    for text in ("t:azure-code-like:azure", "*:azure-code-like"):
        with pytest.raises(InvalidInputError, match="is drawn, not read"):
            open_trace(parse_trace_flag(text))
    assert not set(STAND_INS) & set(FORMATS)


def test_a_long_trace_reads_whole() -> None:
    start = datetime.datetime(2023, 1, 1)
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"{start + datetime.timedelta(microseconds=123_457 * i + 1)}0,{i % 999 + 1},7\n" for i in range(28_000)
    )
    jsonl = "".join(json.dumps({"timestamp": i, "input_length": 1, "output_length": 1}) + "\n" for i in range(28_000))
    for whole in (lines(text), lines(jsonl)):
        assert len(parse_trace(whole, "f", "t").workload) == 28_000
