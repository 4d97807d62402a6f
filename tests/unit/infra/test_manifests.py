"""The Compose file and the Kubernetes manifests: by their schemas, and by what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).resolve().parents[3] / "infra"
COMPOSE = INFRA / "compose.yaml"
KUBERNETES = INFRA / "kubernetes"
# Of Kubernetes; its pods have not changed what is used here for years.
VERSION = "1.34"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def manifests() -> list[Any]:
    return [
        pytest.param(manifest, id=f"{path.stem}-{manifest['kind']}-{manifest['metadata']['name']}")
        for path in sorted(KUBERNETES.glob("*.yaml"))
        for manifest in yaml.safe_load_all(path.read_text())
    ]


def validate(manifest: dict[str, Any]) -> None:
    """Against Kubernetes' own schema; a field that it does not know is an error."""
    library = pytest.importorskip("kubernetes_validate")
    library.validate(manifest, VERSION, strict=True)


def test_compose_is_what_the_specification_allows() -> None:
    pytest.importorskip("check_jsonschema")
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*argv, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_has_no_secret_and_no_open_port(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for name, value in service.get("environment", {}).items():
            secret = re.search("PASSWORD|SECRET|ACCESS_KEY", name)
            if secret or "postgresql" in str(value):
                # Required: without it nothing starts, and there is no default to guess.
                assert re.search(r"\$\{\w+:\?", value), name


def test_compose_services_wait_for_those_that_are_there(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"postgres", "s3", "buckets", "prefect", "mlflow", "worker"}
    for service in services.values():
        for needed, how in dict.fromkeys(service.get("depends_on", [])).items():
            assert needed in services
            if isinstance(service["depends_on"], dict):
                how = service["depends_on"][needed]["condition"]
            if how == "service_healthy":
                assert "healthcheck" in services[needed]
    devices = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("manifest", manifests())
def test_manifests(manifest: dict[str, Any]) -> None:
    if manifest["apiVersion"].startswith("ray.io/"):
        # KubeRay's own part is no part of Kubernetes; the pods are.
        spec = manifest["spec"]
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for number, group in enumerate(groups):
            pod = {"name": f"pod-{number}", "namespace": "mta"}
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": pod}
            validate({**template, "template": group["template"]})
            assert group["rayStartParams"].get("dashboard-host", "127.0.0.1") == "127.0.0.1"
        return
    validate(manifest)


def test_a_wrong_manifest_would_be_noticed() -> None:
    library = pytest.importorskip("kubernetes_validate")
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "dta": {}}
    with pytest.raises(library.ValidationError):
        validate(manifest)


def test_versions_are_those_that_are_run() -> None:
    pins = dict(
        line.split("==")
        for line in (INFRA.parent / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    ray = yaml.safe_load((KUBERNETES / "raycluster.yaml").read_text())
    assert ray["spec"]["rayVersion"] == pins["ray"]
    assert f"prefecthq/prefect:{pins['prefect']}-" in (KUBERNETES / "worker.yaml").read_text()


def test_the_job_template_has_its_variables_and_gives_a_job() -> None:
    template = json.loads((KUBERNETES / "base-job-template.json").read_text())
    known = template["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(known)
    values: dict[str, Any] = {name: own.get("default") for name, own in known.items()}
    values |= {"name": "run", "labels": {"a": "b"}, "annotations": {}, "command": ["prefect"]}
    values |= {"env": [{"name": "A", "value": "b"}]}

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(value) for key, value in part.items()}
        if isinstance(part, list):
            return [filled(value) for value in part]
        whole = re.fullmatch(r"\{\{ (\w+) \}\}", part) if isinstance(part, str) else None
        if whole:
            return values[whole[1]]
        if isinstance(part, str):
            return re.sub(r"\{\{ (\w+) \}\}", lambda found: str(values[found[1]]), part)
        return part

    validate(filled(template["job_configuration"]["job_manifest"]))
