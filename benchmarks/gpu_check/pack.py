"""What the check takes to a machine without a network: wheels, pictures, the commit.

    python -m benchmarks.gpu_check.pack DIR [--images=TAR]

DIR/wheels has what bn_jax imports and such a machine (Python 3.12 on x86-64, with jax, flax, optax,
orbax, opencv, PyTorch and pytest) lacks. DIR/tiny20.tar.gz has 20 of the classes of TAR, a tar of
train/CLASS/* and val/CLASS/*.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

from benchmarks import fair

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 64 * 2**20  # bytes, together with the checkout
CLASSES = 20
PICTURES = f"tiny{CLASSES}.tar.gz"
PACKAGES = (
    "array-record",
    "google-crc32c",
    "grain",
    "hypothesis",
    "ml-collections",
    "portpicker",  # of grain
    "simplejpeg",
    "sortedcontainers",  # of hypothesis
    "tqdm",
)
# What such a machine has that is imported, by the name of the module; in brackets what needs it.
THERE = (
    *("absl", "cv2", "flax", "jax", "jaxlib", "numpy", "optax", "orbax", "pytest", "torch"),
    *("ml_dtypes", "scipy"),  # (jax)
    "google",  # its protobuf (orbax)
    *("PIL", "safetensors"),  # (timm)
)
SOURCES = ("pretrainedmodels",)  # PyTorch's BN-Inception, of which there is no wheel
TAGS = ("manylinux2014", *(f"manylinux_2_{n}" for n in (17, 27, 28, 31, 34, 35)))


class PackError(Exception):
    """What is missing or too large, in a line."""


def wheels(folder: pathlib.Path) -> None:
    """Downloads or builds them, without what they need themselves. Raises PackError."""
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    target = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    target += [f"--platform={tag}_x86_64" for tag in TAGS]
    commands = [
        [*pip, "download", *quiet, *target, f"--dest={folder}", *PACKAGES],
        [*pip, "wheel", *quiet, f"--wheel-dir={folder}", *SOURCES],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise PackError(f"pip {command[3]}: {(lines or ['failed'])[-1]}")


def pictures(source: pathlib.Path, file: pathlib.Path, classes: int) -> None:
    """Writes train/CLASS/* and val/CLASS/* of the first classes. Raises PackError."""
    if not source.is_file():
        raise PackError(f"no pictures in {source}: name a tar of train/CLASS/* with --images=TAR")
    with tarfile.open(source) as old:
        found = {}
        for member in old.getmembers():
            place = re.search(r"(?:^|/)(train|val)/([^/]+)/[^/]+$", member.name)
            if member.isfile() and place:
                found[member] = place
        names = sorted({place[2] for place in found.values()})[:classes]
        if len(names) < classes:
            raise PackError(f"{source} has {len(names)} classes, {classes} are needed")
        with tarfile.open(file, "w:gz", compresslevel=1) as new:
            for member, place in found.items():
                if place[2] not in names:
                    continue
                content = old.extractfile(member)
                info = tarfile.TarInfo(place[0].lstrip("/"))
                info.size = member.size
                new.addfile(info, content)


def unpack(pack: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpacks the pictures into a folder, and returns it. Raises PackError."""
    file = pack / PICTURES
    if not file.is_file():
        raise PackError(f"no {PICTURES} in {pack}: make it with launch/gpu_check.sh --pack={pack}")
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    return folder


def checkout_bytes() -> int:
    """Bytes of the tracked files, which travel with the pack."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


def check_size(folder: pathlib.Path, limit: int = LIMIT) -> str:
    """The sizes in a line. Raises PackError if they are together above the limit."""
    wheels = sum(file.stat().st_size for file in (folder / "wheels").iterdir())
    images = (folder / PICTURES).stat().st_size
    code = checkout_bytes()
    parts = {"wheels": wheels, "pictures": images, "checkout": code}
    sizes = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in parts.items())
    said = f"{folder}: {sizes}, together {sum(parts.values()) / 2**20:.1f} MiB"
    if sum(parts.values()) > limit:
        raise PackError(f"{said}: more than {limit / 2**20:.0f}")
    return said


def main() -> None:
    """Makes the pack."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check.pack", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    data = pathlib.Path(os.environ.get("BN_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--images", type=pathlib.Path, default=data / "tiny40.tar")
    args = parser.parse_args()
    try:
        (args.folder / "wheels").mkdir(parents=True, exist_ok=True)
        for old in (args.folder / "wheels").iterdir():
            old.unlink()
        with tempfile.TemporaryDirectory() as scratch:
            wheels(pathlib.Path(scratch))
            for file in sorted(pathlib.Path(scratch).iterdir()):
                (args.folder / "wheels" / file.name).write_bytes(file.read_bytes())
        pictures(args.images, args.folder / PICTURES, CLASSES)
        (args.folder / "commit").write_text(fair.commit() + "\n")
        print(check_size(args.folder))
    except PackError as error:
        print(f"gpu_check.sh: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
