"""What docs/ensemble.md tells to type is typed: here on small networks, in `slow` on its own."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from bn_jax import predict, sweep
from bn_jax.evaluate import __main__ as evaluate
from bn_jax.figures import __main__ as figures
from tests.support.small_members import save_member

ROOT = pathlib.Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "ensemble.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.M | re.S)
    for line in block.splitlines()
]


def ordered() -> list[list[str]]:
    """Training first, then evaluations in the guide's order, pictures and predictions last."""
    place = {"bn_jax.sweep": 0, "bn_jax.evaluate": 1, "bn_jax.figures": 2, "bn_jax.predict": 3}
    return sorted(COMMANDS, key=lambda words: place[words[2]])


def check_table(place: pathlib.Path) -> None:
    table = (place / "results/ensemble/fig4.md").read_text()
    (row,) = (line for line in table.splitlines() if line.startswith("| BN-Inception ensemble"))
    assert "6, averaged | 72 of 144, not mirrored" in row and "not yet run" not in table


def test_the_guides_commands_on_small_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (28, 28)).save("digit.png")
    modules = {
        "bn_jax.evaluate": evaluate,
        "bn_jax.figures": figures,
        "bn_jax.predict": predict,
    }
    for words in ordered():
        assert words[:2] == ["python", "-m"]
        if words[2] == "bn_jax.sweep":
            monkeypatch.setattr(sys, "argv", [words[2], *words[3:], "--dry_run"])
            sweep.main()
            planned = re.findall(r"--workdir=(\S+)", capsys.readouterr().out)
            assert planned == [f"runs/ensemble/ensemble_{k}/seed_0" for k in range(1, 7)]
            for seed, folder in enumerate(planned):
                save_member(tmp_path / folder, seed)
            continue
        monkeypatch.setattr(sys, "argv", words[2:])
        modules[words[2]].main()
        out = capsys.readouterr().out
        if words[2] == "bn_jax.predict":
            assert out.splitlines()[0].startswith(("digit.png", '{"image": "digit.png"'))
    check_table(tmp_path)
    lines = (tmp_path / "runs/ensemble/evaluations.jsonl").read_text().splitlines()
    assert len(json.loads(lines[0])["members"]) == 2  # what --combine recorded


@pytest.mark.slow
def test_the_guides_commands_as_they_are(tmp_path):
    """Shortened by BN_JAX_SMOKE=1; six compilations of Inception, so minutes."""
    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    environment = os.environ | {
        "BN_JAX_SMOKE": "1",
        "XLA_FLAGS": "",  # one device, as on a user's machine
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for words in ordered():
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        if words[2] == "bn_jax.evaluate":
            assert "1,000 examples" in done.stdout
    check_table(tmp_path)
