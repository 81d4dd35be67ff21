"""The whole pipeline on real photographs, with no download: `saev-dist demo`.

    photographs ──cut──▶ images/ ──embed──▶ shards/ ──train──▶ sae.pt ──extract──▶ run/ ──draw──▶ contact-sheet.png

Only `extract` is the tool; what comes before it makes, in small, what a user already has. The photographs are
those in scikit-image's wheel. Their model is one fixed linear layer: local patches of colour, whitened. Sparse
codes of such patches are known to be oriented edges and colours (Olshausen & Field, Nature 381, 1996), so a
stranger can tell from the picture whether the numbers are right.

Names: `e` images, `p` patches, `x` pixels of a patch with its surroundings, `d` activation width, `b` tokens of a
batch, `s` features, `k` slots.
"""

PHOTOGRAPHS = {
    "astronaut.png": 1.0,
    "brick.png": 1.0,
    "camera.png": 1.0,
    "chelsea.png": 1.0,
    "coffee.png": 1.0,
    "coins.png": 1.0,
    "grass.png": 1.0,
    "gravel.png": 1.0,
    "hubble_deep_field.jpg": 0.5,
    "ihc.png": 1.0,
    "moon.png": 1.0,
    "motorcycle_left.png": 1.0,
    "page.png": 1.0,
    "retina.jpg": 0.5,
    "rocket.jpg": 1.0,
    "text.png": 1.0,
}
