"""Every benchmark runs (figures are never asserted), and the report reads what they leave."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import fair, input, peers_bn, report

ROOT = pathlib.Path(__file__).resolve().parent.parent


def smoke(name: str, folder: pathlib.Path) -> str:
    """Output of one benchmark's smoke run, which must leave no record."""
    # Compiled sooner, to slower code: one device, few optimizations.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": flags}
    environment["BN_JAX_BENCH_OUT"] = str(folder)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.parametrize("name", ["step", "mnist", "evaluate", "batch_norm", "input"])
def test_smoke_run(name, tmp_path):
    assert smoke(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["startup", "reproducible", "memory", "scale", "peers_bn", "forms"]
)
def test_longer_smoke_run(name, tmp_path):
    assert smoke(name, tmp_path)


def test_input_on_many_cpus_is_a_formula_of_what_was_measured():
    assert input.model(16, per_cpu=700, python=20_000) == 11_200
    assert input.model(208, per_cpu=700, python=20_000) == 20_000
    v5e = input.HOSTS[0]
    assert input.needed(v5e) == pytest.approx(4 * 197e12 * 0.3 / 11.96e9)  # 30%: an assumption
    rates = {"1": ([700], [690]), "2": ([700], [1300]), "Python alone": ([20_000], [1])}
    lines = input.scaling_table(rates).splitlines()
    assert "min(CPUs x 700, 20,000)" in lines[0]
    cells = {line[:42].strip(): line[42:].split() for line in lines}
    assert cells["1"] == ["700", "(700-700)", "690", "(690-690)", "700"]
    assert cells["2"][2:] == ["1300", "(1300-1300)", "1,400"]
    assert cells["208"] == ["not", "measured", "20,000"]
    assert cells[v5e.name] == ["19,766", "20,000"]
    one, eight = (cells[host.name] for host in input.HOSTS[1:])
    assert one[1] == "20,000" and eight[1] == f"{8 * 26 * 700:,}" and one[0] == eight[0]


def test_a_record_with_a_peer_that_is_not_here_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_JAX_BENCH_OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["peers_bn"])
    monkeypatch.setattr(peers_bn, "OTHERS", {"no_such_peer": ("no-such-peer", None)})
    path = fair.record_path("batch_norm_peers")
    path.parent.mkdir()
    path.write_text('{"peer_versions": {"jax": "1", "no_such_peer": "1"}}')
    with pytest.raises(SystemExit, match="pip install no-such-peer; or --smoke"):
        peers_bn.main()
    assert "no_such_peer" in path.read_text() and peers_bn.measurements == []
    monkeypatch.setattr(sys, "argv", ["peers_bn", "--help"])
    with pytest.raises(SystemExit, match="0"):
        peers_bn.main()
    peers_bn.require_no_loss({"jax": "1", "no_such_peer": "2"})  # nothing would be lost


def test_sides_take_turns():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = fair.interleave(sides, n=20, warmup=1)
    rounds = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert len(rounds) == 21 and set(rounds) == {"ab", "ba"}
    assert [len(s) for s in seconds.values()] == [20, 20]


def test_ratios_are_paired_by_round():
    found = fair.compare({"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 20.0, 8.0]}, "ours")
    assert found["theirs"] == {"n": 3, "median": 8.0, "fastest": 2.0, "ratio": 2.0}
    assert found["ours"]["ratio"] == 1.0


def test_sides_are_found_at_any_depth():
    timed = fair.compare({"ours": [1.0], "theirs": [2.0]}, "ours")
    record = {"cases": [{"shape": [2, 3], "case": "alone", "seconds": timed}, 7], "machine": {}}
    found = dict(report.sides(record))
    assert list(found) == ["[2, 3], alone, ours", "[2, 3], alone, theirs"]
    assert found["[2, 3], alone, theirs"]["ratio"] == 2.0


def test_the_report_has_every_row_and_says_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_JAX_BENCH_OUT", str(tmp_path))
    seconds = {"bn_jax": [1.0], "plain Flax": [2.1], "torch": [0.9]}
    record = {"sides": fair.compare(seconds, "bn_jax"), "share_of_ceiling": 0.5}
    fair.write("step", {**record, "memory_ratio": 0.5}, smoke=False)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "step.json").read_text())["machine"]["versions"]["jax"]
    rows = report.write(folder).read_text().splitlines()
    assert sum("not run" in row for row in rows) == len(report.ROWS) - 4
    assert "| step, 224 px, batch 32, float32, CPU | plain Flax | 2.1x | 2x |  | reached |" in rows
    assert "|  | torch eager, default layout | 0.9x | 1x | 1.2x | missed |" in rows
    assert "|  | share of the GEMM ceiling | 50% | 80% | 90% | missed |" in rows
    memory = "| step memory, XLA's temporary bytes | plain Flax | 0.5x | 0.6x | 0.5x | moonshot |"
    assert memory in rows
