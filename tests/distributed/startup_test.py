"""What a process finds where it starts: here a user without a home folder, as in a container."""

import pwd

import jax

from bn_jax.distributed import startup


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
