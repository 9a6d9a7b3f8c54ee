"""The manifests: rendered, valid against the schemas of Kubernetes and of each custom resource, and of one mind with the server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from server.access import OPEN
from server.metrics import Metrics
from server.settings import Settings
from tests.deploy.live import ROOT
from tests.docker.dockerfile import Dockerfile
from tests.server.client import app_of
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu", "levels")
VERSIONS = ("1.34.0", "1.35.0", "1.36.0", "1.37.0")
Manifest = dict[str, Any]


@cache
def render(overlay: str) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[Manifest]:
    return [one for one in render(overlay) if one["kind"] == kind]


EVERY = [(overlay, one) for overlay in OVERLAYS for one in render(overlay)] if shutil.which("kubectl") else []
every = pytest.mark.parametrize(("overlay", "one"), EVERY, ids=[f"{o}-{m['kind']}-{m['metadata']['name']}" for o, m in EVERY])
each = pytest.mark.parametrize("overlay", OVERLAYS)


# ---- schemas


def custom(one: Manifest) -> Any:
    """The model of a custom resource, from the projects' own definitions where a package has them."""
    if one["kind"] == "ScaledObject":
        return pytest.importorskip("cloudcoil.models.keda.v1alpha1").ScaledObject
    if one["apiVersion"].startswith("monitoring.coreos.com/"):
        return getattr(pytest.importorskip("cloudcoil.models.prometheus_operator.v1"), one["kind"])
    return None


PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 253}
LABELS = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string", "maxLength": 63}}
OURS = {
    # What these two say of the fields that we use; no package holds their definitions.
    "InferencePool": {
        "type": "object", "additionalProperties": False, "required": ["targetPorts", "selector", "endpointPickerRef"],
        "properties": {
            "targetPorts": {
                "type": "array", "minItems": 1, "maxItems": 8,
                "items": {"type": "object", "required": ["number"], "properties": {"number": PORT}, "additionalProperties": False},
            },
            "selector": {
                "type": "object", "required": ["matchLabels"], "properties": {"matchLabels": LABELS}, "additionalProperties": False,
            },
            "endpointPickerRef": {
                "type": "object", "additionalProperties": False, "required": ["name", "port"],
                "properties": {
                    "name": NAME, "failureMode": {"enum": ["FailOpen", "FailClose"]},
                    "port": {"type": "object", "required": ["number"], "properties": {"number": PORT}},
                },
            },
        },
    },
    "HTTPRoute": {
        "type": "object", "additionalProperties": False, "required": ["parentRefs", "rules"],
        "properties": {
            "parentRefs": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name"]}},
            "rules": {
                "type": "array", "minItems": 1, "maxItems": 16,
                "items": {
                    "type": "object", "additionalProperties": False, "required": ["backendRefs"],
                    "properties": {
                        "backendRefs": {"type": "array", "items": {"type": "object", "required": ["group", "kind", "name"]}},
                        "matches": {"type": "array", "items": {"type": "object", "required": ["headers"]}},
                    },
                },
            },
        },
    },
}  # fmt: skip


@every
def test_a_manifest_is_valid(overlay: str, one: Manifest) -> None:
    if model := custom(one):
        said = json.loads(model.model_validate(one).model_dump_json(by_alias=True, exclude_unset=True))
        assert said == one, "a field that the definition does not have"
    elif one["kind"] in OURS:
        jsonschema.validate(one["spec"], OURS[one["kind"]])
    else:
        kubernetes_validate = pytest.importorskip("kubernetes_validate")
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)


# ---- of one mind


@each
def test_pods_run_with_the_least_rights(overlay: str) -> None:
    user = Dockerfile(ROOT / "docker/Dockerfile").last("cpu", "USER").partition(":")[0]
    for deployment in of_kind(overlay, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == user
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        assert re.fullmatch(r"espalier:\d+\.\d+\.\d+-(cpu|cuda)", container["image"])
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


@each
def test_settings_are_the_servers(overlay: str) -> None:
    for config in (one for one in of_kind(overlay, "ConfigMap") if "settings" in one["metadata"]["name"]):
        given = {name.removeprefix("ESPALIER_").lower(): value for name, value in config["data"].items()}
        settings = Settings(**given)
        deployment = of_kind(overlay, "Deployment")[0]["spec"]["template"]["spec"]
        wait = deployment["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert deployment["terminationGracePeriodSeconds"] >= wait + settings.shutdown_grace_s + 5
        mounts = [mount["mountPath"] for mount in deployment["containers"][0]["volumeMounts"]]
        assert not settings.checkpoint.startswith("/") or any(settings.checkpoint.startswith(f"{mount}/") for mount in mounts)


@each
def test_what_is_named_is_there(overlay: str) -> None:
    names = {(one["kind"], one["metadata"]["name"]) for one in render(overlay)}
    deployments = {name for kind, name in names if kind == "Deployment"}
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler") + of_kind(overlay, "ScaledObject"):
        assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
    assert len(of_kind(overlay, "HorizontalPodAutoscaler") + of_kind(overlay, "ScaledObject")) == len(deployments), "one each"
    for deployment in of_kind(overlay, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (source,) = pod["containers"][0]["envFrom"]
        assert ("ConfigMap", source["configMapRef"]["name"]) in names
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim")
            assert not claim or ("PersistentVolumeClaim", claim["claimName"]) in names
    for rule in (rule for route in of_kind(overlay, "HTTPRoute") for rule in route["spec"]["rules"]):
        assert all((backend["kind"], backend["name"]) in names for backend in rule["backendRefs"])


@each
def test_each_selector_finds_one_deployment(overlay: str) -> None:
    deployments = of_kind(overlay, "Deployment")
    labels = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"].items() for one in deployments}
    paths = {
        "Service": "selector", "PodDisruptionBudget": "selector.matchLabels", "InferencePool": "selector.matchLabels",
        "NetworkPolicy": "podSelector.matchLabels",
    }  # fmt: skip
    for kind, path in paths.items():
        for one in of_kind(overlay, kind):
            selector = one["spec"]
            for key in path.split("."):
                selector = selector[key]
            assert [name for name, own in labels.items() if selector.items() <= own] == [one["metadata"]["name"]]
    (monitor,) = of_kind(overlay, "ServiceMonitor")
    for service in of_kind(overlay, "Service"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "espalier"
        assert {one["port"] for one in monitor["spec"]["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}


def test_keys_come_from_a_secret_and_probes_need_none() -> None:
    (config,) = (one["data"] for one in of_kind("gpu", "ConfigMap") if "settings" in one["metadata"]["name"])
    pod = of_kind("gpu", "Deployment")[0]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert config["ESPALIER_API_KEY_FILE"].startswith(f"{mounts['api-keys']}/") and config["ESPALIER_OPEN_METRICS"] == "true"
    assert not [one for one in render("gpu") if one["kind"] == "Secret"], "keys are not in the repository"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pod["containers"][0][probe]["httpGet"]["path"] in OPEN


def test_a_level_is_a_model_name() -> None:
    values = re.findall(r"value: (\S+@\w+)", (KUBERNETES / "overlays/levels/httproute.yaml").read_text())
    settings = [one["data"] for one in of_kind("levels", "ConfigMap") if "settings" in one["metadata"]["name"]]
    assert {name.partition("@")[0] for name in values} == {one["ESPALIER_SERVED_MODEL_NAME"] for one in settings}


@each
def test_probes_ask_routes_that_exist(overlay: str) -> None:
    paths = {getattr(route, "path", None) for route in app_of(FakeEngine()).routes}
    for deployment in of_kind(overlay, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in paths and asked["port"] in [port["name"] for port in container["ports"]]


def test_the_operators_rules_are_prometheus_rules() -> None:
    files = [ROOT / "deploy/prometheus" / name for name in ("recording.yml", "alerts.yml")]
    shipped = [yaml.safe_load(path.read_text())["groups"] for path in files]
    (rule,) = of_kind("cpu", "PrometheusRule")
    assert rule["spec"]["groups"] == [group for groups in shipped for group in groups]


def test_scalers_and_picker_read_gauges_that_exist() -> None:
    gauges = {metric.name for metric in Metrics().registry.collect() if metric.type == "gauge"}
    (scaler,) = of_kind("cpu", "HorizontalPodAutoscaler")
    named = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    (picker,) = (one for one in of_kind("gpu", "ConfigMap") if "picker" in one["metadata"]["name"])
    named += re.findall(r"Spec: (\S+)", picker["data"]["picker.yaml"])
    assert len(named) == 5 and set(named) <= gauges
    adapter = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    pattern = re.search(r'__name__=~"([^"]+)"', adapter[0]["seriesQuery"])[1]  # type: ignore[index]
    assert all(re.fullmatch(pattern, name) for name in named[:2])
