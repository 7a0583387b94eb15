"""Says what the runs of a table were made with (commit, packages, processor), and what differs."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

PACKAGES = ("python", "jax", "jaxlib", "flax", "optax", "numpy")
UNKNOWN = "not recorded"


def facts(origin: Mapping[str, Any]) -> dict[str, str]:
    """Returns the facts of an origin (`source`, `versions`, `hardware` of a record), by name."""
    source = origin.get("source", {})
    versions = origin.get("versions", {})
    hardware = origin.get("hardware", {})

    commit = source.get("commit") or UNKNOWN
    if commit != UNKNOWN:
        commit = commit[:10]
    if source.get("dirty"):
        commit += " with uncommitted changes"

    found = {"commit": commit}
    for name in PACKAGES:
        found[name] = str(versions.get(name, UNKNOWN))

    devices = hardware.get("devices", "?")
    kind = hardware.get("device_kind", "?")
    found["devices"] = f"{devices} {kind}"
    if hardware.get("platform", "cpu") == "cpu":
        found["processor"] = str(hardware.get("cpu", UNKNOWN))
        found["CPU threads"] = str(hardware.get("cpu_threads", UNKNOWN))
    return found


def made_by(origins: Iterable[Mapping[str, Any]], what: str = "runs") -> str:
    """Says in a paragraph what all share, with a warning that names each fact that differs."""
    listed = [facts(origin) for origin in origins]
    same = []
    differs = []
    for name in fact_names(listed):
        counts = Counter(found.get(name, "-") for found in listed)
        if len(counts) == 1:
            (value,) = counts
            same.append(f"{name} {value}")
        else:
            each = [f"{value} ({n})" for value, n in sorted(counts.items())]
            differs.append(f"{name}: {', '.join(each)}")

    text = f"All {len(listed)} {what} were made by: {', '.join(same)}."
    if len(listed) == 1:
        text = f"Made by: {', '.join(same)}."
    if differs:
        text += f"\n\n**The {what} differ**, so their differences may come from this: "
        text += f"{'; '.join(differs)}."
    return text


def fact_names(listed: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns the names of all facts, in the order in which they occur first."""
    found: dict[str, None] = {}
    for one in listed:
        found.update(dict.fromkeys(one))
    return list(found)


def differing(origins: Iterable[Mapping[str, Any]]) -> str:
    """Returns the names of the facts in which runs differ, or ''."""
    listed = [facts(origin) for origin in origins]
    differs = []
    for name in fact_names(listed):
        values = {found.get(name) for found in listed}
        if len(values) > 1:
            differs.append(name)
    return ", ".join(differs)
