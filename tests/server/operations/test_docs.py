"""What the operations page and the examples of deployment name is there."""

import asyncio
import re
from pathlib import Path

import yaml

from nitsum_jax.server.client import flags
from nitsum_jax.server.launch import flags as launch_flags
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations.routes import ops_routes
from nitsum_jax.server.security import keys_cli
from nitsum_jax.server.security.guard import Need
from nitsum_jax.server.security.http_guard import HEALTH_PATHS, need_of
from tests.server.harness import ask, until
from tests.server.operations.fake_cells import FakeCells
from tests.server.operations.ports import opened
from tests.server.operations.test_metrics import of

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "server" / "operations.md").read_text(encoding="utf-8")
SERVE = set(launch_flags._define())
# Of docker, kubectl and tools/screenshot_dashboard.py.
_OTHERS = {"rm", "build-arg", "url", "from-file", "cert", "key"}


def named_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))


def test_every_flag_of_the_page_is_one() -> None:
    known = SERVE | set(flags._define()) | set(keys_cli._define())
    assert named_flags(PAGE) - known - _OTHERS == set()
    assert set(named_flags(PAGE)) >= {"metrics_port", "admin_port", "api_keys", "tls_client_ca", "otlp_endpoint"}


def test_every_flag_of_the_server_and_the_client_is_on_the_serving_page() -> None:
    page = named_flags((ROOT / "docs" / "server" / "serving.md").read_text(encoding="utf-8"))
    assert SERVE | set(flags._define()) <= page


def test_every_metric_of_the_page_is_one_and_none_is_left_out() -> None:
    async def samples() -> set[str]:
        async with opened(OpsOptions(), make=FakeCells) as open_:
            await ask(open_.run.stub)
            await until(lambda: open_.run.router.open_streams == 0)
            return {key[0] for key in of(open_.ports.views.present().registry)}

    # What a histogram is made of is told by its own name.
    there = {re.sub(r"_(bucket|count|sum)$", "", name) for name in asyncio.run(samples()) if "_created" not in name}
    named = set(re.findall(r"\bnitsum_(?!jax\b)[a-z]\w+", PAGE))
    # Which the fake one does not count.
    engines = {"nitsum_num_preemptions_total", "nitsum_wide_prefills_total", "nitsum_broken_logits_total"}
    engines |= {"nitsum_predicted_ttft_seconds", "nitsum_predicted_tpot_seconds"}
    assert named - engines == there


def test_the_manifest_starts_the_server_with_flags_that_it_has() -> None:
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert named_flags(" ".join(container["args"])) <= SERVE
    options = dict(argument.removeprefix("--").split("=") for argument in container["args"])
    assert pod["terminationGracePeriodSeconds"] > float(options["drain_seconds"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": int(options["port"]), "https": int(options["http_port"])}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert need_of("GET", container[probe]["httpGet"]["path"]) is Need.NOTHING
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert options["api_keys"].startswith(mounts["keys"])
    assert options["tls_cert"].startswith(mounts["tls"])


def test_the_image_starts_the_server_with_flags_that_it_has() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    starts = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)
    assert len(starts) == 2
    assert named_flags(" ".join(starts)) <= SERVE
    copied = {name for line in re.findall(r"^COPY ([\w. ]+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied >= {"nitsum_jax", "pyproject.toml", "constraints.txt"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}\n" in ignored


def test_health_is_open_and_everything_else_of_the_operators_is_not() -> None:
    async def paths() -> set[str]:
        async with opened(OpsOptions()) as open_:
            return {route.path for route in ops_routes(open_.ports.views)}  # type: ignore[attr-defined]

    found = asyncio.run(paths())
    assert {path for path in found if need_of("GET", path) is Need.NOTHING} == found & set(HEALTH_PATHS)
    assert {need_of("POST", path) for path in found - set(HEALTH_PATHS)} == {Need.MONITOR, Need.ADMIN}
