"""The order of an image folder decides which picture a feature is shown with."""

import os
from pathlib import Path

import pytest

from saev_dist.data.images import list_images, open_pictures
from saev_dist.errors import DataError


def names(root: Path, *files: str) -> list[str]:
    """Make the files (empty ones; "x/" makes a folder) and list the images, relative to root."""
    for file in files:
        path = root / file
        if file.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return [fpath.relative_to(root).as_posix() for fpath in list_images(root)]


def test_classes_then_files_sort_by_code_point(tmp_path: Path) -> None:
    assert names(tmp_path, "b/2.png", "b/10.png", "b/Z.png", "b/a.png", "Zebra/1.png", "é/1.png", "a/1.png") == [
        "Zebra/1.png",
        "a/1.png",
        "b/10.png",
        "b/2.png",
        "b/Z.png",
        "b/a.png",
        "é/1.png",
    ]


def test_a_class_is_not_split_by_one_whose_name_extends_it(tmp_path: Path) -> None:
    # As strings, "a-b/x.png" < "a/x.png", because "-" < "/"; as classes "a" < "a-b".
    assert names(tmp_path, "a-b/x.png", "a/x.png") == ["a/x.png", "a-b/x.png"]


def test_files_of_a_folder_come_before_those_of_folders_inside_it(tmp_path: Path) -> None:
    assert names(tmp_path, "c/a/b.png", "c/z.png") == ["c/z.png", "c/a/b.png"]


def test_nested_folders_sort_as_path_strings(tmp_path: Path) -> None:
    # os.walk yields (root, …) and torchvision sorts the root strings: "c/a-b" < "c/a/x" because "-" < "/".
    assert names(tmp_path, "c/a/x/1.png", "c/a-b/1.png", "c/a/1.png") == ["c/a/1.png", "c/a-b/1.png", "c/a/x/1.png"]


def test_extensions_count_in_any_case_and_other_files_do_not(tmp_path: Path) -> None:
    images = ["c/" + name for name in ["1.jpg", "2.JPEG", "3.Png", "4.ppm", "5.bmp", "6.pgm", "7.tif", "8.TIFF", "9.webp"]]
    others = ["c/a.txt", "c/b.png.part", "c/c.gif", "c/dpng", "loose.png", "c/folder.png/", "empty/"]
    assert names(tmp_path, *images, *others) == images


def test_links_to_class_folders_are_followed(tmp_path: Path) -> None:
    names(tmp_path, "elsewhere/n01/1.png", "root/n02/1.png")
    os.symlink(tmp_path / "elsewhere" / "n01", tmp_path / "root" / "n01")
    assert names(tmp_path / "root") == ["n01/1.png", "n02/1.png"]


def test_a_root_that_is_a_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").touch()
    with pytest.raises(DataError, match="found a file"):
        open_pictures(tmp_path / "list.txt", 1)


def test_a_folder_that_cannot_be_read_is_an_error_not_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def locked(path: Path) -> object:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)  # chmod would not stop root, who runs the tests in a container
    with pytest.raises(DataError, match=r"a: cannot list the images \(Permission denied\)"):
        list_images(tmp_path)
