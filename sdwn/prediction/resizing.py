"""A model's images resized and cropped as timm does, without what a crop throws away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import InterpolationMode

from sdwn.storage.images import Pixels


class Resizing:
    """timm's own transform for evaluation, up to uint8 of shape (height, width, 3).

    Where an image is a whole number of times as large as it becomes, as 512 becomes 256, the
    crop is taken first: each pixel is computed from the same others by the same factors.
    """

    def __init__(self, transform: Any) -> None:
        self._whole: Callable[[Image.Image], Any] = transform
        resize, crop = transform.transforms[:2]
        self._crops = isinstance(resize, Resize) and isinstance(crop, CenterCrop)
        if self._crops and isinstance(resize.size, int):
            self._side, self._kept = resize.size, tuple(crop.size)
            self._filter = str_to_pil_interp(InterpolationMode(resize.interpolation).value)
        else:
            self._crops = False

    def __call__(self, image: Image.Image) -> Pixels:
        """Make an RGB image what the model takes; safe in threads."""
        if self._crops and (box := kept_box(image.size, self._side, self._kept)):
            return np.asarray(image.resize(self._kept[::-1], self._filter, box))
        pixels: Pixels = np.asarray(self._whole(image))
        return pixels.transpose(1, 2, 0)


def kept_box(
    size: tuple[int, int], side: int, kept: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Give what a centre crop keeps of an image resized to a shorter side, in its own pixels.

    None where that is all of it, or no box of whole pixels. ``size`` is (width, height), ``kept``
    (height, width); the box is (left, top, right, bottom).

    >>> kept_box((512, 1024), 256, (224, 224))
    (32, 288, 480, 736)
    >>> kept_box((500, 500), 256, (224, 224)), kept_box((512, 512), 256, (256, 256))
    (None, None)
    """
    times, rest = divmod(min(size), side)
    height, width = kept
    if rest or times < 2 or max(size) % times or max(kept) > side or kept == (side, side):
        return None
    left = times * round((size[0] // times - width) / 2)
    top = times * round((size[1] // times - height) / 2)
    return left, top, left + times * width, top + times * height
