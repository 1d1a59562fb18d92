"""Image data: seven data sets or one's own, splits, vectorised loaders, seeded augmentation.

``load(name)``, or ``splits(train, test)`` of any torch data sets, gives `Splits` of three
`ImageSet`s; ``loader(image_set, batch_size=...)`` gives normalised
``(x float32 (B, C, H, W), y int64 (B,))`` batches; `augment` holds what may be put between the two;
`negatives` says what a wrong sample is, `superclasses` what coarser labels are.
"""

from ffengine.data import augment, negatives, own, superclasses
from ffengine.data.batches import Loader, loader
from ffengine.data.catalog import NAMES
from ffengine.data.datasets import splits
from ffengine.data.image_set import ImageSet, Splits
from ffengine.data.loading import load

__all__ = ["NAMES", "ImageSet", "Loader", "Splits", "augment", "load", "loader",
           "negatives", "own", "splits", "superclasses"]
