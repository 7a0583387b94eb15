"""The study `rates`: accuracy by learning rate, and where a run diverged."""

from bn_jax.experiment.config import load
from bn_jax.studies import rates
from tests.support.small_studies import cells, run_study


def test_parts_of_inception_have_every_kind_of_weights():
    names = [part.name for part in rates.parts(load("bn_x5:digits"))]
    assert len(names) == 4 * len(rates.TIMES)
    assert names[0] == "bn/learning_rate=0.0015" and names[-1] == "plain_glorot/learning_rate=1.5"


def test_a_rate_that_diverges_is_marked_with_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "TIMES", (1.0, 1e39))
    rows = cells(run_study("rates", tmp_path, monkeypatch))
    assert "% (one seed)" in rows["bn"][0] and "% (one seed)" in rows["plain"][0]
    assert rows["plain"][1].startswith("diverged at step ")
    # Records are enough, and a run that diverged is not begun again.
    assert cells(run_study("rates", tmp_path, monkeypatch)) == rows
