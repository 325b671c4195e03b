"""A codebook of feature vectors: a uniform sample of them, k-means, and its cache on disk."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.states import damage, replacing, seal, writing

_ITERATIONS = 20


class Sample:
    """Keeps a uniform sample of a stream of vectors, all of them where they are no more than the limit.

    Every vector draws a number, and those with the smallest stay: each set of `limit` vectors is equally likely,
    however long the stream turns out to be.

    Args:
        limit: Number of vectors to keep.
        generator: Where the numbers come from.

    >>> sample = Sample(2, torch.Generator().manual_seed(0))
    >>> for start in (0, 3, 6):
    ...     sample.add(torch.arange(start, start + 3.0).unsqueeze(1))
    >>> sample.seen, sample.vectors().shape
    (9, torch.Size([2, 1]))
    """

    def __init__(self, limit: int, generator: torch.Generator) -> None:
        self.limit, self.generator = limit, generator
        self.seen, self._bar = 0, 1.0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, vectors: Tensor) -> None:
        """Takes the next vectors `[n, C]` of the stream."""
        drawn = torch.rand(len(vectors), generator=self.generator, dtype=torch.float64)
        keep = (drawn < self._bar).nonzero().squeeze(1)
        self.seen += len(vectors)
        self._kept.append((drawn[keep], vectors[keep.to(vectors.device)].float().cpu()))
        if sum(len(drawn) for drawn, _ in self._kept) > 2 * self.limit:
            self._shrink()

    def vectors(self) -> Tensor:
        """The sample `[N, C]`, in a random order."""
        self._shrink()
        return self._kept[0][1]

    def _shrink(self) -> None:
        drawn, vectors = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        smallest = drawn.argsort()[: self.limit]
        self._kept = [(drawn[smallest], vectors[smallest])]
        if len(smallest) == self.limit:
            self._bar = float(drawn[smallest[-1]])


def fit_codebook(vectors: Tensor, words: int, seed: int, least: int = 0) -> tuple[Tensor, Tensor]:
    """Means of clusters of vectors, by scikit-learn's k-means.

    Lloyd's algorithm in float32, 20 iterations at most from random vectors, as the k-means of QuEST's released code
    (faiss) does. Equal vectors count as one that weighs more, so that no two words start as one. scikit-learn moves a
    cluster that has lost all vectors to the vector that is farthest from its own mean.

    Args:
        vectors: `[N, C]`.
        words: K, the number of clusters.
        seed: Of the first means.
        least: With fewer different vectors than this for each word there are fewer words, but at least two.

    Returns:
        The means `[K, C]`, and how many vectors each stands for `[K]`.
    """
    from sklearn.cluster import KMeans

    if not vectors.isfinite().all():
        raise DistillError("Expected finite features to make a codebook of, got nan or inf: is the teacher trained?")
    distinct, weights = torch.unique(vectors, dim=0, return_counts=True)
    if least:
        words = min(words, max(2, len(distinct) // least))
    if len(distinct) < words:
        raise DistillError(
            f"A codebook of {words} words needs at least as many different feature vectors, and the training set gave"
            f" {len(distinct)}: ask for fewer words, words={max(2, len(distinct) // 10)}, or read a larger map."
        )
    kmeans = KMeans(words, init="random", n_init=1, max_iter=_ITERATIONS, algorithm="lloyd", random_state=seed)
    labels = kmeans.fit_predict(distinct.numpy(), sample_weight=weights.float().numpy())
    counts = torch.zeros(words, dtype=torch.long).index_add_(0, torch.from_numpy(labels).long(), weights)
    return torch.from_numpy(kmeans.cluster_centers_).float(), counts


def cached_codebook(
    vectors: Tensor, words: int, seed: int, folder: str | Path, described: Mapping[str, Any], least: int = 0
) -> tuple[Tensor, Tensor]:
    """`fit_codebook`, or what it gave the last time for the same vectors, as a sealed folder (`kd_plugins.states`).

    It is named by the hash of everything that the codebook depends on: the vectors themselves, so that any change
    of data, augmentation or teacher is seen; the number of words, the seed, the version of scikit-learn; and what the
    caller says. All of that stands in its manifest.

    Args:
        vectors: As `fit_codebook` takes them.
        words: The same.
        seed: The same.
        folder: The cache; made if it is not there.
        described: What else tells this codebook from others, as JSON: the teacher's hash, its layer, the pooling.
        least: As `fit_codebook` takes it.

    Raises:
        DistillError: The vectors give no codebook, or it cannot be written.
    """
    from safetensors.torch import load_file, save_file

    content = {
        **described,
        "words": words,
        "least": least,
        "seed": seed,
        "iterations": _ITERATIONS,
        "vectors": {"shape": list(vectors.shape), "sha256": fingerprint_of({"vectors": vectors})},
        "scikit-learn": version("scikit-learn"),
    }
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    entry = Path(folder) / name
    path = entry / "codebook.safetensors"
    # Another run's is taken once it is whole, and made anew where it is damaged.
    if not damage(entry, [path.name]):
        stored = load_file(path)
        return stored["codebook"], stored["counts"]
    codebook, counts = fit_codebook(vectors, words, seed, least)
    with writing(entry):
        entry.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial:
            save_file({"codebook": codebook, "counts": counts}, partial)
        seal(entry, **content)
    return codebook, counts


def fingerprint_of(source: nn.Module | Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and bytes of a network's state, or of tensors by name."""
    digest = hashlib.sha256()
    state = source.state_dict() if isinstance(source, nn.Module) else source
    for name, value in sorted(state.items()):
        kind = f"{value.dtype} {list(value.shape)} " if isinstance(value, Tensor) else ""
        digest.update(f"{name} {kind}".encode())
        digest.update(state_bytes(value))
    return digest.hexdigest()


def state_bytes(value: Any) -> bytes:
    """An entry of a state dict; quantised layers pack their weights, and a module's own state may be anything."""
    if isinstance(value, Tensor) and not value.is_quantized:
        # Flat first: the bytes of a tensor without an axis cannot be viewed.
        return value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
