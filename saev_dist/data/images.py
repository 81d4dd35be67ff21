"""Where the picture of an image index is: folders of images, in the order their activations were written."""

import os
from pathlib import Path

from saev_dist.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
        DataError: `root` is not a folder, cannot be read, or has no image in any class.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"{root}: found {found}, expected a folder of images with one folder per class")

    def refuse(error: OSError) -> None:
        raise error

    fpaths = []
    try:
        class_dpaths = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.name)
        for class_dpath in class_dpaths:
            for dpath, _, names in sorted(os.walk(class_dpath, followlinks=True, onerror=refuse)):
                fpaths += [Path(dpath, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot list the images ({error.strerror})") from error

    if not fpaths:
        loose = sum(path.name.lower().endswith(EXTENSIONS) for path in root.iterdir())
        raise DataError(
            f"{root}: found {len(class_dpaths)} class folders and no image in them ({loose} images beside them), "
            f"expected {root.name}/<class>/<image> with an extension out of {' '.join(EXTENSIONS)}"
        )
    return fpaths
