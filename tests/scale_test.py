"""benchmarks.scale: what is read from a compiled program, the cost model, and the step itself."""

import argparse
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from benchmarks import cost_model, cuda, scale

ROOT = pathlib.Path(__file__).resolve().parent.parent
HLO = """
  %all-reduce.1 = (f32[1000]{0}, /*index=1*/f32[3,3,8]{2,1,0}) all-reduce(%a, %b), channel_id=1
  %all-reduce-start.2 = bf16[16]{0} all-reduce-start(%c), channel_id=2
  %all-reduce-done.2 = bf16[16]{0} all-reduce-done(%all-reduce-start.2)
  %counts = (s32[], s32[], s32[]) all-reduce(%d, %e, %f), channel_id=3
  %all-gather.1 = f32[32,7,7]{2,1,0} all-gather(%g), dimensions={0}
  ROOT %fusion = f32[8]{0} fusion(%all-reduce.1), calls=%x
"""


def test_collectives_are_read():
    assert scale.collectives(HLO) == [
        ("all-reduce", {"f32": 4 * (1000 + 72)}),
        ("all-reduce", {"bf16": 32}),
        ("all-reduce", {"s32": 12}),
        ("all-gather", {"f32": 4 * 32 * 49}),
    ]


def test_an_asynchronous_collective_hands_in_its_operands():
    """On GPUs the shape of a start has both operands and results."""
    gpu = """
  %start = ((f32[100]{0:T(8)}, bf16[3]{0}), (f32[100]{0}, bf16[3]{0})) all-reduce-start(%a, %b)
  %done = (f32[100]{0}, bf16[3]{0}) all-reduce-done(%start)
"""
    assert scale.collectives(gpu) == [("all-reduce", {"f32": 400, "bf16": 6})]


def report(*found: scale.Collective, dtypes=("f32",)):
    numbers = {"across": 1, "params": 4000, "statistics": 288}
    return {"collectives": list(found), "dtypes": dtypes, **numbers}


def test_claims_fail_where_they_should():
    good = scale.Collective("all-reduce", {"f32": 2144})
    counts = scale.Collective("all-reduce", {"s32": 12})
    assert all(scale.claims(report(good, good)).values())

    def failing(*found, **more):
        claims = scale.claims(report(*found, **more))
        return [c.partition(" ")[0] for c, ok in claims.items() if not ok]

    assert failing(*scale.collectives(HLO)) == ["no", "4", "bytes", "sums"]
    assert failing(good, good, good) == ["3", "bytes"]
    assert failing(good, good, counts) == ["3", "sums"]  # however small, it is waited for
    assert failing(scale.Collective("all-reduce", {"bf16": 2144})) == ["sums"]
    assert failing(good, good, dtypes=["bf16", "f32"]) == ["sums"]  # widened later


def test_the_page_says_where_dtypes_were_read():
    cpu, tpu = {"target": "virtual CPU"}, {"target": "TPU v5e:2x4"}
    assert scale.origin_of_dtypes([{"target": "H100"}]).startswith("For H100s the dtypes of sums")
    assert "first cut" in scale.origin_of_dtypes([cpu])
    assert "TPU" not in scale.origin_of_dtypes([cpu])
    assert "first cut" not in scale.origin_of_dtypes([tpu])
    assert scale.origin_of_dtypes([cpu, tpu]).count("dtypes of sums") == 2
    pages = {"scale.md": cpu, "scale_tpu.md": tpu, "scale_h100.md": {"target": "H100"}}
    for page, target in pages.items():
        text = (ROOT / "results" / "bench" / page).read_text()
        assert f"a device. {scale.origin_of_dtypes([target])}\n" in text, page
    explained = (ROOT / "results" / "bench" / "scale.md").read_text()
    assert cost_model.explanation() in explained
    assert cost_model.table(45_195_000, 32).splitlines()[2] in explained  # 45.195 MB, as recorded


def test_cost_model():
    machine = cost_model.Machine("x", tflops=100, ring=10, most=64, source="")
    # 1 GB between two devices: each sends half twice, 1e9 bytes at 10 GB/s, and two hops.
    assert cost_model.ring_seconds(10**9, 2, machine) == pytest.approx(0.1 + 2e-6)
    assert cost_model.ring_seconds(10**9, 10**6, machine) == pytest.approx(0.2 + 2, rel=1e-3)
    assert cost_model.efficiency(0, 1, 32, machine) == 1
    assert cost_model.compute_seconds(32, machine) == pytest.approx(32 * 11.96e9 / 3e13)
    assert "more than one pod" in cost_model.table(10**7, 32)


@pytest.fixture(scope="module")
def smoke():
    """The command itself, on the MLP."""
    command = [sys.executable, "-m", "benchmarks.scale", "--smoke"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_step_gathers_no_activation(smoke):
    """Groups of 32, one a device, in bfloat16: only sums travel, in float32."""
    assert "* holds: no collective but all-reduce" in smoke.stdout, smoke.stderr
    assert "* holds: bytes are" in smoke.stdout and "* holds: sums are taken in f32" in smoke.stdout


def test_the_step_has_two_all_reduces_at_most(smoke):
    assert smoke.returncode == 0 and "DOES NOT HOLD" not in smoke.stdout


@pytest.mark.parametrize(
    ("topology", "remedy"), [("v5e:2x4", "jax[tpu]"), ("cuda:8", "jax[cuda13]")]
)
def test_without_a_compiler_it_says_so(topology, remedy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale", f"--topologies={topology}"])
    monkeypatch.setattr(scale.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^2$"):
        scale.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert topology in line and "not installed" in line and remedy in line


def test_a_number_of_gpus_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale", "--topologies=cuda:2x4"])
    with pytest.raises(SystemExit, match="^2$"):
        scale.main()
    assert "cuda:2x4: write cuda:N" in capsys.readouterr().err


def test_groups_over_two_devices_are_reported_and_nothing_is_claimed_of_them(smoke):
    assert scale.place_of("8@2") == ("8", 2) and scale.place_of("v5e:2x4") == ("v5e:2x4", 1)
    assert scale.claims(report(*scale.collectives(HLO)) | {"across": 2}) == {}
    rows = [line.split("|")[1:6] for line in smoke.stdout.splitlines() if "virtual CPU |" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:3] for row in cells] == [["virtual CPU", "8", "1"], ["virtual CPU", "8", "2"]]
    one, two = (sum(map(int, re.findall(r"\d+", row[3]))) for row in cells)
    assert one <= 2 < two  # statistics travel in every layer


def test_the_page_has_evaluation_s_share_of_a_run(tmp_path):
    args = argparse.Namespace(width=1, image_size=224, smoke=False)
    found = report(scale.Collective("all-reduce", {"f32": 4288}))
    found |= {"target": "virtual CPU", "devices": 8, "versions": "", "arguments": 0}
    text = scale.document([found | {"temporary": 0, "compile_seconds": 0}], args)
    share = f"8 devices {100 * cost_model.evaluation_share(8):.1f}%"
    assert "## Evaluation's share of a run, by arithmetic" in text and share in text


def test_a_target_names_its_backend():
    backends = [scale.backend_of(target) for target in ("8", "v5e:2x4", "cuda:8")]
    assert backends == ["cpu", "tpu", "gpu"]


@pytest.mark.skipif(not cuda.installed(), reason=cuda.MISSING)
def test_the_step_of_eight_gpus_gathers_nothing():
    """The MLP, by XLA's compiler for GPUs, without one."""
    command = [sys.executable, "-m", "benchmarks.scale", "--smoke", "--topologies=cuda:8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| H100 | 8 |" in done.stdout and "DOES NOT HOLD" not in done.stdout


def test_evaluation_takes_a_small_and_documented_share_of_a_pod_run():
    shares = [cost_model.evaluation_share(devices) for devices in cost_model.SIZES]
    assert max(shares) < 0.05
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    said = ", ".join(f"{100 * share:.1f}%" for share in shares[:-1])
    assert f"{said} and {100 * shares[-1]:.1f}% of a run on 8, 64, 256 and 512 devices" in text


# What documents quote of the pages in results/bench


class Compiled(NamedTuple):
    """A row of a page."""

    devices: str
    across: int  # devices of a group
    collectives: str
    share: float  # bytes sent, of parameters and statistics
    temporary: str  # MB


def compiled_programs(page: str) -> list[Compiled]:
    """The rows of a page of benchmarks.scale; older pages have groups on one device alone."""
    text = (ROOT / "results" / "bench" / page).read_text()
    found = []
    for line in re.findall(r"^\| (?:virtual CPU|TPU|H100).*\|$", text, re.M):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        across = int(cells.pop(2)) if len(cells) == 8 else 1
        sent, state = float(cells[3]), float(cells[4])
        temporary = cells[5].partition(", ")[2]
        found.append(Compiled(cells[1], across, cells[2], sent / state, temporary))
    return found


def words(found: Compiled) -> str:
    """Its collectives as documents write them: '2 all-reduces, 3 all-gathers'."""
    counts = re.findall(r"(\d+) ([a-z-]+)", found.collectives)
    counts.sort(key=lambda pair: -int(pair[0]))
    return ", ".join(f"{count} {kind}s" for count, kind in counts)


def quoted(name: str) -> str:
    return " ".join((ROOT / "docs" / name).read_text().split())


def test_the_table_of_pods_is_that_of_the_pages():
    text = (ROOT / "docs" / "pods.md").read_text()
    row = r"^\| \[.+\]\(\.\./results/bench/(\S+)\) \| ([\d, ]+) \| (\d+) \| ([\d.]+) \| (.+) \|$"
    rows = re.findall(row, text, re.M)
    assert {page for page, *_ in rows} >= {"scale.md", "scale_tpu.md", "scale_h100.md"}
    for page, devices, count, share, versions in rows:
        found = [program for program in compiled_programs(page) if program.across == 1]
        assert set(devices.split(", ")) == {program.devices for program in found}, page
        assert {program.collectives for program in found} == {f"{count} all-reduce"}, page
        assert {f"{program.share:.4f}" for program in found} == {share}, page
        intro = (ROOT / "results" / "bench" / page).read_text()
        for version in re.findall(r"(?:jax|libtpu) [\d.]+\d", versions):
            assert version in intro, (page, version)


def test_groups_over_two_devices_are_quoted_from_the_page():
    (found,) = [program for program in compiled_programs("scale.md") if program.across == 2]
    *first, last = words(found).split(", ")
    said = f"{', '.join(first)} and {last}"
    for page in ("pods.md", "performance.md"):
        assert said in quoted(page)
        assert f"{found.share:.2f} times" in quoted(page)


def test_temporary_memory_is_quoted_from_the_pages():
    text = quoted("performance.md")
    (cpu,) = {found.temporary for found in compiled_programs("scale.md") if found.across == 1}
    v5e, v4 = (f"{int(found.temporary):,}" for found in compiled_programs("scale_tpu.md"))
    assert f"{cpu} MB of temporaries by XLA for CPUs" in text
    assert f"{v5e} MB by v5e's compiler, and 106 and {v4} MB by v4's" in text


def test_the_mlp_for_tpus_is_quoted_from_its_page():
    programs = compiled_programs("scale_mlp_tpu.md")
    one = [found for found in programs if found.across == 1]
    two = [found for found in programs if found.across == 2]

    def counts(found: list[Compiled], kind: str) -> list[str]:
        numbers = []
        for program in found:
            pairs = re.findall(r"(\d+) ([a-z-]+)", program.collectives)
            numbers += [number for number, name in pairs if name == kind]
        return numbers

    a, b, c = counts(one, "all-reduce")
    assert {f"{found.share:.4f}" for found in one} == {"1.0000"}
    assert f"It has {a}, {b} and {c} all-reduces, with 1.0000 of the bytes" in quoted("pods.md")

    a, b, c = counts(two, "all-reduce")
    assert set(counts(two, "collective-permute")) == {"1"}
    (share,) = {f"{found.share:.2f}" for found in two}
    said = f"it has {a}, {b} and {c} all-reduces and a collective-permute"
    assert f"{said}, with {share} times the bytes" in quoted("pods.md")
