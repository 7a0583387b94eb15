"""The command line: what a user's mistake looks like, what is printed, what is written."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*words, cwd=ROOT, **env):
    """Runs `python -m bn_jax.main` with a compilation cache that would show any compiling."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-m", "bn_jax.main", *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


# (words, what the line must say). One process each: the commoner mistakes; tests/experiment/
# config_test.py has the rest as a table.
MISTAKES = [
    ([], "--list names them"),
    (["--config=configs/bn_x3.py"], "did you mean configs/bn_x30.py?"),
    (["--config=configs/bn_x30.py:digit"], "'digit' is none of imagenet, digits"),
    (["--config=configs/bn_x30.py", "--config.learning_rat=1"], "did you mean 'learning_rate'?"),
    (["--config=configs/bn_x30.py", "--config.learning_rate=fast"], "learning_rate=fast"),
    (["--config=configs/bn_x30.py", "--config.learning_rate=-1"], "learning_rate=-1"),
    (["--config=configs/bn_x30.py", "--config.learning_rate=nan"], "learning_rate=nan"),
    (["--config=configs/bn_x30.py", "--config.total_steps=0"], "total_steps=0"),
    (["--config=configs/bn_x30.py:digits", "--config.batch_size=48"], "group_size"),
    (["--confg=configs/bn_x30.py"], "unexpected argument '--confg=configs/bn_x30.py'"),
    (["--config=LICENSE"], "(LICENSE, line "),  # not Python
    (["--config=configs/__init__.py"], "has no function get_config()"),
    (["configs/bn_x30.py"], "unexpected argument 'configs/bn_x30.py'"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, words, said):
    done = run(*words, f"--workdir={tmp_path}/w", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # nothing compiled, nothing written


def test_a_project_with_its_own_folder_configs(tmp_path):
    """Its files build on ours and on each other, and ours do not take its files for theirs."""
    own = tmp_path / "configs"
    own.mkdir()
    (own / "__init__.py").write_text("RATE = 0.25\n")
    (own / "bn_x5.py").write_text("raise ImportError('not the experiment')\n")
    (own / "half.py").write_text(
        "from configs import RATE, inception\n"
        "def get_config(scale='digits'):\n"
        "    config = inception.get_config(scale)\n"
        "    config.learning_rate = RATE\n"
        "    return config\n"
    )
    (own / "eighth.py").write_text(
        "from configs import half\n"
        "def get_config(scale='digits'):\n"
        "    config = half.get_config(scale)\n"
        "    config.learning_rate /= 2\n"
        "    return config\n"
    )
    rates = {"bn_x30:digits": 0.045, "configs/half.py": 0.25, "configs/eighth.py": 0.125}
    for name, rate in rates.items():
        done = run(f"--config={name}", "--dry_run", cwd=tmp_path)
        assert f"\nlearning_rate: {rate}\n" in done.stdout, done.stderr


OWN = [  # bodies of a config file of a user's own, and what the line says
    ("c = ConfigDict({'learning_rate': 0.1})", "the config has no activation, batch_per_device, "),
    (
        "c = bn_x30.get_config('digits').unlock(); del c.bn.momentum",
        "the config has no bn.momentum:",
    ),
    (
        "c = bn_x30.get_config('digits'); c.lerning_rate = 1.0",
        'own.py, line 5: AttributeError: \'Key "lerning_rate" does not exist',
    ),
    (
        "c = bn_x30.get_config('digits').unlock(); c.seed = ConfigDict()",
        "Could not override field 'seed'",
    ),
    (
        "c = bn_x30.get_config('digits').unlock(); c.lerning_rate = 1.0",
        "there is no field 'lerning_rate': did you mean 'learning_rate'?",
    ),
    ("c = {}", "returns a dict, not a ConfigDict: begin with a config of this package"),
]


@pytest.mark.parametrize(("body", "said"), OWN, ids=lambda v: str(v)[:40])
def test_a_users_own_config_must_have_the_fields_of_ours(tmp_path, body, said):
    file = tmp_path / "own.py"
    imports = "from ml_collections import ConfigDict\nfrom configs import bn_x30\n"
    file.write_text(f"{imports}\ndef get_config(scale=''):\n    {body}\n    return c\n")
    done = run(f"--config={file}", "--dry_run", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_imagenet_it_says_how_to_get_it(tmp_path):
    done = run(
        "--config=configs/bn_x30.py",
        f"--workdir={tmp_path}/w",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
        HOME=str(tmp_path / "home"),  # no ~/tensorflow_datasets
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for said in ("imagenet2012", "bn_jax.prepare imagenet", ":digits"):
        assert said in lines[0]
    assert not (tmp_path / "w").exists() and not list(tmp_path.glob("cache/*"))


def test_too_many_devices_for_the_batch(tmp_path):
    done = run(
        "--config=configs/bn_x30.py:digits",
        f"--workdir={tmp_path}/w",
        XLA_FLAGS="--xla_force_host_platform_device_count=64",
    )
    assert done.returncode == 2 and "batch_size=32 is smaller than the 64 devices" in done.stderr
    assert ":pod" in done.stderr and not (tmp_path / "w").exists()


def test_list_names_every_experiment_from_any_folder(tmp_path):
    done = run("--list", cwd=tmp_path)
    assert done.returncode == 0
    for path in (ROOT / "configs").glob("[a-z]*.py"):
        assert f"\n{path.stem} " in f"\n{done.stdout}"
    assert "digits" in done.stdout


def test_help_names_the_flags_and_succeeds():
    done = run("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("--config", "--workdir", "--list", "--dry_run"))


def test_dry_run_prints_the_config_and_writes_nothing(tmp_path):
    done = run("--config=bn_x30:pod", "--dry_run", "--config.seed=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 0.045" in done.stdout and "seed: 7" in done.stdout
    assert "workdir: runs/bn_x30_pod" in done.stdout and not list(tmp_path.iterdir())
    assert "on N devices batch_size is 32 x N" in done.stdout


def test_a_short_run_shows_progress_accuracy_and_pictures(tmp_path):
    workdir = tmp_path / "w"
    done = run(
        "--config=configs/mnist_bn.py:digits",
        f"--workdir={workdir}",
        BN_JAX_SMOKE="1",
        XLA_FLAGS="",
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "of 1,000 examples" in done.stdout
    assert "not comparable" in done.stdout  # the limits of the set, where accuracy is printed
    assert "images/s" in done.stdout and "left" in done.stdout
    assert f"{workdir}/figures/run.png" in done.stdout.splitlines()
    assert (workdir / "figures" / "run.png").stat().st_size > 10_000
