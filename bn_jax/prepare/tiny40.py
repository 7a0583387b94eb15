"""Makes tiny40: 40 classes of Tiny-ImageNet as a folder of pictures, for experiments on a CPU.

The source is tiny-imagenet-200.zip (Stanford's CS231n; non-commercial research and education only).
The set has all 500 training and all 50 validation pictures of each of the 40 synsets below, as they
are in the zip. The published runs had these synsets.
"""

import hashlib
import pathlib
import shutil
import zipfile

from bn_jax.errors import ConfigError, DataError
from bn_jax.workdir.files import reported

SYNSETS = (
    *("n01768244", "n01774384", "n01882714", "n02085620", "n02099712"),
    *("n02190166", "n02206856", "n02268443", "n02321529", "n02415577"),
    *("n02423022", "n02509815", "n02666196", "n02793495", "n02814533"),
    *("n02841315", "n02843684", "n02927161", "n02977058", "n02999410"),
    *("n03089624", "n03179701", "n03355925", "n03404251", "n03424325"),
    *("n03444034", "n03544143", "n03763968", "n03838899", "n03970156"),
    *("n03992509", "n04118538", "n04179913", "n04254777", "n04456115"),
    *("n04486054", "n04560804", "n07614500", "n07753592", "n07875152"),
)
TRAIN = 500  # pictures of each class
VALIDATION = 50
# SHA-256 (see `digest`) of the folder that the published runs were trained on.
DIGEST = "7e51ccb24cce049e48b56195859e4b4092f6dbdb1c87ab4a415ac58a1e43d390"

ROOT = "tiny-imagenet-200"  # the folder in the zip


def build(archive: pathlib.Path, folder: pathlib.Path, *, other: bool = False) -> None:
    """Writes train/SYNSET/* and val/SYNSET/*; `folder` appears when all files are complete.

    Args:
      archive: tiny-imagenet-200.zip.
      folder: to be made.
      other: whether to accept other pictures than those of the published runs.

    Raises:
      ConfigError: there is no such zip, or `folder` exists with other content.
      DataError: the zip is damaged, lacks pictures, or has others.
      DiskError: the folder cannot be written.
    """
    if folder.exists():
        if not other and digest(folder) != DIGEST:
            raise ConfigError(f"{folder} holds other pictures: choose another --out or remove it")
        print(f"{folder} is complete already")
        return

    scratch = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as source:
            for name, place in _places(source, archive).items():
                data = source.read(name)  # raises BadZipFile unless its CRC is right
                with reported(scratch, "cannot write"):
                    (scratch / place).parent.mkdir(parents=True, exist_ok=True)
                    (scratch / place).write_bytes(data)
        found = digest(scratch)
        if found != DIGEST and not other:
            raise DataError(
                f"{archive} has other pictures than the published runs were trained on (digest "
                f"{found[:16]}, expected {DIGEST[:16]}): fetch it again, or accept them with "
                "--other"
            )
        with reported(folder, "cannot write"):
            scratch.rename(folder)
    except FileNotFoundError:
        raise ConfigError(f"no file {archive}: --from takes {ROOT}.zip") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be read ({error}): fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{len(SYNSETS)} classes, digest {found[:16]}")


def _places(source: zipfile.ZipFile, archive: pathlib.Path) -> dict[str, str]:
    """Maps names in the zip to places in the folder. Raises DataError if a picture is absent."""
    names = set(source.namelist())
    annotations = f"{ROOT}/val/val_annotations.txt"
    if annotations not in names:
        raise DataError(f"{archive} has no {annotations}: it is not {ROOT}.zip, or cut")

    places = {}
    for line in source.read(annotations).decode().splitlines():
        picture, synset, *_ = line.split("\t")
        if synset in SYNSETS:
            places[f"{ROOT}/val/images/{picture}"] = f"val/{synset}/{picture}"
    for synset in SYNSETS:
        for number in range(TRAIN):
            picture = f"{synset}_{number}.JPEG"
            places[f"{ROOT}/train/{synset}/images/{picture}"] = f"train/{synset}/{picture}"

    missing = sorted(places.keys() - names)
    expected = len(SYNSETS) * (TRAIN + VALIDATION)
    if missing or len(places) != expected:
        lacks = f"lacks {missing[0]}" if missing else f"names {len(places)} pictures"
        raise DataError(f"{archive} {lacks}, expected {expected}: fetch it again")
    return places


def digest(folder: pathlib.Path) -> str:
    """Computes SHA-256 of the names and contents of all pictures in a folder, sorted by name."""
    found = hashlib.sha256()
    for split in ("train", "val"):
        paths = (folder / split).rglob("*.JPEG")
        for name in sorted(path.relative_to(folder).as_posix() for path in paths):
            found.update(hashlib.sha256((folder / name).read_bytes()).digest())
            found.update(name.encode())
    return found.hexdigest()
