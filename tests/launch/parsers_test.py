"""Launch files by the parsers of those who read them, each in an environment of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SKYPILOT = "skypilot==0.14.1"
KUBERNETES = "kubernetes-validate==1.37.0"

# Prints what the parser says of the file, and of the same file with one key misspelt.
SKY = """
import copy, json, sys, yaml
import sky

config = yaml.safe_load(open(sys.argv[1]))
values = [("BUCKET", "runs"), ("DATA", "data")]

def task(config):
    return sky.Task.from_yaml_config(copy.deepcopy(config), env_overrides=values)

found = task(config)
[resources] = found.resources
said = {"nodes": found.num_nodes, "accelerators": resources.accelerators}
said["spot"] = resources.use_spot
said["recovery"] = resources.job_recovery
said["mounts"] = {place: storage.mode.value for place, storage in found.storage_mounts.items()}
config["resources"]["acelerators"] = config["resources"].pop("accelerators")
try:
    task(config)
except ValueError as error:
    said["misspelt"] = str(error)
print(json.dumps(said))
"""

VOLUMES = """
import json, sys, yaml
import kubernetes_validate

said = {"kinds": []}
for document in yaml.safe_load_all(open(sys.argv[1])):
    kubernetes_validate.validate(document, "1.34", strict=True)
    said["kinds"].append(document["kind"])
document["spec"]["acessModes"] = document["spec"].pop("accessModes")
try:
    kubernetes_validate.validate(document, "1.34", strict=True)
except kubernetes_validate.ValidationError as error:
    said["misspelt"] = str(error)
print(json.dumps(said))
"""


def parsed(folder: pathlib.Path, package: str, program: str, path: pathlib.Path) -> dict:
    """What the program prints in a new environment that has the package."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*install, package], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1]}")

    # Nothing is read from the user's own files, and nobody is told.
    env = os.environ | {"HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    env.pop("PYTHONPATH", None)
    command = [str(python), "-c", program, str(path)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_skypilot_reads_the_task(tmp_path):
    said = parsed(tmp_path, SKYPILOT, SKY, LAUNCH / "sky.yaml")
    assert said["nodes"] == 2 and said["accelerators"] == {"H100": 8} and said["spot"] is True
    assert said["recovery"]["recover_on_exit_codes"] == [75]
    assert said["mounts"] == {"/runs": "MOUNT", "/data": "MOUNT_CACHED"}
    assert "acelerators" in said["misspelt"]


@pytest.mark.slow
def test_kubernetes_knows_every_field_of_the_volumes(tmp_path):
    said = parsed(tmp_path, KUBERNETES, VOLUMES, LAUNCH / "gke" / "volumes.yaml")
    assert said["kinds"] == ["PersistentVolume", "PersistentVolumeClaim"] * 2
    assert "acessModes" in said["misspelt"]
