"""The JobSets in launch/ by the fields of their API; exit codes that all launchers agree on."""

import json
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
JOBSETS = [LAUNCH / "jobset.yaml", LAUNCH / "jobset_gpu.yaml"]

# The fields that are used, by the API references of JobSet v1alpha2 and Kubernetes' batch/v1 and
# core/v1: a key that is not here is a misspelling. A list stands for items, a set for choices.
VOLUME = {"name": str, "persistentVolumeClaim": {"claimName": str, "readOnly": bool}}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "resources": {"limits": {"google.com/tpu": int, "nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
POD = {
    "restartPolicy": {"Never"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {
        f"cloud.google.com/gke-{k}": str for k in ("tpu-accelerator", "tpu-topology", "accelerator")
    },
    "tolerations": [{"key": str, "operator": {"Exists"}, "effect": {"NoSchedule"}}],
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
EXIT_CODES = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "completionMode": {"Indexed"},
    "podFailurePolicy": {"rules": [{"action": {"FailJob"}, "onExitCodes": EXIT_CODES}]},
    "template": {"spec": POD},
}
RULE = {"name": str, "action": {"FailJobSet"}, "onJobFailureReasons": [{"PodFailurePolicy"}]}
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": {EXCLUSIVE: str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def misfits(value, schema, place="") -> list[str]:
    """Where a document departs from a schema of the form above."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place}: no mapping"]
        unknown = [f"{place}.{key}: unknown" for key in value.keys() - schema.keys()]
        known = value.keys() & schema.keys()
        return unknown + [m for k in known for m in misfits(value[k], schema[k], f"{place}.{k}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: no list"]
        return [m for i, x in enumerate(value) for m in misfits(x, schema[0], f"{place}[{i}]")]
    if isinstance(schema, set):
        return [] if value in schema else [f"{place}: {value!r} is none of {schema}"]
    return [] if type(value) is schema else [f"{place}: {value!r} is no {schema.__name__}"]


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_jobsets(path):
    jobset = yaml.safe_load(path.read_text())
    assert misfits(jobset, JOBSET) == []
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] > 1
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    env = {v["name"]: v.get("value") for v in container.get("env", ())}
    if "gpu" in path.name:  # pods are called JOBSET-JOB-REPLICA-INDEX, their domain JOBSET
        name = jobset["metadata"]["name"]
        assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}:8476"
        assert env["JAX_NUM_PROCESSES"] == str(spec["parallelism"])
        assert "JAX_PROCESS_ID" in env
    misspelt = json.loads(json.dumps(jobset).replace("maxRestarts", "maxRestart"))
    assert misfits(misspelt, JOBSET) == [".spec.failurePolicy.maxRestart: unknown"]


def test_the_same_exit_codes_everywhere():
    operations = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", operations, re.M)
    again = {int(code) for code, last in rows if re.match("yes\\b", last)}
    never = {int(code) for code, last in rows} - again - {0}
    assert again == {6, 75} and never == {2, 3, 4, 5, 7, 8}
    for path in JOBSETS:
        job = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert set(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]) == never
    prevent = re.search(r"RestartPreventExitStatus=([\d ]+)", (LAUNCH / "tpu_host.sh").read_text())
    assert prevent and set(map(int, prevent[1].split())) == never
    noted = re.search(r"case \$code in \[(\d+)\]", (LAUNCH / "slurm.sbatch").read_text())
    assert noted and {int(digit) for digit in noted[1]} == never
    runbook = re.findall(r"^\| ([\d, ]+) \|[^|]+\| (\w+) \| (\w+)", README, re.M)
    verdicts = {int(c): row[1:] for row in runbook for c in row[0].split(",")}
    assert {c for c, v in verdicts.items() if v == ("ends", "ends")} == never | {0}
    assert again <= {c for c, v in verdicts.items() if v == ("requeue", "restart")}
