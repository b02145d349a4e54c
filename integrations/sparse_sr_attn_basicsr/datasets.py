"""A data set that decodes each image once and keeps it in memory."""

from pathlib import Path
from typing import Any

import numpy as np
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils import FileClient, bgr2ycbcr, imfrombytes, img2tensor
from torchvision.transforms.functional import normalize

Pixels = np.ndarray[Any, np.dtype[Any]]


class CachedPairedImageDataset(PairedImageDataset):  # type: ignore[misc]  # BasicSR has no types
    """BasicSR's `PairedImageDataset` with images cached in memory after the first read.

    Patches are cut from the decoded uint8 image, so photographs need not be cut into sub-images, and loading costs
    almost nothing after the first epoch. Samples are bit-identical to those of `PairedImageDataset` with the same
    random numbers. Memory: 3 bytes a pixel of both resolutions (8 GB for DIV2K at x2) in each process that loads;
    one worker is enough.

    Args:
        opt: the options of `PairedImageDataset`, and

            - `dataroot_teacher`: folder with another network's outputs, named and sized like the images of
              `dataroot_gt`. Optional.
            - `teacher_weight`: weight of the teacher's image in the target, in [0, 1]; the rest is the ground truth.
              Default: 0.5.

    Raises:
        ValueError: `teacher_weight` is not in [0, 1].

    Source:
        The mixed targets follow empirical centroid-oriented optimisation (AAAI 2024, arXiv 2312.17526).
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.teacher = opt.get("dataroot_teacher")
        self.teacher_weight = opt.get("teacher_weight", 0.5)
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight must be in [0, 1], got {self.teacher_weight}")
        self.file_client: Any = None
        self._pairs: dict[int, tuple[Pixels, Pixels]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `lq` and `gt`, float tensors `(3, h, w)` in 0..1, and their paths.

        Raises:
            OSError: a file cannot be read as an image.
            ValueError: the teacher's image is not as large as the ground truth.
        """
        if index not in self._pairs:
            self._pairs[index] = self._read(index)
        target, image = self._pairs[index]
        opt, scale, paths = self.opt, self.opt["scale"], self.paths[index]
        if opt["phase"] == "train":
            target, image = paired_random_crop(target, image, opt["gt_size"], scale, paths["gt_path"])
        else:
            target = target[: image.shape[0] * scale, : image.shape[1] * scale]
        target, image = (pixels.astype(np.float32) / 255 for pixels in (target, image))
        if self.teacher:
            truth, taught = np.split(target, 2, axis=2)
            target = truth + np.float32(self.teacher_weight) * (taught - truth)
        if opt["phase"] == "train":
            target, image = augment([target, image], opt["use_hflip"], opt["use_rot"])
        if opt.get("color") == "y":
            target, image = (bgr2ycbcr(pixels, y_only=True)[..., None] for pixels in (target, image))
        target, image = img2tensor([target, image], bgr2rgb=True, float32=True)
        if self.mean is not None or self.std is not None:
            for pixels in (image, target):
                normalize(pixels, self.mean, self.std, inplace=True)
        return {"lq": image, "gt": target, "lq_path": paths["lq_path"], "gt_path": paths["gt_path"]}

    def _read(self, index: int) -> tuple[Pixels, Pixels]:
        """Return the target, with the teacher's image as channels 3 to 5 if there is one, and the input."""
        if self.file_client is None:
            backend = dict(self.io_backend_opt)
            self.file_client = FileClient(backend.pop("type"), **backend)
        target, image = (
            _decode(self.file_client.get(path := self.paths[index][f"{key}_path"], key), path) for key in ("gt", "lq")
        )
        if self.teacher:
            path = self.paths[index]["gt_path"]
            file = Path(self.teacher, Path(path).relative_to(self.gt_folder))
            taught = _decode(file.read_bytes(), file)
            if taught.shape != target.shape:
                raise ValueError(f"{file} must be of shape {target.shape}, like {path}, got {taught.shape}")
            target = np.concatenate([target, taught], axis=2)
        return target, image


def _decode(content: bytes, path: object) -> Pixels:
    image: Pixels | None = imfrombytes(content) if content else None
    if image is None:
        raise OSError(f"{path} cannot be read as an image")
    return image
