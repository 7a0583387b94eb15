"""What a process finds where it starts: here a user without a home folder, as in a container."""

import pwd

import jax
import pytest

from bn_jax.distributed import startup
from bn_jax.errors import ConfigError
from tests.support.processes import TRAIN, spawn


def test_without_a_home_programs_are_not_kept_and_one_line_says_so(monkeypatch, capsys):
    def absent(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", absent)

    before = jax.config.jax_compilation_cache_dir
    startup.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "compiled programs are not kept" in said


def test_a_slice_that_jax_does_not_find_is_one_line(monkeypatch):
    """As in an image without libtpu."""

    def undetected(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", undetected)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setenv("BN_JAX_CLUSTER", "1")
    with pytest.raises(ConfigError, match=r"jax finds none .* install jax\[tpu\]"):
        startup.initialize()


@pytest.mark.parametrize("platforms", ["cuda", "tpu"])
def test_a_missing_accelerator_is_one_line(tmp_path, platforms):
    """Of one process and of two: the launchers name the platform, so that CPUs do not step in."""
    if any(device.platform in ("gpu", "tpu") for device in jax.devices()):
        pytest.skip("this machine has one")
    for count in (1, 2):
        log = tmp_path / f"log{count}"
        options = [*TRAIN, f"--workdir={tmp_path / 'run'}"]
        children = spawn(options, log, processes=count, platforms=platforms)
        assert [child.wait(60) for child in children] == [ConfigError.exit_code] * count
        for index in range(count):
            last = log.with_suffix(f".{index}").read_text().strip().splitlines()[-1]
            assert last.startswith(f"bn_jax: JAX_PLATFORMS={platforms}: ")
    assert not (tmp_path / "run").exists()
