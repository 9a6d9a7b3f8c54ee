"""The images: lint, what they promise, and their commands run in a clean root, as their user, with nothing writable but /tmp."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from server.settings import Settings
from tests.deploy.live import free_port
from tests.docker.dockerfile import ROOT, Dockerfile, Overlay, build, context, in_namespace

DOCKER = ROOT / "docker"
FILE = Dockerfile(DOCKER / "Dockerfile")
TARGETS = ("cpu", "cuda")
BUDGET = 1200
"""Megabytes of the CPU image beside its base image."""


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint")
def test_hadolint_finds_nothing() -> None:
    subprocess.run(["hadolint", DOCKER / "Dockerfile"], check=True)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_nobody_and_ends_on_sigterm(target: str) -> None:
    uid, _, gid = FILE.last(target, "USER").partition(":")
    assert int(uid) >= 10_000 and int(gid) >= 10_000
    assert FILE.last(target, "STOPSIGNAL") == "SIGTERM"
    assert FILE.command(target, "ENTRYPOINT") + FILE.command(target, "CMD") == ["espalier", "serve"]
    for kind, what in FILE.instructions(target):
        assert kind != "ADD"
        assert kind != "FROM" or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", what), "a version, and not latest"


@pytest.mark.parametrize("target", TARGETS)
def test_its_settings_exist(target: str) -> None:
    environment = FILE.environment(target)
    settings = {name.removeprefix("ESPALIER_").lower() for name in environment if name.startswith("ESPALIER_")}
    assert settings <= Settings.model_fields.keys()
    assert environment["ESPALIER_HOST"] == "0.0.0.0"


def test_the_targets_are_installed_alike() -> None:
    cpu, cuda = (FILE.instructions(f"install-{target}") for target in TARGETS)
    assert [one for one in cpu if one not in cuda] == [("ARG", 'TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"')]


def test_the_context_holds_what_is_installed_and_no_more() -> None:
    packed = set(context())
    assert {"espalier.py", "constraints.txt", "docker/install", "server/playground/index.html", "models/kernels/floats.h"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "docs/", "runs/", ".")) or name.endswith(".pyc")]


# ---- compose


def compose() -> dict[str, dict[str, object]]:
    services: dict[str, dict[str, object]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    return services


def test_compose_files_are_valid() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    for name in ("compose.yaml", "compose.cuda.yaml"):
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / name).read_text())  # what is set when nothing is
        compose_spec.PyCompose.from_yaml(text)


def test_compose_mounts_what_exists_and_gives_no_privileges() -> None:
    for service in compose().values():
        assert service["cap_drop"] == ["ALL"]
        assert not str(service["image"]).endswith("latest") and ":" in str(service["image"])
        for mount in service["volumes"]:  # type: ignore[attr-defined]
            if mount.startswith("."):
                assert (DOCKER / mount.split(":")[0]).exists(), mount
    server = compose()["espalier"]
    assert server["read_only"] is True
    assert {name.removeprefix("ESPALIER_").lower() for name in server["environment"]} <= Settings.model_fields.keys()  # type: ignore[attr-defined]
    assert int(str(server["stop_grace_period"]).removesuffix("s")) > Settings.model_fields["shutdown_grace_s"].default


def test_compose_scrapes_and_shows_the_server() -> None:
    services = compose()
    (job,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"espalier:{FILE.environment('cpu')['ESPALIER_PORT']}"]}]
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"].startswith("http://prometheus:") and "prometheus" in services
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/espalier.yml").read_text())["providers"]
    mounts = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]  # type: ignore[attr-defined]
    assert f"{provider['options']['path']}/espalier.json" in mounts


# ---- without an engine


def can_mount() -> bool:
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True) if os.getuid() == 0 else None
    tools = Path("/usr/bin/python3").exists() and shutil.which("apt-get") and shutil.which("curl")
    return bool(tools and tried and tried.returncode == 0)


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs root, mount namespaces and Debian")
def test_the_cpu_image_builds_serves_and_stops(tmp_path: Path) -> None:
    """Each RUN as it stands in a copy of this root; then the entry point and the health check on a read-only root."""
    installed, image = Overlay(tmp_path / "install-cpu"), Overlay(tmp_path / "cpu")
    for overlay in (installed, image):
        overlay.directory.mkdir()
    (installed.directory / "context").write_text("\0".join(context()))
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | {"TORCH_ARGS": ""}
    builds = build(FILE, "install-cpu", installed, {}, pip) + build(FILE, "cpu", image, {"install-cpu": installed}, {})

    port = str(free_port())
    environment = FILE.environment("cpu") | {"ESPALIER_PORT": port, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    uid = FILE.last("cpu", "USER").partition(":")[0]

    def as_user(command: list[str]) -> str:
        return image.chroot(environment, FILE.last("cpu", "WORKDIR"), shlex.join(command), uid)

    serve = as_user(["exec", *FILE.command("cpu", "ENTRYPOINT"), *FILE.command("cpu", "CMD")])
    healthy = as_user(FILE.command("cpu", "HEALTHCHECK"))
    ask = f"curl -sf -F image=@{ROOT}/docs/samples/shapes.png -F question='How many objects are there?' 127.0.0.1:{port}/v1/vqa"
    out = in_namespace(
        f"""
        {builds}
        du -sm {image.root}/opt/espalier | cut -f1 | sed 's/^/megabytes /'
        ! ls {image.root}/opt/espalier/bin/pip {image.root}/src 2> /dev/null
        mount -o remount,ro {image.root}
        mount -o remount,ro,bind {image.root}/opt/espalier
        ! {as_user(["touch", "/opt/espalier/x"])} 2> /dev/null
        ! {as_user(["touch", "/checkpoints/x"])} 2> /dev/null
        {serve} & server=$!
        for i in $(seq 120); do {healthy} 2> /dev/null && break; kill -0 $server; sleep 0.5; done

        {ask}
        kill -s {FILE.last("cpu", "STOPSIGNAL").removeprefix("SIG")} $server
        wait $server && echo; echo "ended with $?"
        """,
        timeout=1200,
    )
    assert '"answer":"Four"' in out or '"answer":"four"' in out
    assert "ended with 0" in out
    megabytes = int(re.search(r"megabytes (\d+)", out)[1])  # type: ignore[index]
    assert megabytes <= BUDGET, f"{megabytes} MB"
