"""All randomness of training examples as pure functions of (seed, draw), and the order of the rows.

A draw is the number of an example in the endless stream of epochs: draw = epoch * rows_per_epoch + position.
"""

from functools import lru_cache

import numpy as np

# The second word of a Philox key is the draw for examples. For orders its top bit is set, so that all keys differ.
ORDER_KEY = 1 << 63
SOURCES_KEY = 1 << 62
SUBSET_KEY = 1 << 61
HELD_OUT_KEY = 1 << 60
CROP_KEY = 1 << 59
CACHED_ORDERS = 2  # per source: of the current and the neighbouring epoch


def _generator(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, counter], dtype=np.uint64)))


def check_seed(seed: int) -> int:
    """Return `seed`; raise ValueError if it cannot key a generator."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must be between 0 and 2**63 - 1")
    return seed


def sample_draws(seed: int, draw: int, latent_shape: tuple[int, int, int], num_train_timesteps: int) -> dict:
    """The random values of one example. latent_shape: (C, h, w).

    Uniforms lie in [0, 1): `u_crop` (2,), `u_flip`, `u_dropout`, `u_prompt`. `timestep` is an int in
    [0, num_train_timesteps). Float32 normals: `offset_noise` (C, 1, 1), `noise` and `posterior_noise` (C, h, w).
    """
    generator = _generator(seed, draw)
    # Scalars first, so that they do not depend on the latent shape.
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


def fixed_crop(row: int, crop: int) -> tuple[float, float]:
    """The position (y, x) in [0, 1) of a row's crop with this number, in every run."""
    return tuple(_generator(row, ORDER_KEY | CROP_KEY | crop).random(2).tolist())


def random_subset(seed: int, num_rows: int, size: int) -> np.ndarray:
    """`size` distinct row numbers below `num_rows`, ascending; the same for the same arguments."""
    return np.sort(_generator(seed, ORDER_KEY | SUBSET_KEY).permutation(num_rows)[:size])


def random_order(seed: int, count: int) -> np.ndarray:
    """The numbers below `count` in an order drawn from the seed, another one than that of `random_subset`."""
    return _generator(seed, ORDER_KEY | HELD_OUT_KEY).permutation(count)


class DrawOrder:
    """Which row of which source each draw visits.

    An epoch has as many draws as all sources have rows. Source i gets n_i of them, in proportion to its weight, at
    random positions; its j-th visit in epoch e is visit v = e * n_i + j and takes row
    `permutation(v // len_i)[v % len_i]`. So the proportions hold in every epoch, and all rows of a source are visited
    before any is visited again.
    """

    def __init__(self, lengths: list[int], weights: list[float], seed: int) -> None:
        self.seed = check_seed(seed)
        self.lengths = lengths
        self.rows_per_epoch = sum(lengths)
        self.shares = _shares(self.rows_per_epoch, weights)
        self._epoch = lru_cache(CACHED_ORDERS)(self._make_epoch)
        self._permutation = lru_cache(CACHED_ORDERS * len(lengths))(self._make_permutation)

    def locate(self, draw: int) -> tuple[int, int]:
        """(source, row) of a draw."""
        epoch, position = divmod(draw, self.rows_per_epoch)
        sources, rows = self._epoch(epoch)
        return int(sources[position]), int(rows[position])

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources, rows) of all draws of an epoch, each (rows_per_epoch,)."""
        sources = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.shares)
        if len(self.lengths) > 1:
            sources = _generator(self.seed, ORDER_KEY | SOURCES_KEY | epoch).permutation(sources)
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

    def _make_permutation(self, source: int, cycle: int) -> np.ndarray:
        return _generator(self.seed, ORDER_KEY | source << 40 | cycle).permutation(self.lengths[source])


def _shares(total: int, weights: list[float]) -> list[int]:
    """Integers in proportion to the weights that add up to `total`: the largest remainders are rounded up."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for index in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[index] += 1
    return shares.tolist()
