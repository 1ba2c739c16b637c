"""Divides an image into the flat regions of a drawing: a watershed, then merging by the Mumford-Shah functional.

Images are float32 CIELAB (H, W, 3), labels int (H, W), colours float32 (N, 3).
"""

from typing import NamedTuple

import cv2
import numpy as np

from data_preparation.tasks.flow import dot

DETAIL = 12.0  # distance in CIELAB from which a small region is rather kept, and below which it is rather merged
MAX_ROUNDS = 60  # each merges about a third of the regions that can be merged
OFFSETS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))


class Borders(NamedTuple):
    """All pairs of adjacent regions, (M,) each: first < second, and the length of their border in pixels."""

    first: np.ndarray
    second: np.ndarray
    length: np.ndarray


def find_regions(lab: np.ndarray, texture: np.ndarray, simplicity: float) -> tuple[np.ndarray, np.ndarray]:
    """(labels, mean colours) of the regions. simplicity: more gives fewer regions; texture (H, W) multiplies it."""
    labels = _watershed(lab)
    names = np.arange(labels.max() + 1)  # of the merged region of each small one
    sums = np.stack([_sum(labels, values) for values in (np.ones_like(texture), texture, *cv2.split(lab))])
    borders = _collect(*_neighbours(labels), len(names))
    for _ in range(MAX_ROUNDS):
        partner = _cheapest_partners(borders, *sums[:2], sums[2:], simplicity)
        itself = np.arange(len(partner))
        is_mutual = (partner[partner] == itself) & (partner < itself)
        if not is_mutual.any():
            break
        new = np.unique(np.where(is_mutual, partner, itself), return_inverse=True)[1]
        names, sums = new[names], np.stack([_sum(new, values) for values in sums])
        borders = _collect(new[borders.first], new[borders.second], borders.length, sums.shape[1])
    return names[labels], (sums[2:] / sums[0]).T.astype(np.float32)


def _watershed(lab: np.ndarray) -> np.ndarray:
    """Labels of small regions around the local minima of the gradient."""
    across, down = cv2.Sobel(lab, cv2.CV_32F, 1, 0), cv2.Sobel(lab, cv2.CV_32F, 0, 1)
    strength = cv2.GaussianBlur(np.sqrt(dot(across, across) + dot(down, down)), (0, 0), 0.7)
    strength = np.round(2 * strength)
    is_minimum = strength <= cv2.erode(strength, np.ones((5, 5), np.uint8))
    markers = cv2.connectedComponents(is_minimum.astype(np.uint8))[1]
    bytes_of_lab = np.clip(lab * np.float32([2.55, 1, 1]) + np.float32([0, 128, 128]), 0, 255).astype(np.uint8)
    labels = cv2.watershed(bytes_of_lab, markers)
    while (is_line := labels <= 0).any():  # the lines between the regions join one of them
        labels[is_line] = cv2.dilate(labels.astype(np.float32), np.ones((3, 3)))[is_line].astype(np.int32)
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def _sum(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of the values with each label."""
    return np.bincount(labels.ravel(), values.ravel())


def _neighbours(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(one label, other label, 1) of all neighbouring pixels."""
    one = np.concatenate([labels[:, 1:].ravel(), labels[1:].ravel()])
    other = np.concatenate([labels[:, :-1].ravel(), labels[:-1].ravel()])
    return one, other, np.ones(len(one))


def _collect(one: np.ndarray, other: np.ndarray, length: np.ndarray, count: int) -> Borders:
    """Add up the borders between each pair of `count` regions."""
    is_border = one != other
    low, high = np.minimum(one, other)[is_border], np.maximum(one, other)[is_border]
    pairs, place = np.unique(low * count + high, return_inverse=True)
    return Borders(pairs // count, pairs % count, np.bincount(place, length[is_border], len(pairs)))


def _cheapest_partners(
    borders: Borders, areas: np.ndarray, textures: np.ndarray, sums: np.ndarray, simplicity: float
) -> np.ndarray:
    """(N,) for each region the neighbour with which merging costs least; itself if that is too much.

    The cost is the added error of the colours for each pixel of border that disappears (Koepfler et al. 1994).
    """
    first, second, length = borders
    colours, area = sums / areas, areas[first] + areas[second]
    distance = np.sqrt(((colours[:, first] - colours[:, second]) ** 2).sum(axis=0))
    # Small strong details such as eyes stay, large faint tones merge: the third power of the distance, not the second.
    cost = areas[first] * areas[second] / area * distance**3 / DETAIL / length
    cost /= simplicity * (textures[first] + textures[second]) / area
    order = np.argsort(-cost, kind="stable")  # the cheapest is written last
    order = order[cost[order] < 1]
    partner = np.arange(len(areas))
    pairs = np.stack([first[order], second[order]], axis=1)
    partner[pairs.ravel()] = pairs[:, ::-1].ravel()
    return partner


def smooth_borders(labels: np.ndarray, colours: np.ndarray, lab: np.ndarray, reach: int) -> np.ndarray:
    """Labels: each pixel joins the region, within `reach` pixels of it, with the colour nearest to its own in `lab`.

    The borders become contours of that smooth image, in place of the ragged ones of a watershed.
    """
    padded, (height, width) = np.pad(labels, reach, mode="edge"), labels.shape
    nearest, least = labels.copy(), np.full(labels.shape, np.inf, np.float32)
    for down, right in OFFSETS:
        top, left = reach + round(reach * down), reach + round(reach * right)
        candidate = padded[top : top + height, left : left + width]
        difference = colours[candidate] - lab
        distance = dot(difference, difference)
        is_nearer = distance < least
        nearest[is_nearer], least[is_nearer] = candidate[is_nearer], distance[is_nearer]
    return nearest
