"""Super-classes: coarser labels that early layers may be trained on.

Four ways to have them: `given`, `by_name` (CIFAR-100's own), `cluster` (hierarchical clustering
of the training data, the support-neuron paper's appendix B.1) and `blocks` (CwComp's bug).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ffengine.needs import need

#: Super-class -> its classes; both orders of numbers are the published ones, which for the
#: classes is the alphabet.
CIFAR100: dict[str, str] = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
_TABLES = {"cifar100": CIFAR100}
_CHUNK = 1024


@dataclass(frozen=True)
class SuperClasses:
    """map[c] is the super-class of class c; super-classes are numbered 0..S-1, none is empty.

    Raises ValueError for a class without a super-class or for gaps in the numbers.
    """

    map: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "map", tuple(int(s) for s in self.map))
        for label, superclass in enumerate(self.map):
            if superclass < 0:
                raise ValueError(
                    f"[superclasses] expected a super-class for every class, class {label} has none"
                )
        missing = set(range(self.num_super)) - set(self.map)
        if missing:
            raise ValueError(
                f"[superclasses] expected super-classes 0..{self.num_super - 1} without gaps, "
                f"no class has {min(missing)}"
            )
        if self.num_super < 2:
            raise ValueError(
                f"[superclasses] expected at least 2 super-classes, got {self.num_super}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.map)

    @property
    def num_super(self) -> int:
        return max(self.map, default=-1) + 1

    def apply(self, y: Tensor) -> Tensor:
        """Labels y, int64 of any shape -> their super-classes, on y's device.

        Raises TypeError for another dtype, ValueError for labels out of range (on the CPU).
        """
        if y.dtype != torch.int64:
            raise TypeError(f"[superclasses] expected int64 labels, got {y.dtype}")
        if y.device.type == "cpu":
            _check_labels(y, self.num_classes)
        return _table(self.map, y.device)[y]


@lru_cache(maxsize=32)
def _table(superclasses: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept per device: building it anew would copy from the host for every batch."""
    return torch.tensor(superclasses, device=device)


def _check_labels(y: Tensor, num_classes: int) -> None:
    if y.numel():
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= num_classes:
            got = low if low < 0 else high
            raise ValueError(f"[superclasses] expected labels in [0, {num_classes}), got {got}")


def given(superclasses: Mapping[int, int] | Sequence[int] | Tensor, num_classes: int
          ) -> SuperClasses:
    """From class -> super-class, a mapping or one number a class.

    Raises ValueError naming a class that is missing or unknown, or a super-class that is.
    """
    if isinstance(superclasses, Mapping):
        found = {int(c): int(s) for c, s in superclasses.items()}
    else:
        found = {c: int(s) for c, s in enumerate(superclasses)}
    for label in found:
        if not 0 <= label < num_classes:
            raise ValueError(
                f"[superclasses] expected classes 0..{num_classes - 1}, got class {label}"
            )
    return SuperClasses(tuple(found.get(c, -1) for c in range(num_classes)))


def by_name(name: str) -> SuperClasses:
    """The super-classes that a data set comes with: "cifar100" has 20 of 5 classes each.

    Raises ValueError for other names.
    """
    if name not in _TABLES:
        raise ValueError(
            f"[superclasses] known by name are those of {', '.join(_TABLES)}, got {name!r}"
        )
    members = [classes.split() for classes in _TABLES[name].values()]
    owner = {c: s for s, classes in enumerate(members) for c in classes}
    return SuperClasses(tuple(owner[c] for c in sorted(owner)))


def blocks(num_classes: int, size: int) -> SuperClasses:
    """label // size, what CwComp's code takes for CIFAR-100's super-classes (size 5).

    A published bug: neighbours in the alphabet have nothing in common. For reproducing it only;
    `by_name("cifar100")` has the real ones.

    Raises ValueError unless 1 <= size < num_classes.
    """
    if not 1 <= size < num_classes:
        raise ValueError(f"[superclasses] expected a size in 1..{num_classes - 1}, got {size}")
    return SuperClasses(tuple(c // size for c in range(num_classes)))


def cluster(images: Tensor, labels: Tensor, num_super: int, *, num_classes: int | None = None,
            linkage: str = "ward") -> SuperClasses:
    """Classes grouped by agglomerative clustering of their mean images (or features).

    images: (N, ...) of any real dtype; labels: (N,) int64; num_classes: default is the highest
        label + 1. linkage: "ward" (merge what adds least variance; tends to equal sizes) or
        "average" (smallest mean Euclidean distance), on the (K, features) means in float64.

    Deterministic: the first pair in class order merges on ties, and super-classes are numbered by
    their lowest class. Cuts of one tree nest: every super-class of a small num_super is a union
    of those of a larger one, so blocks of a network may go from coarse to fine.

    Raises ValueError unless 2 <= num_super <= num_classes, for a class without a sample, for
    images that are not finite, and for an unknown linkage; ImportError without scikit-learn.
    """
    if linkage not in ("ward", "average"):
        raise ValueError(f"[superclasses] linkage must be ward or average, got {linkage!r}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"[superclasses] expected labels int64 ({len(images)},), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if labels.numel() else 0
    if not 2 <= num_super <= num_classes:
        raise ValueError(
            f"[superclasses] expected num_super in 2..{num_classes} (the classes), got {num_super}"
        )
    _check_labels(labels, num_classes)
    means = class_means(images, labels, num_classes)
    clustering = need("sklearn.cluster", "[superclasses] cluster").AgglomerativeClustering
    model = clustering(n_clusters=num_super, linkage=linkage)
    found = model.fit_predict(means.cpu().numpy()).tolist()
    # The library numbers clusters by their place in its tree: renumber in class order.
    order = {cluster_id: rank for rank, cluster_id in enumerate(dict.fromkeys(found))}
    return SuperClasses(tuple(order[c] for c in found))


def class_means(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K, features) float64: the mean of each class; only a piece of images is ever in float64.

    Raises ValueError for a class without a sample, or a mean that is not finite.
    """
    count = torch.bincount(labels, minlength=num_classes)
    empty = (count == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"[superclasses] expected samples of every class, class {int(empty[0])} has none"
        )
    flat = images.detach().flatten(1) if images.dim() > 1 else images.detach()[:, None]
    total = torch.zeros(num_classes, flat.shape[1], dtype=torch.float64, device=images.device)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        total.index_add_(0, labels[part].to(images.device), flat[part].to(torch.float64))
    means = total / count.to(total.device)[:, None]
    bad = (~means.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"[superclasses] expected finite images, class {int(bad[0])} has others")
    return means
