"""A study runs what is missing, refuses another config, and makes its table from records."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from bn_jax import study as command
from bn_jax.errors import ConfigError
from bn_jax.experiment import build, members
from bn_jax.step import init_state
from bn_jax.studies import STUDIES, frame
from tests.support.small_studies import SMALL, cells, run_study

ROOT = pathlib.Path(__file__).resolve().parents[2]


def type_in(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["study", *map(str, words)])
    command.main()
    return capsys.readouterr().out


def test_the_list_has_question_paper_and_time(monkeypatch, capsys):
    said = type_in(monkeypatch, capsys, "--list")
    for study in STUDIES.values():
        assert study.question in said and study.follows in said
        assert f"about {study.minutes} min a seed" in said
        assert float(study.minutes) < 15


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "there is no study 'nothing'; choose from population, group_size"),
        ([], "there is no study None"),
        (["rates"], "--workdir=DIR is needed, such as --workdir=runs/rates"),
        (["rates", "--workdir=x", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["rates", "--workdir=x", "--config.seed=3"], "--config.seed=3: the study sets it"),
        (["rates", "--workdir=x", "--config.lerning_rate=3"], "did you mean 'learning_rate'"),
        (["rates", "--workdir=x", "--config=bn_x7"], "there is no config bn_x7"),
    ],
)
def test_what_is_refused_is_one_line(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        type_in(monkeypatch, capsys, *words)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("config", ["mnist_bn:digits", "bn_x5:digits"])
def test_every_study_has_runs_of_either_network(name, config, tmp_path):
    """Their configs are checked as the command line checks them."""
    found = frame.runs(STUDIES[name], tmp_path, config, (), 2)
    names = [member.name for member in found]
    assert len(names) == len(set(names)) and len(names) % 2 == 0
    assert {member.config.seed for member in found} == {0, 1}
    steps = {member.config.total_steps for member in found}
    assert len(steps) == 1 and (config.startswith("mnist") or max(steps) <= 500)


def test_a_finished_study_is_drawn_again_from_its_records(tmp_path, monkeypatch):
    text = run_study("population", tmp_path, monkeypatch)
    for folder in tmp_path.rglob("checkpoints"):
        shutil.rmtree(folder)
    (tmp_path / "population.md").unlink()
    assert run_study("population", tmp_path, monkeypatch) == text

    # Another seed is added beside the first one.
    more = cells(run_study("population", tmp_path, monkeypatch, seeds=2))
    assert " to " in more["step 20"][1] and "one seed" in cells(text)["step 20"][1]

    # The network of step 0 is the one that the run started from.
    workdir = tmp_path / "bn" / "seed_1"
    exp = build.from_workdir(workdir)
    step, first = next(frame.states(exp, workdir))
    started = init_state(exp.model, 1, exp.data.image_shape)
    assert step == 0

    def assert_close(one, two):
        # A compiled product may be rounded otherwise, by one unit of float32's last place.
        np.testing.assert_allclose(one, two, rtol=2e-7)

    jax.tree.map(assert_close, first.params, started.params)


def test_another_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "run", lambda found, jobs: None)
    with pytest.raises(ConfigError, match="holds no recorded run"):
        frame.run(STUDIES["population"], tmp_path, "mnist_bn:digits", SMALL)
    before = (tmp_path / frame.RECORD).read_bytes()
    for name, config, settings in (
        ("population", "mnist_bn:digits", [*SMALL, "momentum=0.5"]),
        ("population", "mnist_bn:synthetic", SMALL),
        ("landscape", "mnist_bn:digits", SMALL),
    ):
        with pytest.raises(ConfigError, match="or another --workdir") as caught:
            frame.run(STUDIES[name], tmp_path, config, settings)
        assert "\n" not in str(caught.value)
    (tmp_path / frame.RECORD).write_text("{")
    with pytest.raises(ConfigError, match="a damaged record"):
        frame.run(STUDIES["population"], tmp_path, "mnist_bn:digits", SMALL)
    assert json.loads(before)["study"] == "population"


def test_the_command_trains_in_processes_and_refuses_another_config(tmp_path):
    words = [sys.executable, "-m", "bn_jax.study", "landscape", f"--workdir={tmp_path}"]
    settings = [f"--config.{field}" for field in SMALL]
    done = subprocess.run([*words, *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 members: 0 finished before, 2 to run" in done.stdout
    assert str(tmp_path / "landscape.md") in done.stdout.splitlines()
    assert (tmp_path / "bn" / "seed_0" / frame.MEASURED).is_file()

    other = subprocess.run(
        [*words, *settings, "--config.momentum=0.5"], capture_output=True, text=True
    )
    assert other.returncode == 2
    assert len(other.stderr.splitlines()) == 1 and "or another --workdir" in other.stderr


def test_the_page_has_every_study_and_its_commands_parse(monkeypatch, tmp_path):
    page = (ROOT / "docs" / "studies.md").read_text()
    headings = re.findall(r"^## (\w+)$", page, re.M)
    assert headings == list(STUDIES)
    for study in STUDIES.values():
        assert f"| [`{study.name}`](#{study.name}) | {study.question} |" in page

    started = []
    monkeypatch.setattr(frame, "run", lambda *words: started.append(words) or [])
    for line in re.findall(r"^python -m bn_jax\.study (.*)$", page, re.M):
        monkeypatch.setattr(sys, "argv", ["study", *shlex.split(line)])
        command.main()
    assert len(started) == 3
    for study, _, config, settings, seeds, _ in started:
        assert frame.runs(study, tmp_path, config or study.config, settings, seeds)


def test_make_studies_runs_every_study():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^STUDIES := (.*)$", makefile, re.M)[1].split() == list(STUDIES)
