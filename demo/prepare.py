"""Make training and validation data from the photographs in scikit-image. Downloads nothing.

python demo/prepare.py [--output FOLDER]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from skimage import data

from sparse_sr_attn.data.pairs import write_pairs

UPSCALE = 2
CROP = 48  # `gt_size` of train.yml: the side of a training crop, in high-resolution pixels
TILE = 128  # small files, so that a training step does not decode whole photographs

# The two motorcycles are a stereo pair of one scene: both are on the same side of the split.
TRAIN: dict[str, Callable[[], np.ndarray]] = {
    "brick": data.brick,
    "coffee": data.coffee,
    "coins": data.coins,
    "grass": data.grass,
    "gravel": data.gravel,
    "immunohistochemistry": data.immunohistochemistry,
    "motorcycle_left": lambda: data.stereo_motorcycle()[0],
    "motorcycle_right": lambda: data.stereo_motorcycle()[1],
    "page": data.page,
}
VAL: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": data.astronaut,
    "camera": data.camera,
    "chelsea": data.chelsea,
    "rocket": data.rocket,
    "text": data.text,
}


def photograph(load: Callable[[], np.ndarray]) -> torch.Tensor:
    """Three equal channels if it is grey."""
    pixels = torch.from_numpy(np.array(load()))
    return pixels[..., :3] if pixels.dim() == 3 else pixels[..., None].expand(-1, -1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "data",
        help="folder to write (demo/data)",
    )
    out: Path = parser.parse_args().output.resolve()
    for part, photographs, cut in (("train", TRAIN, {"tile": TILE, "crop": CROP}), ("val", VAL, {})):
        pictures = ((name, photograph(load)) for name, load in photographs.items())
        count = write_pairs(pictures, out / part, UPSCALE, **cut)
        print(f"{part:5}: {count} pairs from {len(photographs)} photographs ({', '.join(photographs)})")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
