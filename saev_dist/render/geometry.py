"""PURE. Where a picture's patches are: how it was prepared for the model, and the grid that the tokens form.

Tokens are a row-major grid that no file stores; it follows from the picture. Two ways to prepare pictures are known,
as saev's writers had them (saev/data/transforms.py, and its gallery of 2025):

- grid: resize to `(columns * patch, rows * patch)`, where `columns * rows` is the number of patches and `columns / rows`
  the ratio nearest to the picture's own;
- crop: resize to a fixed size, whatever the aspect, then cut the middle out. Patches start at the upper left corner;
  what is left at the right and below when the patch does not divide the crop belongs to no patch.

A third is open_clip's for CLIP (torchvision's Resize and CenterCrop): crop, with the aspect kept at the resizing.
"""

import math
from dataclasses import dataclass
from typing import Literal

from saev_dist.errors import ConfigError

CROPPED_FAMILIES = ("clip", "siglip", "dinov2")
DINOV2_PATCH = 14
Fit = Literal["grid", "crop"]
MAX_SIDE_PX = 16_383  # of a WebP picture
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One picture's preparation. All sizes are (width, height) in px, scaled by `img_scale`."""

    resize: Size
    crop: tuple[int, int, int, int] | None
    """Left, top, right, bottom in the resized picture."""
    n_cols: int
    n_rows: int
    patch: float
    """Edge of a patch. Patch i covers (i % n_cols, i // n_cols) times this, from the upper left corner."""

    @property
    def size(self) -> Size:
        """Of what is shown."""
        if self.crop is None:
            return self.resize
        left, top, right, bottom = self.crop
        return right - left, bottom - top


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How all pictures of a data set were prepared.

    Args:
        fit: grid or crop.
        n_patches: content tokens per image.
        patch_size: px. None: 16 for grid; for crop the largest that gives `n_patches`. Of the default crop it must then be
            a divisor: 576 patches of 9 px, with 8 px over, are no model's, but a larger picture's.
        grid: columns and rows of every picture. None: the factors of `n_patches` nearest to each picture's aspect.
        resize, crop: width and height, for fit crop.
        keep_aspect: for fit crop: the shorter side becomes `resize`, which is square, and the longer one follows.
        img_scale: shown pixels per pixel that the model saw.

    Raises:
        ConfigError: the numbers do not give `n_patches`; the message lists those that do.
    """

    fit: Fit
    n_patches: int
    patch_size: int | None = None
    grid: Size | None = None
    resize: Size = (256, 256)
    crop: Size = (224, 224)
    keep_aspect: bool = False
    img_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.fit == "grid":
            if self.grid is not None and self.grid[0] * self.grid[1] != self.n_patches:
                raise ConfigError(
                    f"--grid {self.grid[0]} {self.grid[1]} has {self.grid[0] * self.grid[1]:,} patches; the shards have "
                    f"{self.n_patches:,} per image. These fit: {_listed(_factors(self.n_patches))}."
                )
            if (self.resize, self.crop, self.keep_aspect) != (Geometry.resize, Geometry.crop, Geometry.keep_aspect):
                raise ConfigError("--resize, --crop and --keep-aspect belong to --fit crop; add it, or leave them out.")
            return
        if self.grid is not None:
            raise ConfigError("--grid belongs to --fit grid; with --fit crop the grid follows from --crop and --patch-size.")
        if self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]:
            raise ConfigError(f"--crop {_px(self.crop)} is larger than --resize {_px(self.resize)}.")
        if self.keep_aspect and self.resize[0] != self.resize[1]:
            raise ConfigError(
                f"--keep-aspect makes the shorter side what --resize says, got {_px(self.resize)}; expected one number twice, "
                f"such as --resize {min(self.resize)} {min(self.resize)}."
            )
        fitting = _patch_sizes(self.crop, self.n_patches, self.patch_size)
        if not fitting:
            raise ConfigError(
                f"no patch size cuts --crop {_px(self.crop)} into {self.n_patches:,} patches"
                f"{' without a rest' if self.crop == Geometry.crop else ''}. Set --resize and --crop to what the model saw"
                f"{_larger(self.n_patches)}, or use --fit grid, where these columns and rows fit: "
                f"{_listed(_factors(self.n_patches))}."
            )
        if self.patch_size is not None and self.patch_size not in fitting:
            columns, rows = self.crop[0] // self.patch_size, self.crop[1] // self.patch_size
            raise ConfigError(
                f"--patch-size {self.patch_size} cuts --crop {_px(self.crop)} into {columns} x {rows} = {columns * rows:,} "
                f"patches; the shards have {self.n_patches:,} per image. These sizes fit: {', '.join(map(str, fitting))}."
            )

    def describe(self, *, with_pictures: bool) -> str:
        """How pictures are taken to have been prepared: a wrong guess puts every heatmap in the wrong place."""
        if self.fit == "grid" and self.grid is None and not with_pictures:
            columns, rows = nearest_grid(self.n_patches, 1)
            return (
                f"grid: {columns} × {rows} of {self.n_patches:,} patches, the nearest to a square: without pictures nothing "
                "tells the shape, but --grid can"
            )
        if self.fit == "grid":
            patches = f"whole patches of {self.patch_size or 16} px"
            if self.grid:
                return f"grid: resized to {self.grid[0]} × {self.grid[1]} {patches}"
            return f"grid: resized to {self.n_patches:,} {patches}, at about the aspect of the picture"
        patch = self.patch_size or _patch_sizes(self.crop, self.n_patches)[0]
        (width, height), (inner_width, inner_height) = self.resize, self.crop
        size = f"{width} px on the shorter side, its aspect kept" if self.keep_aspect else f"{width} × {height} px"
        return (
            f"crop: resized to {size}, of that the middle {inner_width} × {inner_height}: "
            f"{inner_width // patch} × {inner_height // patch} patches of {patch} px"
        )

    @property
    def shown_px(self) -> int:
        """Pixels of what is shown of a picture, whatever its aspect."""
        if self.fit == "crop":
            return round(self.crop[0] * self.crop[1] * self.img_scale**2)
        return round(self.n_patches * ((self.patch_size or 16) * self.img_scale) ** 2)

    def place(self, width: int, height: int) -> Placement:
        """Prepare a picture of this size.

        Raises:
            ConfigError: it would become too large to be stored.
        """
        place = self._place(width, height)
        if max(place.resize) > MAX_SIDE_PX:
            advice = "Lower --img-scale or --patch-size, or give the grid with --grid."
            if self.fit == "crop":
                advice = f"Lower --img-scale or --resize{', or leave --keep-aspect out' if self.keep_aspect else ''}."
            raise ConfigError(
                f"a picture of {width:,} x {height:,} px would be drawn as {place.resize[0]:,} x {place.resize[1]:,}; a side "
                f"may have {MAX_SIDE_PX:,} px. {advice}"
            )
        return place

    def _place(self, width: int, height: int) -> Placement:
        scale = self.img_scale
        if self.fit == "grid":
            patch = self.patch_size or 16
            n_cols, n_rows = self.grid or nearest_grid(self.n_patches, width / height)
            size = max(1, round(n_cols * patch * scale)), max(1, round(n_rows * patch * scale))
            return Placement(resize=size, crop=None, n_cols=n_cols, n_rows=n_rows, patch=patch * scale)
        patch = self.patch_size or _patch_sizes(self.crop, self.n_patches)[0]
        whole = self.resize
        if self.keep_aspect:  # as torchvision's Resize(int) rounds
            short, long = self.resize[0], int(self.resize[0] * max(width, height) / min(width, height))
            whole = (long, short) if width > height else (short, long)
        resize, crop = ((max(1, round(w * scale)), max(1, round(h * scale))) for w, h in (whole, self.crop))
        left, top = (round((whole - part) / 2) for whole, part in zip(resize, crop, strict=True))  # as torchvision rounds
        return Placement(
            resize=resize,
            crop=(left, top, left + crop[0], top + crop[1]),
            n_cols=self.crop[0] // patch,
            n_rows=self.crop[1] // patch,
            patch=patch * scale,
        )


def default_fit(family: str, n_patches: int, *, crop: Size = Geometry.crop, patch_size: int | None = None) -> Fit:
    """How the model family's pictures are prepared unless a user says otherwise.

    clip's and siglip's are cropped, and `Geometry` refuses a crop that does not give `n_patches`: the model saw a larger
    picture, whose size the user must say. saev crops dinov2's too (256 x 256, of that 224 x 224, patches of 14 px); but that
    model takes any size, and where the crop does not give `n_patches` its pictures get the grid.

    Args:
        family: of the model, as the shards name it.
        n_patches, crop, patch_size: as in `Geometry`.
    """
    if family not in CROPPED_FAMILIES:
        return "grid"
    patch_size = patch_size or DINOV2_PATCH
    return "crop" if family != "dinov2" or patch_size in _patch_sizes(crop, n_patches, patch_size) else "grid"


def nearest_grid(n_patches: int, aspect: float) -> Size:
    """Columns and rows whose product is `n_patches` and whose ratio is nearest to `aspect` (width / height).

    Of two equally near the one with the more lopsided factors wins, then the upright one, as in saev's
    `resize_to_patch_grid`, which tries the divisors in that order.
    """
    return min(_factors(n_patches), key=lambda size: abs(size[0] / size[1] - aspect))


def _factors(n_patches: int) -> list[Size]:
    """All (columns, rows) of that product, the most lopsided first, the upright one of a pair before the flat one."""
    low = [i for i in range(1, int(n_patches**0.5) + 1) if n_patches % i == 0]
    return [size for i in low for size in ((i, n_patches // i), (n_patches // i, i))]


def _patch_sizes(crop: Size, n_patches: int, patch_size: int | None = None) -> list[int]:
    """Patch sizes that cut the crop into that many patches, largest first.

    Where the user has named neither the crop nor the patch, those alone that leave no rest: a number of patches that comes
    out by chance is not to be taken for that of a model which saw a larger picture.
    """
    sizes = [size for size in range(min(crop), 0, -1) if (crop[0] // size) * (crop[1] // size) == n_patches]
    if crop != Geometry.crop or patch_size is not None:
        return sizes
    return [size for size in sizes if crop[0] % size == 0 == crop[1] % size]


def _larger(n_patches: int) -> str:
    """Sizes for more patches than the default has. saev's 256 and 224 px are 16 and 14 px for each of a row of 16."""
    side = math.isqrt(n_patches)
    if side * side != n_patches or side <= 16:
        return ""
    return f", such as --resize {16 * side} {16 * side} --crop {14 * side} {14 * side} for patches of 14 px"


def _listed(sizes: list[Size]) -> str:
    distinct = list(dict.fromkeys(reversed(sizes)))  # the squarest first
    more = f" and {len(distinct) - 8} more" if len(distinct) > 8 else ""
    return ", ".join(f"{columns} {rows}" for columns, rows in distinct[:8]) + more


def _px(size: Size) -> str:
    return f"{size[0]} {size[1]}"
