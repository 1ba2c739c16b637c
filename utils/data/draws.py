"""All randomness of training examples, as pure functions of (seed, draw), and the order in which rows are drawn.

A draw is one example of the endless stream of epochs: draw = epoch * rows_per_epoch + position.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

# The second word of a Philox key is the draw for examples; for orders its top bit is set, so that no two keys meet.
ORDER_KEYS = 1 << 63
MIX_KEYS = 1 << 62
SUBSET_KEYS = 1 << 61
CACHED_ORDERS = 2  # per source: this epoch's and a neighbour's


def _generator(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, counter], dtype=np.uint64)))


def check_seed(seed: int) -> int:
    """Return `seed` if it can key a generator, else raise a ValueError."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must lie between 0 and 2**63 - 1")
    return seed


def sample_draws(seed: int, draw: int, latent_shape: tuple[int, int, int], num_train_timesteps: int) -> dict:
    """Everything random about one example. `latent_shape` is (C, h, w).

    Uniforms lie in [0, 1): `u_crop` (2,), `u_flip`, `u_dropout`, `u_prompt`. `timestep` is an int in
    [0, num_train_timesteps). Float32 normals: `offset_noise` (C, 1, 1), `noise` and `posterior_noise` (C, h, w).
    """
    generator = _generator(seed, draw)
    # Small ones first, each from a fixed number of words: another latent shape leaves them as they are.
    u_crop_y, u_crop_x, u_flip, u_dropout, u_prompt, u_timestep = generator.random(6)
    return dict(
        u_crop=np.array([u_crop_y, u_crop_x]),
        u_flip=float(u_flip),
        u_dropout=float(u_dropout),
        u_prompt=float(u_prompt),
        timestep=int(u_timestep * num_train_timesteps),
        offset_noise=generator.standard_normal((latent_shape[0], 1, 1), dtype=np.float32),
        noise=generator.standard_normal(latent_shape, dtype=np.float32),
        posterior_noise=generator.standard_normal(latent_shape, dtype=np.float32),
    )


def random_subset(seed: int, num_rows: int, size: int) -> np.ndarray:
    """`size` of `num_rows` row numbers, in rising order; the same for the same arguments."""
    return np.sort(_generator(seed, ORDER_KEYS | SUBSET_KEYS).permutation(num_rows)[:size])


class DrawOrder:
    """Which row of which source each draw visits.

    An epoch has as many draws as the sources have rows together. Source i gets its weight's share n_i of them, at
    random places; its j-th visit in epoch e is visit v = e * n_i + j, and takes row
    `permutation(v // len_i)[v % len_i]`. So the shares hold in every epoch, and every row of a source is visited before
    any is visited again.
    """

    def __init__(self, lengths: list[int], weights: list[float], seed: int) -> None:
        self.seed = check_seed(seed)
        self.lengths = lengths
        self.rows_per_epoch = sum(lengths)
        self.shares = _shares(self.rows_per_epoch, weights)
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, draw: int) -> tuple[int, int]:
        """(source, row) of a draw."""
        epoch, position = divmod(draw, self.rows_per_epoch)
        if epoch not in self._epochs:
            self._epochs[epoch] = self._make_epoch(epoch)
            _forget_oldest(self._epochs, CACHED_ORDERS)
        sources, rows = self._epochs[epoch]
        return int(sources[position]), int(rows[position])

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources, rows) of all draws of an epoch, each (rows_per_epoch,)."""
        sources = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.shares)
        if len(self.lengths) > 1:
            sources = _generator(self.seed, ORDER_KEYS | MIX_KEYS | epoch).permutation(sources)
        rows = np.empty(self.rows_per_epoch, dtype=np.int64)
        for source, (length, share) in enumerate(zip(self.lengths, self.shares, strict=True)):
            rows[sources == source] = self._visited_rows(source, length, epoch * share, (epoch + 1) * share)
        return sources, rows

    def _visited_rows(self, source: int, length: int, start: int, stop: int) -> np.ndarray:
        """Rows of visits start..stop-1 of a source, (stop - start,)."""
        pieces = [np.empty(0, dtype=np.int64)]
        while start < stop:
            cycle, first = divmod(start, length)
            count = min(length - first, stop - start)
            pieces.append(self._permutation(source, cycle)[first : first + count])
            start += count
        return np.concatenate(pieces)

    def _permutation(self, source: int, cycle: int) -> np.ndarray:
        key = (source, cycle)
        if key not in self._permutations:
            generator = _generator(self.seed, ORDER_KEYS | source << 40 | cycle)
            self._permutations[key] = generator.permutation(self.lengths[source])
            _forget_oldest(self._permutations, CACHED_ORDERS * len(self.lengths))
        return self._permutations[key]


def _forget_oldest(cache: OrderedDict, size: int) -> None:
    while len(cache) > size:
        cache.popitem(last=False)


def _shares(total: int, weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights, of sum `total`: the largest remainders are rounded up."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for index in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[index] += 1
    return shares.tolist()
