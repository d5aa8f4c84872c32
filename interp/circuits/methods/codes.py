"""What discrete codes tell of heads: codes, and pairs of codes, that are seen only where the task
is there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def node_score(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(heads,): how many different codes of a head are seen in positive and never in negative
    examples.

    positive, negative: (examples, heads) integer codes. (The paper passes these through a softmax
    over heads, which changes no ranking.)
    """
    return np.array(
        [
            len(np.setdiff1d(positive[:, h], negative[:, h], assume_unique=False))
            for h in range(positive.shape[1])
        ],
        dtype=np.float64,
    )


def effect_score(codes: np.ndarray, attributed: np.ndarray) -> np.ndarray:
    """(heads,): Σ_c n_c/n · |mean of a_h(x) over the examples x with code c|.

    codes (examples, heads); attributed (examples, heads): a_h(x), what head h does for the metric
    in x, to first order. With one code for all this is |mean effect|, with a code for each example
    the mean |effect|: codes say which examples are alike, so that noise within a code cancels and
    opposite roles in different situations do not.
    """
    n, heads = codes.shape
    scores = np.zeros(heads)
    for h in range(heads):
        _, which = np.unique(codes[:, h], return_inverse=True)
        scores[h] = np.abs(np.bincount(which, attributed[:, h])).sum() / n
    return scores


def pair_counts(positive: np.ndarray, negative: np.ndarray) -> Iterator[np.ndarray]:
    """(heads,) counts for each head i in order: how many different pairs of codes (c_i, c_j) are
    seen together in a positive example and never in a negative one, for every later head j; 0 for
    the others.

    One head's codes against all others' at a time: memory is (examples + codes of i) × (codes of
    all heads), never heads² · codes².
    """
    n, heads = positive.shape
    compact, sizes = _compact(np.concatenate([positive, negative]))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = compact + starts[:-1]  # (2n, heads): a column of its own for each (head, code)
    hot = np.zeros((len(compact), starts[-1]), dtype=np.float32)
    np.put_along_axis(hot, columns, 1.0, axis=1)
    later = np.arange(heads)
    for i in range(heads):
        mine = hot[:, starts[i] : starts[i + 1]]
        overlap = mine[:n].T @ hot[:n] > 0  # (codes of i, codes of all)
        only = overlap & ~(mine[n:].T @ hot[n:] > 0)
        counts = np.add.reduceat(only.sum(0), starts[:-1]).astype(np.float64)
        yield np.where(later > i, counts, 0.0)


def edge_matrix(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(heads, heads): `pair_counts` as a matrix, earlier head by later head."""
    return np.stack(list(pair_counts(positive, negative)))


def edge_score(counts: np.ndarray, twice: bool = False) -> np.ndarray:
    """(heads,): how often a head is an end of the strongest pairs (O'Neill and Bui 2024, section
    4.2): of the pairs in order, the first heads²/2 ends are counted. counts (heads, heads), each
    pair once, in either half; `twice`: each stands in the list twice, as in the released code."""
    heads = len(counts)
    both = counts + counts.T
    i, j = np.tril_indices(heads, -1)
    order = np.argsort(-both[i, j], kind="stable")
    listed = np.repeat(order, 2) if twice else order
    ends = np.stack([i[listed], j[listed]], 1).ravel()[: heads * heads // 2]
    return np.bincount(ends, minlength=heads).astype(np.float64)


def _compact(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each head's codes numbered 0, 1, …, and how many it has."""
    numbers = np.empty_like(codes)
    sizes = np.empty(codes.shape[1], dtype=np.int64)
    for h in range(codes.shape[1]):
        values, numbers[:, h] = np.unique(codes[:, h], return_inverse=True)
        sizes[h] = len(values)
    return numbers, sizes
