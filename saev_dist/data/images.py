"""The picture of an image index: folders of images, or a Hugging Face data set, in the order of the activations.

    ImageFolder   class folders, as torchvision reads them       root/<class>/…/<file>
    flat folder   files sorted by name                           root/<file>
    data set      what `datasets.save_to_disk` wrote             needs the extra `hf`

Nothing here imports torch: the processes that draw start in a fraction of a second.
"""

import functools
import hashlib
import importlib.util
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from saev_dist.errors import ConfigError, DataError, SaevDistError

# Pillow would also try formats that are drawn by other programs: EPS runs Ghostscript, whatever the file is called.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A source of pictures: item `img_i` is the picture whose activations are example `img_i`."""

    root: Path
    kind: str
    """What the source is, in words."""
    names: tuple[str, ...] | None
    """Paths below `root`; None for a data set, whose pictures have indices only."""
    n: int

    def name(self, img_i: int) -> str:
        """Path below the root, or the index in a data set."""
        return str(img_i) if self.names is None else self.names[img_i]

    def label(self, img_i: int) -> str:
        """The class folder; the name of the class in a data set that has a column "label"; otherwise ""."""
        if self.names is not None:
            return self.names[img_i].split(os.sep, 1)[0] if os.sep in self.names[img_i] else ""
        rows, features = _data_set(self.root)
        return _readable(features, rows[img_i]["label"].to_pylist()[0]) if _has_labels(features) else ""

    def out_of_number(self) -> tuple[int, str] | None:
        """Where the numbers in the names of a flat folder count otherwise than its order has them, as in img10, img2: the
        first image whose picture would be another one by its number, and that one."""
        if self.names is None or any(os.sep in name for name in self.names):
            return None
        parts = (re.split(r"(\d+)", name) for name in self.names)
        keys = [[int(part) if at % 2 else part for at, part in enumerate(own)] for own in parts]
        by_number = sorted(range(len(keys)), key=keys.__getitem__)
        return next(((at, self.names[other]) for at, other in enumerate(by_number) if at != other), None)

    def version(self, img_i: int) -> tuple[int, int]:
        """What tells a picture's file from an earlier one of that name: see `version_of`; (0, 0) in a data set."""
        return (0, 0) if self.names is None else version_of(self.root / self.names[img_i])

    def fingerprint(self) -> str:
        """What tells these pictures from others: SHA-256 of all names in their order; of a data set its own fingerprint."""
        if self.names is None:
            return str(_data_set(self.root)[0]._fingerprint)
        return hashlib.sha256(os.fsencode("\0".join(self.names))).hexdigest()

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and label of every picture, in order."""
        if self.names is not None or not _has_labels(_data_set(self.root)[1]):
            yield from ((self.name(img_i), self.label(img_i)) for img_i in range(self.n))
            return
        rows, features = _data_set(self.root)
        values = (value for batch in rows.iter(batch_size=10_000) for value in batch["label"].to_pylist())
        yield from ((self.name(img_i), _readable(features, value)) for img_i, value in enumerate(values))


def version_of(fpath: Path) -> tuple[int, int]:
    """A file's size and time of change, ns; (-1, -1) where it cannot be had."""
    try:
        found = os.stat(fpath)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def open_pictures(root: Path, n_examples: int) -> Pictures:
    """Find out which kind of source `root` is, and check that it has a picture for every example.

    Raises:
        DataError: it is none of the kinds, cannot be read, or holds another number of pictures.
        ConfigError: it is a Hugging Face data set and `datasets` is not installed.
    """
    if not os.path.isdir(root):
        found = "a file" if os.path.exists(root) else "nothing"
        raise DataError(f"{root}: found {found}, expected a folder of pictures; set --images, or --no-pictures.")
    if os.path.exists(root / "state.json") and os.path.exists(root / "dataset_info.json"):
        rows, features = _data_set(root)
        if type(features.get("image")).__name__ != "Image":
            found = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
            raise DataError(f"{root} is a data set with columns {found}; expected one named image, of kind Image.")
        candidates = [Pictures(root=root, kind="data set", names=None, n=len(rows))]
    elif os.path.exists(root / "dataset_dict.json"):
        raise DataError(f"{root} holds several splits; --images takes one of its folders, such as {root / 'train'}.")
    else:
        nested = tuple(str(fpath.relative_to(root)) for fpath in list_images(root))
        flat = tuple(_flat(root))
        candidates = [
            Pictures(root=root, kind=kind, names=names, n=len(names))
            for kind, names in (("class folders", nested), ("flat folder", flat))
            if names
        ]
    for pictures in candidates:
        if pictures.n == n_examples:
            return pictures
    found = " and ".join(f"{pictures.n:,} ({pictures.kind})" for pictures in candidates) or "no"
    raise DataError(
        f"{root}: found {found} pictures; the shards have {n_examples:,} examples, and each needs its own. "
        "Set --images to what the activations were computed from, or --no-pictures for heatmaps alone."
    )


def list_images(root: Path) -> list[Path]:
    """Return the images under `root` so that item `img_i` is the image whose activations are example `img_i`.

    The order is that of torchvision's `ImageFolder` (torchvision/datasets/folder.py, `find_classes` and
    `make_dataset`), which the writers of activations use:

    - classes are the folders directly inside `root`, links to folders included, sorted by name;
    - within a class, folders are sorted by their path as a string, the class folder itself first;
    - within a folder, files are sorted by name, and count if the name ends in one of `EXTENSIONS`, in any case.

    All comparisons are of code points ("Z" before "a", "10" before "9"), whatever the locale. This is not
    always the order of the full paths: `c/z.png` comes before `c/a/b.png`.
    `ImageFolder` refuses a class without images; here such a class is skipped, which leaves the order as it is.

    Args:
        root: folder whose folders are the classes.

    Returns:
        Paths that start with `root`.

    Raises:
        DataError: `root` cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    fpaths = []
    try:
        class_dpaths = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.name)
        for class_dpath in class_dpaths:
            for dpath, _, names in sorted(os.walk(class_dpath, followlinks=True, onerror=refuse)):
                fpaths += [Path(dpath, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    except OSError as error:
        raise _cannot_list(error, root) from error
    return fpaths


def load_picture(root: Path, name: str, *, in_data_set: bool) -> Image.Image:
    """Decode one picture, as RGB.

    Args:
        root, name: as in `Pictures`.
        in_data_set: `name` is an index.

    Raises:
        DataError: it is missing, unreadable, truncated, no image, or so large that decoding it is an attack.
    """
    where = f"{root}, picture {name}" if in_data_set else str(root / name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data and the like, as many photographs have them
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if in_data_set:
                return _of_row(*_data_set(root), int(name), where).convert("RGB")
            with _opened(root / name, where) as picture:
                return picture.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise DataError(f"{where} would decode to more than {limit:,} pixels; expected a picture. Make it smaller.") from None
    except UnidentifiedImageError:
        raise DataError(f"{where} is not a picture that Pillow can read. Replace it, or use --no-pictures.") from None
    except (SaevDistError, MemoryError):
        raise
    except Exception as err:  # noqa: BLE001  # Pillow lets through whatever a damaged byte sets off
        reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
        raise DataError(f"{where} cannot be read: {reason}. Replace it, or use --no-pictures.") from None


def _opened(fpath: Path, where: str) -> Image.Image:
    """A file's picture, not decoded yet."""
    if not stat.S_ISREG(os.stat(fpath).st_mode):  # a pipe would be waited for
        raise DataError(f"{where} is no file; expected a picture. Replace it, or use --no-pictures.")
    return Image.open(fpath, formats=FORMATS)


def _of_row(rows: Any, features: Any, img_i: int, where: str) -> Image.Image:
    """A data set's picture, turned and converted as `datasets` would do it (datasets/features/image.py, `decode_example`).

    `datasets` itself would try every format that Pillow knows, and fetch what lies elsewhere.
    """
    stored = rows[img_i]["image"].to_pylist()[0] or {}
    content, path = stored.get("bytes"), stored.get("path")
    if content is not None:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    elif path is None:
        raise DataError(f"{where} is not there: the row has no picture. Use --no-pictures.")
    elif os.path.exists(path):
        picture = _opened(Path(path), f"{where} ({path})")
    else:
        raise DataError(
            f"{where} is not in the data set but at {path}, which is no file here; nothing is fetched. "
            "Put it there, or use --no-pictures."
        )
    if picture.getexif().get(ExifTags.Base.Orientation) is not None:
        picture = ImageOps.exif_transpose(picture)
    mode = features["image"].mode
    return picture.convert(mode) if mode else picture


def _cannot_list(error: OSError, root: Path) -> DataError:
    what = f"{error.filename or root}: cannot list the images ({error.strerror})"
    return DataError(f"{what}. Make it readable, or name another folder.")


def _flat(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.name.lower().endswith(EXTENSIONS) and entry.is_file())
    except OSError as error:
        raise _cannot_list(error, root) from error


def _has_labels(features: Any) -> bool:
    """Whether a column says what each picture shows; one that would itself be decoded, as pictures are, does not."""
    return "label" in features and not hasattr(features["label"], "decode")


def _readable(features: Any, value: Any) -> str:
    """The name of a class, where the data set knows it; its number where it has none; "" for a row without one, None or -1."""
    kind = features["label"]
    if value is None or (hasattr(kind, "int2str") and value == -1):
        return ""
    with suppress(ValueError):  # a number that the names do not reach
        return str(kind.int2str(value) if hasattr(kind, "int2str") else value)
    return str(value)


@functools.lru_cache(maxsize=1)
def _data_set(root: Path) -> tuple[Any, Any]:
    """A data set saved on disk, and the kinds of its columns; its Arrow files are mapped into memory, not read.

    Rows and batches are tables of Arrow, whatever format it was saved with: as they are stored, with nothing decoded.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{root} is a Hugging Face data set; to read it: pip install datasets.")
    datasets = importlib.import_module("datasets")
    try:
        rows = datasets.load_from_disk(str(root)).with_format("arrow")
        return rows, rows.features  # once: it is copied, the names of all classes with it
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:  # it checks nothing that it reads
        raise DataError(f"{root} is no data set that `datasets` can read: {type(err).__name__}: {err}.") from None
