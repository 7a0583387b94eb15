"""Which devices a run has: an accelerator that is not used, the first line, days on a CPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from bn_jax import train
from bn_jax.distributed import accelerators, startup
from bn_jax.errors import ConfigError
from bn_jax.experiment.config import check
from configs import bn_x30, inception, mnist
from tests.support.processes import ROOT
from tests.train_test import small

GPU = "/dev/nvidia0"
CUDA = "jax-cuda13-plugin"


@pytest.mark.parametrize(
    ("files", "installed", "found", "remedy"),
    [
        ([GPU], [], f"an NVIDIA GPU ({GPU})", "pip install 'jax[cuda13]'"),
        (["/dev/nvidiactl", GPU], [], "an NVIDIA GPU (/dev/nvidiactl)", "pip install"),
        ([], [CUDA], f"an NVIDIA GPU ({CUDA})", "there is no /dev/nvidia*"),
        ([], ["jax-cuda12-plugin"], "an NVIDIA GPU (jax-cuda12-plugin)", "check the driver"),
        ([GPU], [CUDA], f"an NVIDIA GPU ({GPU}, {CUDA})", "could not start it"),
        (["/dev/accel0"], [], "a TPU (/dev/accel0)", "pip install 'jax[tpu]'"),
        ([], ["libtpu"], "a TPU (libtpu)", "there is no /dev/accel[0-9]*"),
        (["/dev/accel3"], ["libtpu"], "a TPU (/dev/accel3, libtpu)", "could not start it"),
    ],
)
def test_an_accelerator_that_jax_does_not_use_is_named_with_the_remedy(
    files, installed, found, remedy
):
    for environment in ({}, {"JAX_PLATFORMS": ""}, {"JAX_PLATFORMS": "cuda,cpu"}):
        line = accelerators.unused(files, installed, "cpu", environment)
        assert found in line and remedy in line and "set JAX_PLATFORMS=cpu" in line
        assert "\n" not in line

    for platforms in ("cpu", "cpu,cuda"):
        assert accelerators.unused(files, installed, "cpu", {"JAX_PLATFORMS": platforms}) == ""
    for backend in ("gpu", "tpu"):
        assert accelerators.unused(files, installed, backend, {}) == ""


@pytest.mark.parametrize("files", [[], ["/dev/accel"], ["/dev/null", "/dev/accel/accel0"]])
def test_a_machine_without_an_accelerator_trains_on_its_cpu(files):
    """/dev/accel is the folder of the NPUs of laptops, which jax cannot use."""
    assert accelerators.unused(files, ["jax", "jaxlib"], "cpu", {}) == ""


def test_the_machine_is_asked_for_its_device_files_and_packages(tmp_path, monkeypatch):
    for name in ("accel0", "accel1", "other"):
        (tmp_path / name).touch()
    kind = accelerators.Kind("a TPU", f"{tmp_path}/accel[0-9]*", ("jax", "no-such-plugin"), "")
    monkeypatch.setattr(accelerators, "KINDS", (kind,))
    assert accelerators.device_files() == [f"{tmp_path}/accel0", f"{tmp_path}/accel1"]
    assert accelerators.packages() == ["jax"]

    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ConfigError, match=r"made for a TPU \(.*accel0, jax\)"):
        accelerators.require_used("cpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    accelerators.require_used("cpu")


def command(tmp_path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """A short run of `bn_jax.main` where jax is free to choose, unless the environment says it."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    env |= {"XLA_FLAGS": "", "BN_JAX_SMOKE": "1", "PYTHONPATH": str(ROOT), **environment}
    words = ("--config=mnist_bn:digits", f"--workdir={tmp_path / 'run'}", *words)
    return subprocess.run(
        [sys.executable, "-m", "bn_jax.main", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )


needs_a_plain_machine = pytest.mark.skipif(
    bool(accelerators.device_files() or accelerators.packages()),
    reason="this machine has an accelerator",
)


@needs_a_plain_machine
def test_the_command_ends_with_code_2_where_the_accelerator_is_not_used(tmp_path):
    """An installed plugin, of which there is only the name: jax starts on the CPU."""
    folder = tmp_path / "packages"
    about = folder / "jax_cuda13_plugin-0.12.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: 0\n")
    path = f"{ROOT}:{folder}"

    done = command(tmp_path, PYTHONPATH=path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("bn_jax: jax uses the CPU, but this machine is made for an NVIDIA GPU")
    assert not (tmp_path / "run").exists()

    done = command(tmp_path, PYTHONPATH=path, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "run.json").is_file()


@needs_a_plain_machine
def test_without_an_accelerator_the_command_trains_and_first_names_the_devices(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("BN_JAX_SMOKE")  # the command's own line, before there is a run
    assert lines[1] == "devices: 1 x cpu"
    assert "days on this CPU" not in done.stdout


def test_devices_that_jax_cannot_start_are_a_mistake_of_the_environment(tmp_path):
    done = command(tmp_path, JAX_PLATFORMS="tpo")
    assert done.returncode == 2, done.stderr
    assert "JAX_PLATFORMS=tpo: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_first_line_names_what_there_is():
    mesh = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "devices": 8, "processes": 1}
    assert accelerators.sentence(mesh) == "devices: 8 x NVIDIA H100 80GB HBM3 (gpu)"
    assert accelerators.sentence(mesh | {"processes": 2}).endswith("(gpu), in 2 processes")


def test_a_cpu_says_how_many_days_the_papers_network_takes():
    config = bn_x30.get_config("imagenet")
    text = accelerators.days_on_cpu(config, "cpu", 6_000_000, 4.32)
    assert text.startswith("the first steps took 4.3 s each ")
    assert "the remaining 6,000,000 take 300 days on this CPU" in text
    assert "take 0.001 days" in accelerators.days_on_cpu(config, "cpu", 20, 4.32)
    assert accelerators.days_on_cpu(config, "gpu", 6_000_000, 4.32) == ""
    for smaller in (inception.get_config("digits"), inception.get_config("folder")):
        assert accelerators.days_on_cpu(smaller, "cpu", 6_000_000, 4.32) == ""
    assert accelerators.days_on_cpu(mnist.get_config(), "cpu", 50_000, 1.0) == ""


def test_the_days_are_said_once_after_the_first_steps(tmp_path, monkeypatch, capsys):
    asked = []

    def days(config, platform, steps, seconds):
        asked.append((platform, steps))
        assert 0 < seconds < 10
        return "so many days"

    monkeypatch.setattr(accelerators, "days_on_cpu", days)
    train.run(small(), tmp_path)
    assert asked == [("cpu", 40 - 3 * 5)]  # three dispatches of 5 steps
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "devices: 8 x cpu" and lines.count("so many days") == 1


# Determinism of GPUs


def test_xlas_flags_keep_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    assert not startup.gpus_are_deterministic()
    startup.make_gpus_deterministic()
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_autotune_level=0 {startup.DETERMINISTIC}"
    assert startup.gpus_are_deterministic()


@pytest.mark.parametrize("field", ["deterministic", "reproducible"])
def test_training_on_a_gpu_needs_the_flag_and_a_cpu_does_not(monkeypatch, field):
    monkeypatch.setenv("XLA_FLAGS", "")
    config = small(steps_per_dispatch=1, **{field: True})
    gpu = [SimpleNamespace(platform="gpu")]
    check(config, jax.devices()[:1])
    check(config, gpu, training=False)
    with pytest.raises(ConfigError, match=f"{field}=True: a GPU needs {startup.DETERMINISTIC}"):
        check(config, gpu)
    monkeypatch.setenv("XLA_FLAGS", startup.DETERMINISTIC)
    check(config, gpu)


def test_the_command_tells_xla_and_gives_a_deterministic_run_a_cache_of_its_own(tmp_path):
    """XLA ends a process whose XLA_FLAGS it does not know, so this also checks the flag's name."""
    cache = tmp_path / "cache"
    words = ["--config.deterministic=True", "--config.record.tensorboard=False"]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = command(tmp_path, *words, **environment)
    assert done.returncode == 0, done.stderr
    run = (tmp_path / "run" / "run.json").read_text()
    assert f'"XLA_FLAGS": "{startup.DETERMINISTIC}"' in run
    assert [path.name for path in cache.iterdir()] == ["deterministic"]
    assert any((cache / "deterministic").iterdir())
