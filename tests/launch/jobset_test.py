"""The JobSets in launch/ by a schema of their API; exit codes that all launchers agree on."""

import functools
import json
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
JOBSETS = [LAUNCH / "jobset.yaml", LAUNCH / "jobset_gpu.yaml"]

SCHEMA = ROOT / "tests" / "launch" / "jobset.schema.json"


@functools.cache
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="needs the extra [test]")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def misfits(jobset) -> list[str]:
    """Where a JobSet departs from the schema: its place and what the validator says."""
    found = validator().iter_errors(jobset)
    return sorted(f"{error.json_path}: {error.message}" for error in found)


def keys(value) -> int:
    """How many keys a document has, at all depths."""
    inside = value.values() if isinstance(value, dict) else value
    below = sum(map(keys, inside)) if isinstance(value, dict | list) else 0
    return below + (len(value) if isinstance(value, dict) else 0)


def with_misspelt_key(value, number: int):
    """The document with an x behind its key of that number, counted in order of reading."""
    place = iter(range(10**6))

    def copy(value):
        if isinstance(value, dict):
            return {k + "x" * (next(place) == number): copy(v) for k, v in value.items()}
        return [copy(v) for v in value] if isinstance(value, list) else value

    return copy(value)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_jobsets(path):
    jobset = yaml.safe_load(path.read_text())
    assert misfits(jobset) == []
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] > 1
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    env = {v["name"]: v.get("value") for v in container.get("env", ())}
    assert env["JAX_PLATFORMS"] == ("cuda" if "gpu" in path.name else "tpu")
    if "gpu" in path.name:  # pods are called JOBSET-JOB-REPLICA-INDEX, their domain JOBSET
        name = jobset["metadata"]["name"]
        assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}:8476"
        assert env["JAX_NUM_PROCESSES"] == str(spec["parallelism"])
        assert "JAX_PROCESS_ID" in env
        # GKE mounts the driver, but tells nobody; NCCL needs more than a container's 64 MiB.
        assert env["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
        shared = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}["/dev/shm"]
        memory = {"name": shared, "emptyDir": {"medium": "Memory"}}
        assert memory in spec["template"]["spec"]["volumes"]


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_every_misspelt_key_is_found(path):
    jobset = yaml.safe_load(path.read_text())
    count = keys(jobset)
    assert count > 50
    for number in range(count):
        assert misfits(with_misspelt_key(jobset, number)), number


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("maxRestarts: 50", "maxRestarts: '50'", r"maxRestarts: '50' is not of type 'integer'"),
        ("backoffLimit: 0", "", "'backoffLimit' is a required property"),
        ("FailJobSet", "FailJobset", r"rules\[0\].action: 'FailJobset' is not one of"),
        ("values: [2,", "values: [0,", "0 is less than the minimum of 1"),  # the API's own rule
        ("google.com/tpu: 4", "google.com/gpu: 4", "'google.com/gpu' was unexpected"),
        ("claimName: imagenet", "", "'claimName' is a required property"),
    ],
)
def test_what_is_wrong_is_named(old, new, match):
    text = (LAUNCH / "jobset.yaml").read_text()
    assert old in text
    found = misfits(yaml.safe_load(text.replace(old, new)))
    assert found and any(re.search(match, line) for line in found), found


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
