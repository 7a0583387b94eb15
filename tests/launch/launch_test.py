"""launch/: what the scripts would run, and local.sh in earnest."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from tests.support import processes, tpu_hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
GOLDEN = (ROOT / "tests" / "golden" / "launch.txt").read_text()
SCRIPTS = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]


def run(line: str, path: pathlib.Path | None = None, **variables: str):
    """Runs a shell line from the checkout; `path` comes first in PATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"USER": "me", "PYTHON": "python"} | variables
    env["PATH"] = f"{path}:{env['PATH']}" if path else env["PATH"]
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)


def make(target: str) -> str:
    """The line that `make TARGET` runs."""
    plain = "--no-print-directory -o .venv/.installed -o .venv/.demo VENV=.venv MAKEFLAGS= MFLAGS="
    return run(f"{tool('make')} -n {plain} {target}").stdout.strip()


def tool(name: str) -> str:
    places = os.pathsep.join([os.environ["PATH"], str(pathlib.Path(sys.executable).parent)])
    return shutil.which(name, path=places) or pytest.skip(f"{name} is not installed")


def golden() -> dict[str, str]:
    """Command lines and what they print, as tests/golden/launch.txt has them."""
    blocks = [block.partition("\n") for block in GOLDEN.strip().removeprefix("$ ").split("\n\n$ ")]
    return {command: output.strip() for command, _, output in blocks}


@pytest.mark.parametrize("command", golden())
def test_dry_runs_print_the_commands(command):
    done = run(command)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace(str(ROOT), "CHECKOUT")
    assert re.sub(r" +$", "", printed, flags=re.M).strip() == golden()[command]


def test_every_script_that_starts_a_run_has_a_dry_run():
    starting = [script for script in SCRIPTS if "bn_jax.main" in script.read_text()]
    assert len(starting) >= 4
    for script in starting:
        assert any(script.name in c and "--dry-run" in c for c in golden()), script


def test_shellcheck():
    done = run(shlex.join([tool("shellcheck"), *map(str, SCRIPTS)]))
    assert done.returncode == 0, done.stdout


def test_hadolint():
    done = run(shlex.join([tool("hadolint"), str(LAUNCH / "Dockerfile")]))
    assert done.returncode == 0, done.stdout


def parsed_by_gcloud(lines: list[str], folder: pathlib.Path) -> list[str]:
    """What gcloud's own parser finds wrong with each line; nothing is run, nobody is asked."""
    commands = [{"command_string": line} for line in lines]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = run(
        f"{tool('gcloud')} meta lint-gcloud-commands --commands-file={folder}/commands.json",
        CLOUDSDK_CONFIG=str(folder), CLOUDSDK_CORE_DISABLE_PROMPTS="1",
    )  # fmt: skip
    return [answer["error_message"] or "" for answer in json.loads(done.stdout)]


def test_gcloud_accepts_every_line(tmp_path):
    printed = [line for line in GOLDEN.splitlines() if line.startswith("gcloud ")]
    lines = list(dict.fromkeys(shlex.join(shlex.split(line)) for line in printed))
    wrong = lines[0].replace("--node-id", "--nodeid")
    errors = parsed_by_gcloud([*lines, wrong], tmp_path)
    assert len(errors) == len(lines) + 1 >= 12
    assert errors[:-1] == [""] * len(lines)
    assert "--node-id" in errors[-1]  # the parser does parse


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (2, 0, False),
        (4, 0, False),
        (6, 0, True),
        (134, 0, True),
        (75, 3, True),
        (75, 50, False),
    ],
)
def test_slurm_requeues_what_a_restart_mends(tmp_path, code, restarts, again):
    fake(tmp_path, "srun", f"exit {code}")
    fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    done = run(
        "bash launch/slurm.sbatch --config=bn_x30:pod",
        tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts),
    )  # fmt: skip
    assert done.returncode == code
    assert ("scontrol requeue 17" in done.stdout) is again


def test_slurm_heeds_the_task_that_failed_for_good(tmp_path):
    """Process 0 finds a damaged shard (3), jax ends process 1 (134), the highest of the two."""
    fake(tmp_path, "python", "exit $((SLURM_PROCID ? 134 : 3))")
    both = 'shift 2; for i in 0 1; do SLURM_PROCID=$i "$@"; code=$?; done; exit $code'
    fake(tmp_path, "srun", both)
    fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    line = f"cd {tmp_path} && bash {LAUNCH}/slurm.sbatch --config=bn_x30:pod"
    done = run(line, tmp_path, SLURM_JOB_ID="17")
    assert done.returncode == 3 and "scontrol" not in done.stdout
    assert not list(tmp_path.glob("*.final"))


@pytest.mark.parametrize(("given", "cores"), [({}, 8), ({"SLURM_CPUS_PER_TASK": "16"}, 16)])
def test_slurm_s_tasks_get_their_cores_and_must_have_a_gpu(tmp_path, given, cores):
    fake(tmp_path, "srun", 'echo "srun $*"')
    done = run("bash launch/slurm.sbatch --config=bn_x30:pod", tmp_path, **given)
    assert f"--cpus-per-task={cores} " in done.stdout
    variables = "env JAX_PLATFORMS=cuda BN_JAX_STEP_TIMEOUT=300 JAX_COMPILATION_CACHE_DIR="
    assert f"{variables}{ROOT}/.compiled python -m bn_jax.main" in done.stdout
    assert "\n#SBATCH --cpus-per-task=8\n" in (LAUNCH / "slurm.sbatch").read_text()


# Long options that sbatch(1) has, as far as they are used here.
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal",
    "requeue", "open-mode", "output",
}  # fmt: skip


def test_slurm_s_directives_are_options_of_sbatch():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    found = [re.fullmatch(r"#SBATCH --([a-z-]+)(=[\w@:%.-]+)?", line) for line in directives]
    assert all(found) and {match[1] for match in found if match} == SBATCH
    # sbatch reads directives before the first command only.
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(line not in directives for line in lines[first:])


@pytest.mark.parametrize(("given", "place"), [("", ""), ("/fast/disk", "/fast/disk")])
def test_slurm_takes_another_place_for_compiled_programs_and_none(tmp_path, given, place):
    fake(tmp_path, "srun", 'echo "srun $*"')
    line = "bash launch/slurm.sbatch --config=bn_x30:pod"
    done = run(line, tmp_path, JAX_COMPILATION_CACHE_DIR=given)
    assert f" JAX_COMPILATION_CACHE_DIR={place} python " in done.stdout


def units(folder: pathlib.Path) -> dict[str, str]:
    """The files that tpu_host.sh writes on a host, by name, with stand-ins for sudo and gcsfuse."""
    write = f'[[ $1 == tee ]] && cat >"{folder}/${{2##*/}}" || echo "$*" >>"{folder}/log"'
    fake(folder, "sudo", write)
    fake(folder, "gcsfuse", "")
    options = "--config=bn_x30:pod --workdir='/mnt/bn_jax/run two' --config.note='50% \"x\" $y'"
    for command in ("mount bucket", "mount-data", f"start {options}"):
        done = run(f"bash launch/tpu_host.sh {command}", folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "log").read_text().splitlines() == [
        "mkdir -p /mnt/bn_jax",
        "systemctl daemon-reload",
        "systemctl enable --now mnt-bn_jax.mount",
        "mkdir -p /mnt/bn_jax_data",
        "systemctl daemon-reload",
        "systemctl enable --now mnt-bn_jax_data.mount",
        "systemctl daemon-reload",
        "systemctl enable bn_jax",
        "systemctl restart bn_jax",
    ]
    names = ("bn_jax.service", "mnt-bn_jax.mount", "mnt-bn_jax_data.mount")
    return {name: (folder / name).read_text() for name in names}


def test_a_tpu_host_trains_again_after_a_reboot_and_unmounts_after_the_save(tmp_path):
    found = units(tmp_path)
    service, mount = found["bn_jax.service"], found["mnt-bn_jax.mount"]
    for unit in (service, mount):  # started at boot, once there is a network
        assert "WantedBy=multi-user.target" in unit and "After=network-online.target" in unit
    # Ordered after the mount at boot, and so before its end at shutdown.
    place = re.search(r"^Where=(.+)$", mount, re.M)
    assert place and f"RequiresMountsFor={place[1]} " in service
    assert "TimeoutStopSec=120\n" in service and "Restart=on-failure\n" in service
    assert "Environment=BN_JAX_CLUSTER=1 JAX_PLATFORMS=tpu " in service
    assert '"--workdir=/mnt/bn_jax/run two" "--config.note=50%% \\"x\\" $$y"\n' in service


def test_a_tpu_host_reads_the_data_from_a_disk_and_not_from_the_bucket_of_the_runs(tmp_path):
    """140 GiB do not fit on a host's own disk of 100 GiB, so no cache of a bucket holds them."""
    found = units(tmp_path)
    data, runs = found["mnt-bn_jax_data.mount"], found["mnt-bn_jax.mount"]
    place = re.search(r"^Where=(.+)$", data, re.M)
    assert place and re.search(rf"^RequiresMountsFor=.* {place[1]}$", found["bn_jax.service"], re.M)
    assert "Type=ext4\nOptions=ro,noload\n" in data and "Type=gcsfuse\n" in runs
    # No metadata are cached of the runs: another host's heartbeat would not be seen.
    options = yaml.safe_load((tmp_path / "bn_jax.gcsfuse.yaml").read_text())
    assert options["metadata-cache"] == {"ttl-secs": 0, "negative-ttl-secs": 0}
    assert "file-cache" not in options
    # The label that the guide gives the disk is the one that is mounted.
    label = re.search(r"^What=/dev/disk/by-label/(.+)$", data, re.M)
    assert label and f"mkfs.ext4 -L {label[1]} " in (LAUNCH / "README.md").read_text()
    assert len(label[1]) <= 16  # ext4's limit
    create = "launch/tpu_pod.sh create --name=n --zone=z --project=p --type=t --runtime=r --dry-run"
    disk = "--data-disk=source=projects/p/zones/z/disks/d\\,mode=read-only"
    assert disk in run(f"{create} --data-disk=d").stdout
    assert "data-disk" not in run(create).stdout


def test_a_tpu_host_s_driver_may_lock_memory_and_its_programs_are_shared(tmp_path):
    service = units(tmp_path)["bn_jax.service"]
    assert "LimitMEMLOCK=infinity\n" in service
    assert "Environment=JAX_COMPILATION_CACHE_DIR=/mnt/bn_jax/.compiled\n" in service


def test_images_and_hosts_have_python_3_12():
    """jax[cuda13] needs it."""
    assert re.search(r"^ARG BASE=python:3\.12\.", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert (
        "uv venv --quiet --clear --python 3.12 "
        in run("bash launch/tpu_host.sh --dry-run install").stdout
    )
    assert "uv venv --clear --python 3.12 " in (LAUNCH / "sky.yaml").read_text()


def test_systemd_understands_the_units(tmp_path):
    verify = tool("systemd-analyze")
    found = units(tmp_path)
    # verify looks for the program, too.
    found["bn_jax.service"] = re.sub('="[^"]+python"', "=/bin/true", found["bn_jax.service"])

    def complaints() -> str:
        for name, text in found.items():
            (tmp_path / name).write_text(text)
        return run(shlex.join([verify, "verify", *(str(tmp_path / name) for name in found)])).stderr

    assert complaints() == ""
    found["bn_jax.service"] = found["bn_jax.service"].replace("RequiresMountsFor", "RequireMounts")
    assert "Unknown key" in complaints()


@pytest.mark.parametrize(("state", "code"), [("ACTIVE", 0), ("SUSPENDED", 1), ("FAILED", 1)])
def test_waiting_for_a_slice(tmp_path, state, code):
    fake(tmp_path, "gcloud", f"echo {state}")
    done = run("launch/tpu_pod.sh wait --name=bn --zone=z --project=p", tmp_path)
    assert done.returncode == code and (state in done.stderr) is (code != 0)


@pytest.mark.parametrize(
    "script", ["launch/local.sh 2 --dry-run --", "bash launch/slurm.sbatch --dry-run"]
)
def test_evaluation_is_launched_like_training(script):
    done = run(f"{script} --workdir=x --crops=10", BN_JAX_MODULE="bn_jax.evaluate")
    assert "-m bn_jax.evaluate --workdir=x --crops=10" in done.stdout
    assert "bn_jax.main" not in done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("launch/local.sh", "N='': the first argument is the number of processes"),
        ("launch/local.sh 0 -- --config=x", "N='0'"),
        ("launch/local.sh 2 --config=x", "--config=x' is not one of"),
        ("launch/local.sh 2", "no options for bn_jax.main"),
        ("launch/local.sh 2 --port=x -- --config=x", "--port='x'"),
        ("bash launch/slurm.sbatch", "no options for bn_jax.main"),
        ("launch/tpu_pod.sh crate", "command 'crate' is not one of create"),
        ("launch/tpu_pod.sh create --name=x --zone=y", "create needs --project"),
        ("launch/tpu_pod.sh create --name=x --zone=y --project=p", "create needs --type"),
        ("launch/tpu_pod.sh create --name=x --zone=y --project=p --type=tpu7x-32", "no TPU7x"),
        ("launch/tpu_pod.sh run --name=x --zone=y --project=p", "no options for bn_jax.main"),
        ("bash launch/tpu_host.sh stat", "command 'stat' is not one of"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(line, said):
    done = run(line)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_image_runs_as_a_user_and_copies_what_there_is():
    text = (LAUNCH / "Dockerfile").read_text()
    assert re.search(r"^USER 1000$", text, re.M) and "--require-hashes" in text
    assert re.search(r"^ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64$", text, re.M)  # GKE's driver
    shipped = (LAUNCH / "Dockerfile.dockerignore").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}\n" in shipped, source


# A run of six steps.
SETTINGS = [
    "--config=mnist_bn:digits",
    "--config.batch_size=64",
    "--config.bn.group_size=32",
    "--config.steps_per_dispatch=2",
    "--config.total_steps=6",
    "--config.eval_every=6",
    "--config.checkpoint_every=6",
    "--config.log_every=1",
    "--config.statistics_batches=2",
    '--config.record.activations="()"',
    "--config.record.tensorboard=False",
]


def train(workdir: pathlib.Path, n: int, *options: str, code: int = 0) -> str:
    settings = " ".join(SETTINGS)
    line = f"launch/local.sh {n} -- {settings} --workdir={workdir} {shlex.join(options)}"
    done = run(line, JAX_COMPILATION_CACHE_DIR=str(workdir.parent / "c"), PYTHON=sys.executable)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def curve(workdir: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def launcher_rows() -> list[list[str]]:
    """The cells of the table of what each launcher sets."""
    text = (LAUNCH / "README.md").read_text().partition("## What each launcher sets")[2]
    table = text.partition("\n## ")[0]
    rows = re.findall(r"^\| `.+\|$", table, re.M)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


GKE = ("v5e", "v6e", "tpu7x", "h100")
NAME = r"\b((?:JAX|BN_JAX|CUDA|LD)_[A-Z_]+)"


def test_the_table_names_all_that_the_launchers_set():
    rows = launcher_rows()
    assert [row[0].strip("`") for row in rows] == [
        "local.sh", "slurm.sbatch", "tpu_host.sh", "gke/v5e.yaml`, v6e, tpu7x", "gke/h100.yaml",
        "sky.yaml",
    ]  # fmt: skip
    for row in rows:
        text = (LAUNCH / row[0].strip("`").partition("`")[0]).read_text()
        code = re.sub(r"(^| )#.*$", "", text, flags=re.M)
        found = set(re.findall(rf"{NAME}=|- name: {NAME}", code))
        assert {a or b for a, b in found} == set(re.findall(NAME, " ".join(row[1:-1]))), row[0]
        seconds = re.search(r"\d+", row[-1])
        if row[0] == "`sky.yaml`":  # SkyPilot has no setting for it
            assert not seconds
        else:
            assert seconds and re.search(rf"\b{seconds[0]}\b", text), row[0]


def test_every_launcher_lets_slow_storage_take_its_time():
    scripts = ("local.sh", "slurm.sbatch", "tpu_host.sh", "sky.yaml")
    for path in (*scripts, *(f"gke/{n}.yaml" for n in GKE)):
        text = (LAUNCH / path).read_text()
        assert re.search(r'BN_JAX_STEP_TIMEOUT(=|:-|\b.*\n +value: ")300\b', text), path


# What the launchers' processes find in their environment, on this machine's CPU.

SRUN = """
while [[ $1 == --* ]]; do shift; done
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""


def launched(workdir: pathlib.Path, n: int) -> None:
    """Asserts that a run of n processes took its steps, as one process would."""
    assert len(curve(workdir)) == 6
    mesh = json.loads((workdir / "run.json").read_text())["info"]["mesh"]
    assert mesh["processes"] == mesh["devices"] == n


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_slurm_s_environment_joins_the_tasks(tmp_path, n):
    fake(tmp_path, "srun", SRUN)
    node = {"SLURM_JOB_ID": str(20000 + os.getpid() % 9000), "SLURM_STEP_NODELIST": "localhost"}
    node |= {"SLURM_NTASKS": str(n), "SLURM_STEP_NUM_TASKS": str(n), "JAX_PLATFORMS": "cpu"}
    line = f"bash {LAUNCH}/slurm.sbatch {' '.join(SETTINGS)} --workdir={tmp_path / 'run'}"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c"), "PYTHON": sys.executable}
    done = run(f"cd {tmp_path} && PYTHONPATH={ROOT} {line}", tmp_path, **node, **cache)
    assert done.returncode == 0, done.stderr
    launched(tmp_path / "run", n)


def run_as(tmp_path: pathlib.Path, environments: list[dict[str, str]]) -> None:
    """Asserts that a process in each environment trains, and that they are one run; on CPU."""
    # The jax of this process has noted in TPU_SKIP_MDS_QUERY that there are no chips here.
    here = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    children = []
    for given in environments:
        given = given | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c")}
        command = [sys.executable, "-m", "bn_jax.main", *shlex.split(" ".join(SETTINGS))]
        command.append(f"--workdir={tmp_path / 'run'}")
        children.append(processes.start(command, cwd=ROOT, env=here | given))
    assert [child.wait(300) for child in children] == [0] * len(environments)
    launched(tmp_path / "run", len(environments))


def environment_of(jobset: str, number: int) -> dict[str, str]:
    """What the JobSet sets in the pod of this number."""
    spec = yaml.safe_load((LAUNCH / "gke" / jobset).read_text())["spec"]["replicatedJobs"][0]
    [container] = spec["template"]["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value", str(number)) for entry in container["env"]}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_the_gpu_jobset_s_environment_joins_the_pods(tmp_path, n):
    pods = [environment_of("h100.yaml", number) for number in range(n)]
    for given in pods:
        port = given["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]
        given["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        given["JAX_NUM_PROCESSES"] = str(n)
    run_as(tmp_path, pods)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_the_tpu_jobset_s_environment_joins_the_pods(tmp_path, n):
    """GKE adds names and a number; jax detects them where there are TPUs, and asks for slices."""
    by_gke = {"TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * n)}
    by_gke |= {"JAX_COORDINATOR_PORT": str(processes.free_port())}  # 8482, where it is free
    by_gke |= tpu_hosts.environment(tmp_path / "host")
    pods = [environment_of("v6e.yaml", k) | by_gke | {"TPU_WORKER_ID": str(k)} for k in range(n)]
    with tpu_hosts.metadata_server({}) as address:
        run_as(tmp_path, [pod | {"GCE_METADATA_IP": address} for pod in pods])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_a_tpu_host_s_environment_joins_the_hosts(tmp_path, n):
    """A TPU VM's environment says nothing: jax asks the metadata server."""
    (tmp_path / "units").mkdir()
    service = units(tmp_path / "units")["bn_jax.service"]
    words = " ".join(re.findall(r"^Environment=(.+)$", service, re.M)).split()
    given = dict(word.split("=", 1) for word in words)
    given |= {"JAX_COORDINATOR_PORT": str(processes.free_port())}
    given |= tpu_hosts.environment(tmp_path / "host")
    with contextlib.ExitStack() as servers:
        attributes = [tpu_hosts.attributes_of(number, n) for number in range(n)]
        addresses = [servers.enter_context(tpu_hosts.metadata_server(a)) for a in attributes]
        run_as(tmp_path, [given | {"GCE_METADATA_IP": address} for address in addresses])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_skypilot_s_environment_joins_the_nodes(tmp_path, n):
    """The task's own commands, with what SkyPilot sets on each node."""
    script = yaml.safe_load((LAUNCH / "sky.yaml").read_text())["run"]
    script = script.replace("JAX_PLATFORMS=cuda", "JAX_PLATFORMS=cpu")
    script = script.replace("/runs/.compiled", str(tmp_path / "c"))
    script = script.replace(":8476", f":{processes.free_port()}")
    script = script.replace(".venv/bin/python", sys.executable)
    options = [option for option in SETTINGS if '"' not in option]  # the shell splits $OPTIONS
    options += ["--config.record.activation_every=6", f"--workdir={tmp_path / 'run'}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"SKYPILOT_NODE_IPS": "\n".join(["localhost"] * n), "SKYPILOT_NUM_NODES": str(n)}
    env |= {"OPTIONS": " ".join(options)}
    nodes = [
        processes.start(["bash", "-c", script], cwd=ROOT, env=env | {"SKYPILOT_NODE_RANK": str(k)})
        for k in range(n)
    ]
    assert [node.wait(300) for node in nodes] == [0] * n
    launched(tmp_path / "run", n)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_local_processes_train_to_the_curve_of_one(tmp_path, n):
    train(tmp_path / "one", 1)
    train(tmp_path / "many", n)
    # As in distributed_test: losses are float32, their sums split otherwise; 2e-7 measured.
    np.testing.assert_allclose(curve(tmp_path / "many"), curve(tmp_path / "one"), rtol=2e-6)
    assert len(curve(tmp_path / "one")) == 6
    mesh = json.loads((tmp_path / "many" / "run.json").read_text())["info"]["mesh"]
    assert mesh["processes"] == mesh["devices"] == n


@pytest.mark.slow
def test_processes_do_not_wait_for_a_save_that_is_left_out(tmp_path):
    """Each goes by its own clock; process 0 alone writes."""
    options = ("--config.write_seconds=1e6", "--config.checkpoint_every=2")
    train(tmp_path / "run", 2, *options)
    assert len(curve(tmp_path / "run")) == 6
    saved = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    assert sorted(path.name for path in saved) == ["2", "6"]


def test_local_ends_with_the_code_of_the_run(tmp_path):
    out = train(tmp_path / "x", 2, "--config.learning_rate=-1", code=2)
    assert "learning_rate=-1.0" in out and "Traceback" not in out


def typed(path: pathlib.Path) -> list[str]:
    """The lines that a guide says to type."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", path.read_text(), re.M | re.S)
    return "".join(blocks).splitlines()


def test_the_guide_and_make_say_the_same():
    lines = typed(LAUNCH / "README.md")
    [two] = [line for line in lines if line.startswith("launch/local.sh")]
    [pod] = [line for line in lines if line.startswith("launch/tpu_pod.sh")]
    [slurm] = [line for line in lines if line.startswith("sbatch ")]
    assert make("two") == f"PYTHON=.venv/bin/python {two}" and make("pod") == pod
    slurm = slurm.replace("sbatch --nodes=2", "bash").replace(".sbatch ", ".sbatch --dry-run ")
    for line in (pod, slurm):
        done = run(line)
        assert done.returncode == 0 and "bn_x30:pod" in done.stdout, done.stderr
    assert run(pod).stdout.count("gcloud compute tpus") == 8


def test_the_files_that_the_guide_names_are_there():
    lines = typed(LAUNCH / "README.md")
    named = {word for line in lines for word in re.findall(r"launch/[\w/.]+", line)}
    assert {"launch/gke/volumes.yaml", "launch/gke/v6e.yaml", "launch/sky.yaml"} <= named
    for path in named:
        assert (ROOT / path).is_file(), path
    assert len((LAUNCH / "README.md").read_text().splitlines()) <= 100  # two screens


def test_the_guide_to_one_gpu_says_what_the_script_takes():
    one_gpu = typed(ROOT / "docs" / "gpu_check.md")
    assert len(one_gpu) == 3
    for line in one_gpu:
        done = run(f"{line.partition('#')[0]} --dry-run")
        assert done.returncode == 0 and "benchmarks.gpu_check" in done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_as_typed(tmp_path):
    [line] = [x for x in typed(LAUNCH / "README.md") if x.startswith("launch/local.sh")]
    line = line.replace("runs/two", str(tmp_path / "two"))
    done = run(line, PYTHON=sys.executable, BN_JAX_SMOKE="1")
    assert done.returncode == 0, done.stderr
    assert "of 1,000 examples" in done.stdout
    mesh = json.loads((tmp_path / "two" / "run.json").read_text())["info"]["mesh"]
    assert mesh["processes"] == 2


@pytest.mark.slow
def test_a_stop_is_passed_on_and_the_same_command_goes_on(tmp_path):
    options = "--config=mnist_bn:digits --config.batch_size=64 --config.bn.group_size=32"
    options += (
        " --config.steps_per_dispatch=1 --config.log_every=5 --config.record.tensorboard=False"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    process = processes.start(
        ["launch/local.sh", "2", "--", *options.split(), f"--workdir={tmp_path / 'w'}"],
        cwd=ROOT, env=env | {"PYTHON": sys.executable}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = tmp_path / "w" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and '"train"' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=120) == 75
    assert json.loads((tmp_path / "w" / "run.json").read_text())["status"] == "preempted"


def test_a_lost_process_ends_the_others(tmp_path):
    """Process 1 dies at once; process 0, which would wait for ever, is ended after the grace."""
    fake(tmp_path, "fake", '[[ $JAX_PROCESS_ID == 1 ]] && exit 9; trap "" TERM; exec sleep 60')
    start = time.monotonic()
    done = run("launch/local.sh 2 -- --config=x", PYTHON=str(tmp_path / "fake"), BN_JAX_GRACE="1")
    # "python -m bn_jax.main" is the fake with arguments that it does not look at
    assert done.returncode == 9 and "ended with 9; waiting for the others" in done.stderr
    assert time.monotonic() - start < 30
