"""Cut training and validation data from the photographs that scikit-image brings along. Downloads nothing.

python demo/prepare.py [--out DIR]
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

from sparse_sr_attn.degradation import crop_to_multiple, matlab_bicubic

UPSCALE = 2
CROP = 48  # `gt_size` of train.yml: the side of a training crop, in high-resolution pixels
TILE = 128  # small files, so that a training step need not decode whole photographs

# The two motorcycles are one scene seen by a stereo pair: both stand on the same side of the split.
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
    """Three equal channels if it is grey; sides that divide by the upscale factor."""
    pixels = torch.from_numpy(np.array(load()))
    if pixels.dim() == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    return crop_to_multiple(pixels[..., :3], UPSCALE)


def corners(length: int) -> list[int]:
    """Tiles overlap by a crop, so that every crop of the photograph lies in one; the last ends at the border."""
    last = max(0, length - TILE)
    last -= last % UPSCALE
    return sorted({*range(0, last, TILE - CROP), last})


def pairs(name: str, high: torch.Tensor, *, tiles: bool) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(file name, high resolution, low resolution): the photograph is shrunk as a whole and cut afterwards."""
    low = matlab_bicubic(high, UPSCALE)
    if not tiles:
        yield f"{name}.png", high, low
        return
    for top in corners(high.shape[0]):
        for left in corners(high.shape[1]):
            y, x = top // UPSCALE, left // UPSCALE
            size = TILE // UPSCALE
            yield (
                f"{name}_y{top:04d}_x{left:04d}.png",
                high[top : top + TILE, left : left + TILE],
                low[y : y + size, x : x + size],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "data", help="folder to write (demo/data)"
    )
    out: Path = parser.parse_args().out.resolve()
    partial = out / ".partial"  # an interrupted run leaves no half-filled folder behind that looks whole
    shutil.rmtree(partial, ignore_errors=True)
    for part, photographs in (("train", TRAIN), ("val", VAL)):
        folders = partial / part / "HR", partial / part / f"LR_x{UPSCALE}"
        for folder in folders:
            folder.mkdir(parents=True)
        count = 0
        for name, load in photographs.items():
            for file, *pictures in pairs(name, photograph(load), tiles=part == "train"):
                for folder, picture in zip(folders, pictures, strict=True):
                    Image.fromarray(picture.contiguous().numpy()).save(folder / file)
                count += 1
        print(f"{part:5}: {count} pairs from {len(photographs)} photographs ({', '.join(photographs)})")
    for part in sorted(partial.iterdir()):
        shutil.rmtree(out / part.name, ignore_errors=True)
        part.rename(out / part.name)
    partial.rmdir()
    print(f"written to {out}")


if __name__ == "__main__":
    main()
