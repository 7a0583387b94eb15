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

    commit = source.get("commit")
    found = {"commit": str(commit)[:10] if commit else UNKNOWN}
    if source.get("dirty"):
        found["commit"] += " with uncommitted changes"
    for name in PACKAGES:
        found[name] = str(versions.get(name, UNKNOWN))
    found["devices"] = f"{hardware.get('devices', '?')} {hardware.get('device_kind', '?')}"
    if hardware.get("platform", "cpu") == "cpu":
        found["processor"] = str(hardware.get("cpu", UNKNOWN))
        found["CPU threads"] = str(hardware.get("cpu_threads", UNKNOWN))
    return found


def made_by(origins: Iterable[Mapping[str, Any]], what: str = "runs") -> str:
    """Says in a paragraph what all share, with a warning that names each fact that differs."""
    listed = [facts(origin) for origin in origins]
    names = list(dict.fromkeys(name for found in listed for name in found))
    same = []
    differs = []
    for name in names:
        counts = Counter(found.get(name, "-") for found in listed)
        if len(counts) == 1:
            same.append(f"{name} {next(iter(counts))}")
        else:
            each = ", ".join(f"{value} ({n})" for value, n in sorted(counts.items()))
            differs.append(f"{name}: {each}")

    text = f"All {len(listed)} {what} were made by: {', '.join(same)}."
    if len(listed) == 1:
        text = f"Made by: {', '.join(same)}."
    if differs:
        text += f"\n\n**The {what} differ**, so their differences may come from this: "
        text += f"{'; '.join(differs)}."
    return text


def apart(ours: Iterable[Mapping[str, Any]], theirs: Iterable[Mapping[str, Any]]) -> str:
    """Returns the names of the facts in which two groups of runs differ, or ''."""
    one = [facts(origin) for origin in ours]
    two = [facts(origin) for origin in theirs]
    names = dict.fromkeys(name for found in (*one, *two) for name in found)
    return ", ".join(
        name
        for name in names
        if len({found.get(name) for found in one} | {found.get(name) for found in two}) > 1
    )
