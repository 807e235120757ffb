"""`deploy/` rendered and held against the published schemas, the code's settings and its task queues.

No cluster runs here: that the pods start is not shown by these tests (see docs/how-to/deployment.md).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from holdfast.authoring import registry
from holdfast.settings import Settings

ROOT = Path(__file__).parents[3]
BASE = ROOT / "deploy/base"
KEDA = json.loads((Path(__file__).parent / "schemas/keda.json").read_text())
TRIGGER = {
    "endpoint",
    "namespace",
    "taskQueue",
    "queueTypes",
    "targetQueueSize",
    "workerDeploymentName",
    "workerDeploymentBuildId",
}
"""Of the Temporal scaler's parameters those that are used here (keda.sh/docs, 2.21)."""
KUBERNETES = "1.30"
Document = dict[str, Any]


def documents(*files: Path) -> list[Document]:
    return [document for file in files for document in yaml.safe_load_all(file.read_text()) if document]


SOURCES = [f for f in sorted(BASE.rglob("*.yaml")) if f.name not in ("kustomization.yaml", "names.yaml")]


def rendered(overlay: str) -> list[Document]:
    """What `kubectl apply --kustomize` would send."""
    tool = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if not shutil.which(tool[0]):
        pytest.skip("neither kubectl nor kustomize is installed; the sources are checked all the same")
    done = subprocess.run([*tool, str(ROOT / "deploy" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def valid(document: Document) -> None:
    if document["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(document["spec"], KEDA[document["kind"]])
        for trigger in document["spec"].get("triggers", []):
            assert set(trigger["metadata"]) <= TRIGGER
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def of_kind(found: list[Document], kind: str) -> list[Document]:
    return [document for document in found if document["kind"] == kind]


def container(document: Document) -> Document:
    return document["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_a_source_fits_its_schema(file: Path):
    for document in documents(file):
        valid(document)


@pytest.mark.parametrize("overlay", ["overlays/production", "overlays/build"])
def test_what_is_rendered_fits_its_schema_and_hangs_together(overlay: str):
    found = rendered(overlay)
    for document in found:
        valid(document)
    workers = {d["metadata"]["name"]: d for d in of_kind(found, "Deployment")}
    assert {s["spec"]["scaleTargetRef"]["name"] for s in of_kind(found, "ScaledObject")} == set(workers)
    selectors = [d["spec"]["selector"]["matchLabels"] for d in workers.values()]
    assert len({json.dumps(each, sort_keys=True) for each in selectors}) == len(selectors), "two own the same pods"
    for document in workers.values():
        assert (
            document["spec"]["selector"]["matchLabels"].items()
            <= document["spec"]["template"]["metadata"]["labels"].items()
        )
        assert re.search(r":[\w.]+$", container(document)["image"])


def test_every_task_queue_has_a_deployment_that_is_scaled_by_it():
    found = rendered("overlays/production")
    queues = {"main": "holdfast", **{stage: f"holdfast.{stage}" for stage in registry.stages()}}
    assert {container(d)["args"][1] for d in of_kind(found, "Deployment")} == set(queues)
    scaled = {s["spec"]["scaleTargetRef"]["name"]: s["spec"]["triggers"] for s in of_kind(found, "ScaledObject")}
    for document in of_kind(found, "Deployment"):
        queue = queues[container(document)["args"][1]]
        assert [t["metadata"]["taskQueue"] for t in scaled[document["metadata"]["name"]]] == [queue]
        assert container(document)["env"][0] == {"name": "PROBED_QUEUE", "value": queue}


def test_the_workers_of_a_build_are_beside_those_of_another():
    for document in of_kind(rendered("overlays/build"), "Deployment"):
        environment = {each["name"]: each["value"] for each in container(document)["env"]}
        build = environment["HOLDFAST_BUILD_ID"]
        assert environment["HOLDFAST_DEPLOYMENT"]
        assert document["metadata"]["name"].endswith(f"-{build}")
        assert document["spec"]["selector"]["matchLabels"]["holdfast/build"] == build


def test_every_variable_is_a_setting_or_temporals_own():
    known = {str(field.alias) for field in Settings.model_fields.values() if field.alias}
    (config,) = of_kind(documents(*SOURCES), "ConfigMap")
    for name in config["data"]:
        assert name in known or name.startswith("TEMPORAL_"), name
    Settings.model_validate({k: v for k, v in config["data"].items() if k in known})


def test_a_worker_has_time_to_drain_and_no_rights_that_it_does_not_need():
    (config,) = of_kind(documents(*SOURCES), "ConfigMap")
    (worker,) = of_kind(documents(*SOURCES), "Deployment")
    # `worker.py` allows itself two seconds beyond the drain before it gives up.
    grace = worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > float(config["data"]["HOLDFAST_DRAIN_S"]) + 2
    pod = worker["spec"]["template"]["spec"]["securityContext"]
    assert pod["fsGroup"] == pod["runAsUser"], "a claimed volume belongs to root"
    for document in (worker, *of_kind(documents(*SOURCES), "Job")):
        assert document["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
        assert container(document)["securityContext"]["readOnlyRootFilesystem"]
        assert not container(document)["securityContext"]["allowPrivilegeEscalation"]
        assert container(document)["resources"]["requests"]


def test_the_commands_exist():
    for document in documents(*SOURCES):
        if document["kind"] in ("Deployment", "Job"):
            command = [*container(document)["command"][1:], "--help"]
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, env=dict(os.environ))
            assert done.returncode == 0, done.stderr
