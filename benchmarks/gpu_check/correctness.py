"""Call 1, part (a): is what this device computes right? Three children side by side.

* errors.py: operations and a training step against float64, in every precision;
* the project's own tests of BN, operations and the step that hold on any backend, at `highest`
  (their tolerances are those of float32);
* bits.py: stop, resume, equal bits with `deterministic=True`.

Each has until the part's end; what it has not done by then is said, and what it has is kept.
"""

import importlib.util
import json
import os
import pathlib
import re
import time
from typing import Any

from benchmarks.gpu_check.children import Child

TESTS = (
    "tests/batch_norm_test.py",
    "tests/batch_norm_masks_test.py",
    "tests/batch_norm_precision_test.py",
    "tests/batch_norm_running_test.py",
    "tests/step_test.py",
    "tests/ops/mixed_test.py",
    "tests/ops/ops_test.py",
)
# Of 8 virtual CPU devices, and of which backend has which form: not of any backend.
NOT_ANYWHERE = "not devices and not backend"
SMOKE_TESTS = ("tests/batch_norm_precision_test.py",)


class Correctness:
    """The children. `begin` starts them, `finish` waits and reads what they left.

    Args:
      folder: for their files.
      out: where the log of the tests stays.
      platform: jax's name of the backend.
      smoke: whether the children do little.
    """

    def __init__(self, folder: pathlib.Path, out: pathlib.Path, platform: str, *, smoke: bool):
        self.folder = folder
        self.out = out
        self.platform = platform
        self.smoke = smoke

    def begin(self) -> None:
        """Starts all three."""
        # The CPU is the reference; conftest.py would choose it alone.
        platforms = "cpu" if self.platform == "cpu" else f"{_jax_name(self.platform)},cpu"
        variables = {"JAX_PLATFORMS": platforms}

        errors = self.folder / "errors.json"
        log = self.folder / "errors.log"
        self.errors = Child("benchmarks.gpu_check.errors", [str(errors)], log, variables)

        options = ["-vv", "-m", "not slow", "-k", NOT_ANYWHERE, "-p", "benchmarks.gpu_check.forms"]
        if not self.smoke and importlib.util.find_spec("xdist"):
            options += ["-n", str(min(8, os.cpu_count() or 1))]
        tests = SMOKE_TESTS if self.smoke else TESTS
        highest = variables | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        self.tests = Child("pytest", [*options, *tests], self.out / "tests.log", highest)

        self.bits_folder = self.folder / "bits"
        self.bits_folder.mkdir(exist_ok=True)
        self.bits = self._bits([], "bits_1.log")

    def _bits(self, options: list[str], log: str) -> Child:
        variables = {"JAX_COMPILATION_CACHE_DIR": str(self.bits_folder / "cache")}
        arguments = [str(self.bits_folder), *options, *(["--smoke"] if self.smoke else [])]
        return Child("benchmarks.gpu_check.bits", arguments, self.folder / log, variables)

    def finish(self, until: float) -> dict[str, Any]:
        """What the children found, as call_1.json has it."""
        bits = self._finish_bits(until)
        return summary(self._finish_errors(until), self._finish_tests(until), bits)

    def _finish_bits(self, until: float) -> dict[str, Any]:
        start = time.monotonic()
        code = self.bits.wait(until)
        if code != 0:
            return {"failed": _why(self.bits, code)}

        first = time.monotonic() - start
        again = self._bits(["--resume"], "bits_2.log")
        code = again.wait(until)
        if code != 0:
            return {"failed": _why(again, code)}
        found = json.loads(again.last_line())
        return {**found, "first_seconds": round(first, 1)}

    def _finish_errors(self, until: float) -> dict[str, Any]:
        code = self.errors.wait(until)
        file = self.folder / "errors.json"
        rows = json.loads(file.read_text()) if file.is_file() else []
        found: dict[str, Any] = {"rows": rows}
        if code != 0:
            found["failed"] = _why(self.errors, code)
        return found

    def _finish_tests(self, until: float) -> dict[str, Any]:
        code = self.tests.wait(until)
        found = read_tests(self.tests.log.read_text(errors="replace"))
        if code is None:
            found["cut"] = "not all of them in time"
        elif code not in (0, 1):
            found["failed"] = _why(self.tests, code)
        return found


def _jax_name(platform: str) -> str:
    """The name in JAX_PLATFORMS of what jax.default_backend() calls gpu."""
    return "cuda" if platform == "gpu" else platform


def _why(child: Child, code: int | None) -> str:
    """Why a child left no result, in a line."""
    if code is None:
        return f"not ended in time; last line: {child.last_line()}"
    return f"exit code {code}: {child.last_line()}"


def read_tests(log: str) -> dict[str, Any]:
    """Tests passed and skipped, and the names of those that failed, of pytest's verbose output."""
    names: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "SKIPPED": set()}
    # "tests/a.py::b PASSED", and of several processes "[gw0] [ 1%] PASSED tests/a.py::b".
    for line in log.splitlines():
        one = re.match(r"(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", line)
        many = re.match(r"\[gw\d+\].* (PASSED|FAILED|SKIPPED|ERROR) (tests/\S+::.+?)\s*$", line)
        if one:
            name, result = one[1], one[2]
        elif many:
            result, name = many[1], many[2]
        else:
            continue
        names["FAILED" if result == "ERROR" else result].add(name)
    return {
        "passed": len(names["PASSED"]),
        "skipped": len(names["SKIPPED"]),
        "failed_tests": sorted(names["FAILED"]),
    }


def summary(errors: dict[str, Any], tests: dict[str, Any], bits: dict[str, Any]) -> dict[str, Any]:
    """What is recorded, with the rows of the table."""
    rows = []
    for dtype, precision in dict.fromkeys((r["dtype"], r["precision"]) for r in errors["rows"]):
        mine = [r for r in errors["rows"] if (r["dtype"], r["precision"]) == (dtype, precision)]
        worst = max(mine, key=lambda r: r["error"] / r["tolerance"])
        passed = sum(r["passed"] for r in mine)
        figure = f"{passed} of {len(mine)} within tolerance; nearest to it: {worst['what']}, "
        figure += f"{worst['error']:.1e} of {worst['tolerance']:.0e}"
        rows.append([f"against float64: {dtype}, precision {precision}", figure])
    if "failed" in errors:
        rows.append(["against float64", errors["failed"]])

    figure = f"{tests['passed']} passed, {len(tests['failed_tests'])} failed"
    figure += f", {tests['skipped']} skipped"
    for extra in ("cut", "failed"):
        if extra in tests:
            figure += f"; {tests[extra]}"
    rows.append(["the project's tests, precision highest", figure])
    rows += [["failed test", name] for name in tests["failed_tests"]]

    said = bits.get("failed") or f"{bits['equal']} of {bits['arrays']} arrays equal to the last bit"
    rows.append(["stopped and resumed, deterministic", said])
    return {"errors": errors, "tests": tests, "bits": bits, "rows": rows}
