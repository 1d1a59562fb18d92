"""t-SNE of a layer's features before and after their normalisation (DeeperForward, fig. 9)."""

from __future__ import annotations

from itertools import islice

import torch

from ffengine.needs import need
from ffengine.nn.maps import Label, Samples, check_layer, layer_maps
from ffengine.nn.network import LocalNet

#: More samples take minutes and show no more.
MOST = 2000
#: Features are first projected on so many principal components, as is usual.
COMPONENTS = 50


def features(net: LocalNet, samples: Samples, layer: int, count: int, *, label: Label = "neutral",
             backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, z, y) of the first `count` samples at a layer: (N, features) twice and (N,).

    Raises:
        ValueError: a layer that does not exist, a count outside 2 to MOST.
    """
    check_layer(net, layer)
    if not 2 <= count <= MOST:
        raise ValueError(f"[tsne] expected 2 to {MOST} samples, got {count}")
    hs, zs, ys, seen = [], [], [], 0
    net.eval()
    for x, y in samples:
        x, y = x[:count - seen], y[:count - seen]
        maps = next(islice(layer_maps(net, x, y, label=label, backend=backend), layer, None))
        hs.append(maps.h.flatten(1).float().cpu().clone())
        zs.append(maps.z.flatten(1).float().cpu().clone())
        ys.append(y.cpu())
        seen += len(y)
        if seen == count:
            break
    return torch.cat(hs), torch.cat(zs), torch.cat(ys)


def embed(rows: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """(N, 2) of features (N, F), by scikit-learn; the same for the same seed.

    Perplexity 30, or a third of few samples.
    """
    manifold = need("sklearn.manifold", "[tsne]")
    centred = rows.double() - rows.double().mean(0)
    if min(centred.shape) > COMPONENTS:
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        centred = u[:, :COMPONENTS] * s[:COMPONENTS]
    perplexity = min(30.0, (len(rows) - 1) / 3)
    made = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    return torch.from_numpy(made.fit_transform(centred.float().numpy()))
