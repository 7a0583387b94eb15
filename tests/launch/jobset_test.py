"""The JobSets in launch/gke by a schema of their API; exit codes that all launchers agree on."""

import functools
import json
import math
import pathlib
import re
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
TPUS = [LAUNCH / "gke" / f"{name}.yaml" for name in ("v5e", "v6e", "tpu7x")]
H100 = LAUNCH / "gke" / "h100.yaml"
JOBSETS = [*TPUS, H100]
VOLUMES = list(yaml.safe_load_all((LAUNCH / "gke" / "volumes.yaml").read_text()))

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


def pod_of(path: pathlib.Path) -> dict:
    """The pod that a JobSet starts on every host."""
    [job] = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def container_of(path: pathlib.Path) -> dict:
    [container] = pod_of(path)["containers"]
    return container


def environment_of(path: pathlib.Path) -> dict[str, str | None]:
    return {v["name"]: v.get("value") for v in container_of(path)["env"]}


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_jobsets(path):
    jobset = yaml.safe_load(path.read_text())
    assert misfits(jobset) == []
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    container = container_of(path)
    assert spec["parallelism"] == spec["completions"] > 1
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    env = environment_of(path)
    assert env["JAX_PLATFORMS"] == ("cuda" if path == H100 else "tpu")
    assert env["BN_JAX_STEP_TIMEOUT"] == "300"
    assert ("BN_JAX_CLUSTER" in env) is (path != H100)  # those are told who the others are
    # Where every host finds the same compiled programs: in the bucket of the runs.
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(env["JAX_COMPILATION_CACHE_DIR"]).startswith(places["runs"] + "/")


def test_the_h100s_find_each_other_and_the_driver():
    jobset = yaml.safe_load(H100.read_text())
    [job] = jobset["spec"]["replicatedJobs"]
    name = jobset["metadata"]["name"]
    env = environment_of(H100)
    # Pods are called JOBSET-JOB-REPLICA-INDEX, their domain JOBSET.
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}:8476"
    assert env["JAX_NUM_PROCESSES"] == str(job["template"]["spec"]["parallelism"])
    [number] = [v for v in container_of(H100)["env"] if v["name"] == "JAX_PROCESS_ID"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert number["valueFrom"] == {"fieldRef": {"fieldPath": index}}
    assert container_of(H100)["resources"]["limits"] == {"nvidia.com/gpu": 8}  # all of a node
    # GKE mounts the driver, but tells nobody; NCCL needs more than a container's 64 MiB.
    assert env["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    shared = {m["mountPath"]: m["name"] for m in container_of(H100)["volumeMounts"]}["/dev/shm"]
    assert {"name": shared, "emptyDir": {"medium": "Memory"}} in pod_of(H100)["volumes"]
    assert "NCCL's fast transport on A3 machines" in H100.read_text()


@pytest.mark.parametrize("path", TPUS, ids=lambda p: p.name)
def test_a_tpu_s_driver_may_lock_memory(path):
    container = container_of(path)
    assert container["securityContext"] == {
        "runAsUser": 0,
        "capabilities": {"add": ["SYS_RESOURCE"]},
    }
    shell, option, line, name = container["command"]
    assert (shell, option, name) == ("sh", "-c", "train")
    assert line == 'ulimit -l unlimited && exec python -m "$@"'
    # What the line runs, with another limit, since this test may not raise its own.
    line = line.replace("ulimit -l unlimited", "ulimit -l").replace("exec python -m", "exec echo")
    command = [shell, option, line, name, *container["args"]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == " ".join(container["args"])


def test_the_tpus_differ_in_name_and_slice_alone():
    found = {}
    for path in TPUS:
        text = path.read_text()
        selector = pod_of(path)["nodeSelector"]
        found[path.stem] = tuple(selector.values())
        chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
        [job] = yaml.safe_load(text)["spec"]["replicatedJobs"]
        limit = container_of(path)["resources"]["limits"]["google.com/tpu"]
        assert job["template"]["spec"]["parallelism"] * limit == chips
    assert found == {
        "v5e": ("tpu-v5-lite-podslice", "4x4"),
        "v6e": ("tpu-v6e-slice", "4x4"),
        "tpu7x": ("tpu7x", "2x2x4"),
    }
    plain = set()
    for path in TPUS:
        body = path.read_text().partition("apiVersion")[2]
        plain.add(re.sub(r"(gke-tpu-(accelerator|topology)): .*", r"\1", body))
    assert len(plain) == 1


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_data_and_runs_are_volumes_of_different_kinds(path):
    """The set is on a disk that all nodes read; the runs are in a bucket, no metadata cached."""
    specs = {(v["kind"], v["metadata"]["name"]): v["spec"] for v in VOLUMES}
    mounts = {m["name"]: m for m in container_of(path)["volumeMounts"]}
    found = {}
    for volume in pod_of(path)["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            asks = specs["PersistentVolumeClaim", claim["claimName"]]
            gives = specs["PersistentVolume", asks["volumeName"]]
            assert gives["claimRef"]["name"] == claim["claimName"]
            assert gives["accessModes"] == asks["accessModes"]
            found[volume["name"]] = (claim, gives)
    claim, data = found["data"]
    assert claim["readOnly"] and mounts["data"]["readOnly"] and data["csi"]["readOnly"]
    assert data["accessModes"] == ["ReadOnlyMany"]
    assert data["csi"]["driver"] == "pd.csi.storage.gke.io"
    assert f"mkfs.{data['csi']['fsType']} " in README
    claim, runs = found["runs"]
    assert runs["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    # GKE itself caches metadata for ever on these machines, unless it is told otherwise.
    for option in ("metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0"):
        assert option in runs["mountOptions"]
    assert not any("file-cache" in option for option in runs["mountOptions"])


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
    text = (LAUNCH / "gke" / "v5e.yaml").read_text()
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
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) <= again
    # One node may end with 3 and the others with 134, so the number of restarts has a limit.
    assert 0 < recovery["max_restarts_on_errors"] < 10
    noted = re.search(r"case \$code in \[(\d+)\]", (LAUNCH / "slurm.sbatch").read_text())
    assert noted and {int(digit) for digit in noted[1]} == never
    runbook = re.findall(r"^\| ([\d, ]+) \|[^|]+\| (\w+) \| (\w+)", README, re.M)
    verdicts = {int(c): row[1:] for row in runbook for c in row[0].split(",")}
    assert {c for c, v in verdicts.items() if v == ("ends", "ends")} == never | {0}
    assert again <= {c for c, v in verdicts.items() if v == ("requeue", "restart")}
