import hashlib
import re
import stat
import tomllib
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.security import keys_cli
from nitsum_jax.server.security.errors import RateLimitedError
from nitsum_jax.server.security.keys import (
    ApiKey,
    KeyRing,
    KeyRole,
    digest_of,
    entry,
    new_secret,
    parse_keys,
    read_keys,
)
from nitsum_jax.server.security.limits import Limits

HASH = "sha256:" + hashlib.sha256(b"secret").hexdigest()
TIERS = ("interactive", "batch")

names = st.text("abzAZ019_.-", min_size=1, max_size=20).map(lambda rest: "k" + rest)
counts = st.none() | st.integers(1, 10**6)
keys = st.builds(
    ApiKey,
    name=names,
    digest=st.binary(min_size=32, max_size=32),
    role=st.sampled_from(KeyRole),
    tiers=st.none() | st.lists(st.sampled_from(TIERS), min_size=1, unique=True).map(tuple),
    requests_per_minute=counts,
    concurrent=counts,
)


@hypothesis.settings(max_examples=40)
@given(st.lists(keys, min_size=1, max_size=4, unique_by=(lambda key: key.name, lambda key: key.digest)))
def test_what_is_written_is_what_is_read(made: list[ApiKey]) -> None:
    assert parse_keys("\n".join(map(entry, made)), "keys.toml", TIERS).keys == tuple(made)


def test_a_secret_finds_its_key_and_no_other() -> None:
    secrets = [new_secret() for _ in range(20)]
    assert len(set(secrets)) == 20
    assert all(re.fullmatch(r"nk_[\w-]{43}", secret) for secret in secrets)
    ring = KeyRing(ApiKey(f"k{number}", digest_of(secret)) for number, secret in enumerate(secrets))
    for number, secret in enumerate(secrets):
        found = ring.find(secret)
        assert found is not None
        assert found.name == f"k{number}"
        for wrong in (secret[:-1], secret + "x", secret.upper(), "", "\udcff", digest_of(secret).hex()):
            assert ring.find(wrong) is None


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    ring = KeyRing(ApiKey(name, digest_of(name)) for name in "abc")
    for secret in ("a", "c", "none of them"):
        compared.clear()
        ring.find(secret)
        assert len(compared) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^k\.toml: no keys: nitsum-keys new --file=k\.toml"),
        ("[keys", r"^k\.toml: not valid TOML"),
        ("[other.a]", r"^k\.toml: unknown entry 'other'"),
        (f'[keys.a]\nhash = "{HASH}"\n[keys.b]\nhash = "sha256:12"', r"^k\.toml:3: key 'b': hash must be"),
        ('[keys.a]\nhash = "plain"', r"^k\.toml:1: .*hash must be"),
        (f'[keys.a]\nhash = "{HASH}"\nrole = "root"', r"^k\.toml:1: .*role='root'.*user, monitor, admin"),
        (f'[keys.a]\nhash = "{HASH}"\ntiers = ["fast"]', r"^k\.toml:1: .*'fast': use interactive, batch"),
        (f'[keys.a]\nhash = "{HASH}"\ntiers = []', r"^k\.toml:1: .*tiers must be a list"),
        (f'[keys.a]\nhash = "{HASH}"\nconcurrent = 0', r"^k\.toml:1: .*concurrent=0"),
        (f'[keys.a]\nhash = "{HASH}"\nconcurent = 4', r"^k\.toml:1: .*unknown entry 'concurent'"),
        (f'[keys.a]\nhash = "{HASH}"\n[keys.b]\nhash = "{HASH}"', r"^k\.toml: two API keys have the same hash"),
        ("[keys]\na = 5", r"^k\.toml: key 'a' must be a table"),
    ],
)
def test_mistakes_are_told_with_their_place(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_keys(text, "k.toml", TIERS)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read the keys file: No such file"):
        read_keys(tmp_path / "none.toml")


def test_the_tool_makes_keys_and_keeps_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    file = f"--file={path}"
    assert keys_cli.main(["nitsum-keys", "new", "--name=alice", "--tiers=batch", "--concurrent=2", file]) == 0
    alice = capsys.readouterr().out.strip()
    assert keys_cli.main(["nitsum-keys", "new", "--name=ops.team", "--role=admin", file]) == 0
    boss = capsys.readouterr().out.strip()
    text = path.read_text()
    assert alice not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = read_keys(path)
    assert ring.find(alice) == ApiKey("alice", digest_of(alice), KeyRole.USER, ("batch",), None, 2)
    assert ring.find(boss) == ApiKey("ops.team", digest_of(boss), KeyRole.ADMIN)
    assert keys_cli.main(["nitsum-keys", "list", file]) == 0
    listed = capsys.readouterr().out
    assert "alice: user, batch, any rate, 2 at once" in listed
    assert alice not in listed
    assert keys_cli.main(["nitsum-keys", "new", "--name=alice", file]) == 2
    assert "has a key named 'alice' already" in capsys.readouterr().err
    assert path.read_text() == text


def test_without_a_file_the_entry_is_printed_beside_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys_cli.main(["nitsum-keys", "new", "--name=a"]) == 0
    shown = capsys.readouterr()
    assert tomllib.loads(shown.err)["keys"]["a"]["hash"] == "sha256:" + digest_of(shown.out.strip()).hex()


@pytest.mark.parametrize("argv", [["new"], ["list"], ["drop"], ["--name=x"], ["new", "--name=bad name"]])
def test_wrong_use_of_the_tool_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert keys_cli.main(["nitsum-keys", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@hypothesis.settings(max_examples=50)
@given(st.integers(1, 60), st.lists(st.floats(0, 30), min_size=1, max_size=100))
def test_no_minute_sees_more_than_its_share_and_what_was_spent(per_minute: int, pauses: list[float]) -> None:
    now = 0.0
    limits = Limits(lambda: now)
    taken: list[float] = []
    hints: list[float] = []
    for pause in pauses:
        now += pause
        try:
            with limits.use("c", per_minute, None):
                taken.append(now)
        except RateLimitedError as error:
            hints.append(error.retry_after_s)
            now += error.retry_after_s + 1e-6  # the hint is right
            with limits.use("c", per_minute, None):
                taken.append(now)
    assert all(0 < hint <= 60 / per_minute + 1e-6 for hint in hints)
    for index, start in enumerate(taken):
        within = sum(start <= time <= start + 60 for time in taken[index:])
        assert within <= 2 * per_minute  # a full bucket, and what flows in meanwhile


def test_calls_at_the_same_time_are_counted_per_client_and_given_back() -> None:
    limits = Limits(lambda: 0.0)
    with limits.use("a", None, 2), limits.use("a", None, 2):
        with pytest.raises(RateLimitedError, match="a has 2 open at once"), limits.use("a", None, 2):
            pass
        with limits.use("b", None, 2):
            pass
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), limits.use("a", None, 1):
            raise ZeroDivisionError
