"""ViewParams: the random numbers of views, drawn on the device for each image by itself."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sslfast.ops._check import check_tensor, may_read
from sslfast.ops._library import define
from sslfast.ops.view_specs import ViewSpec, affine

WIDTH = 19  # columns of the table
TRIES = 10  # crops drawn before the whole image, as near to the ratios as it can be, is taken
DRAWS = 2 * TRIES + 20  # uniform numbers of one view

# 4 steps of the jitter, 2 bits each, first step lowest: 0 brightness, 1 contrast, 2 saturation, 3 hue
_ORDERS = [sum(step << 2 * i for i, step in enumerate(order)) for order in itertools.permutations(range(4))]


@dataclass(frozen=True, eq=False)
class ViewParams:
    """What was drawn for V views of B images: `augment_views(..., params=params)` makes the same views again.

    The properties are parts of the table, so that writing to them changes it. A step whose probability is 0
    in the spec is not done whatever they say, and a blur reaches no farther than the spec's kernel.
    params[rows] has those of some images; params.to(device) moves them.

    Attributes:
        table: float32 [V, B, 19].
    """

    table: Tensor

    @classmethod
    def unchanged(cls, sizes: Tensor, views: int = 1) -> "ViewParams":
        """For `views` views of whole images of these sizes, int64 [B, 2], that are resized and nothing else,
        such as those a network is evaluated on; write other rectangles to `crop`."""
        check_tensor("sizes", sizes, (torch.int64,), (None, 2))
        params = cls(torch.zeros(views, len(sizes), WIDTH, device=sizes.device))
        params.crop[..., 2:] = sizes
        params.order.fill_(_ORDERS[0])
        params.jitter[..., :3] = 1
        params.solarize_threshold.fill_(math.inf)
        params.affine[..., ::4] = 1
        return params

    @property
    def crop(self) -> Tensor:
        """[V, B, 4]: top, left, height and width in pixels of the image"""
        return self.table[..., 0:4]

    @property
    def flip(self) -> Tensor:
        """[V, B]: 1 = mirrored"""
        return self.table[..., 4]

    @property
    def order(self) -> Tensor:
        """[V, B]: order of the jitter's steps (0 brightness, 1 contrast, 2 saturation, 3 hue), two bits for
        each, the first step in the lowest"""
        return self.table[..., 5]

    @property
    def jitter(self) -> Tensor:
        """[V, B, 4]: factors of brightness, contrast and saturation, and hue's shift in turns; (1, 1, 1, 0)
        where there is none"""
        return self.table[..., 6:10]

    @property
    def gray(self) -> Tensor:
        """[V, B]: 1 = without colours"""
        return self.table[..., 10]

    @property
    def blur_sigma(self) -> Tensor:
        """[V, B]: in pixels of the view; 0 = not blurred"""
        return self.table[..., 11]

    @property
    def solarize_threshold(self) -> Tensor:
        """[V, B]: infinity = not solarized"""
        return self.table[..., 12]

    @property
    def affine(self) -> Tensor:
        """[V, B, 6]: the first two rows of the matrix from places in the view to places in what it is made
        of, (x, y) from the centre in pixels; (1, 0, 0, 0, 1, 0) = nothing"""
        return self.table[..., 13:19]

    def __getitem__(self, rows: Tensor | slice) -> "ViewParams":
        return ViewParams(self.table[:, rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewParams":
        return ViewParams(self.table.to(device, non_blocking=non_blocking))

    def check(self, specs: Sequence[ViewSpec], sizes: Tensor) -> None:
        """Raises unless they are for these specs and for images of these sizes [B, 2]."""
        check_tensor("params", self.table, (torch.float32,), (len(specs), len(sizes), WIDTH), sizes)
        if not may_read(self.table) or not self.table.numel():
            return
        crop, order, sigma = self.crop, self.order, self.blur_sigma
        expected = [
            ("crop: expected integers", bool((crop == crop.round()).all())),
            (
                "crop: expected a rectangle inside the image",
                bool(((crop[..., :2] >= 0) & (crop[..., 2:] >= 1)).all())
                and bool((crop[..., :2] + crop[..., 2:] <= sizes).all()),
            ),
            (
                "order: expected one of the 24 orders",
                bool(torch.isin(order, order.new_tensor(_ORDERS)).all()),
            ),
            (
                "blur_sigma: expected 0 or numbers from 0.001 to 1000",
                bool(((sigma == 0) | ((sigma >= 1e-3) & (sigma <= 1e3))).all()),
            ),
            ("jitter: expected numbers of at most 1000", bool((self.jitter.abs() <= 1000).all())),
            ("affine: expected numbers of at most 1e9", bool((self.affine.abs() <= 1e9).all())),
            ("flip, gray, solarize_threshold: expected no NaN", not bool(self.table.isnan().any())),
        ]
        for message, fine in expected:
            if not fine:
                raise ValueError(f"params: {message}")


def draw(specs: Sequence[ViewSpec], sizes: Tensor, seed: Tensor, ids: Tensor) -> ViewParams:
    """An image's numbers depend on seed, its id and its size alone.

    Args:
        sizes: int64 [B, 2], height and width of each image.
        seed: int64 [1].
        ids: int64 [B].
    """
    return ViewParams(_draw_op(sizes, seed, ids, [x for spec in specs for x in _limits(spec).values()]))


def _draw(sizes: Tensor, seed: Tensor, ids: Tensor, limits: list[float]) -> Tensor:
    """ViewParams.table of specs with these limits, one after another."""
    number, orders, identity = _constants(tuple(limits), sizes.device)
    views, batch = len(number["flip_prob"]), len(ids)
    u = uniform(seed, ids, views * DRAWS).view(batch, views, DRAWS).transpose(0, 1)

    def between(low: str, high: str, at: int) -> Tensor:
        return number[low] + u[..., at] * (number[high] - number[low])

    def happens(name: str, at: int) -> Tensor:
        return u[..., at] < number[name]

    table = torch.empty(views, batch, WIDTH, dtype=torch.float32, device=u.device)
    out, rest = ViewParams(table), 2 * TRIES
    out.crop.copy_(_crop(u, sizes.double(), number))
    out.flip.copy_(happens("flip_prob", rest + 2))
    out.order.copy_(orders[(u[..., rest + 3] * len(_ORDERS)).long()])
    jittered = happens("jitter_prob", rest + 4)
    for i in range(4):
        factor = between(f"jitter_low{i}", f"jitter_high{i}", rest + 5 + i)
        out.jitter[..., i] = torch.where(jittered, factor, 0.0 if i == 3 else 1.0)
    out.gray.copy_(happens("gray_prob", rest + 9))
    sigma = between("sigma_low", "sigma_high", rest + 11)
    out.blur_sigma.copy_(torch.where(happens("blur_prob", rest + 10), sigma, 0.0))
    out.solarize_threshold.copy_(
        torch.where(happens("solarize_prob", rest + 12), number["solarize_threshold"], torch.inf)
    )
    out.affine.copy_(identity)
    if any(limits[_NAMES.index("affine_prob") :: len(_NAMES)]):
        matrix = _affine(u[..., rest + 14 :], number)
        out.affine.copy_(torch.where(happens("affine_prob", rest + 13).unsqueeze(2), matrix, out.affine))
    return table


def _crop(u: Tensor, sizes: Tensor, number: dict[str, Tensor]) -> Tensor:
    """[V, B, 4] as torchvision's RandomResizedCrop draws it: the first of ten that fit."""
    height, width = sizes[:, 0], sizes[:, 1]
    low, high = number["scale_low"].unsqueeze(2), number["scale_high"].unsqueeze(2)
    area = (low + u[..., :TRIES] * (high - low)) * (height * width).unsqueeze(1)
    low, high = number["log_ratio_low"].unsqueeze(2), number["log_ratio_high"].unsqueeze(2)
    root = (0.5 * (low + u[..., TRIES : 2 * TRIES] * (high - low))).exp()
    side = area.sqrt()
    h, w = (side / root).round(), (side * root).round()
    fits = (h >= 1) & (w >= 1) & (h <= height.unsqueeze(1)) & (w <= width.unsqueeze(1))
    first = fits.to(torch.uint8).argmax(2, keepdim=True)
    h, w, fits = (x.gather(2, first).squeeze(2) for x in (h, w, fits))
    ratio = width / height
    least, most = number["log_ratio_low"].exp(), number["log_ratio_high"].exp()
    whole_h = torch.where(ratio < least, (width / least).round(), height)
    whole_w = torch.where(ratio > most, (height * most).round(), width)
    keep = number["scale_low"] > 0  # otherwise all of the image
    h = torch.where(keep, torch.where(fits, h, whole_h.clamp(min=1)), height)
    w = torch.where(keep, torch.where(fits, w, whole_w.clamp(min=1)), width)
    free_h, free_w = height - h, width - w
    # rounded down from [0, free + 1), so that every place is as likely; the middle where none had fitted
    top = torch.where(fits, u[..., 2 * TRIES] * (free_h + 1), free_h / 2).floor()
    left = torch.where(fits, u[..., 2 * TRIES + 1] * (free_w + 1), free_w / 2).floor()
    return torch.stack([top, left, h, w], 2)


def _affine(u: Tensor, number: dict[str, Tensor]) -> Tensor:
    """[V, B, 6], the inverse of shift x rotation x shear x factor."""

    def symmetric(name: str, at: int) -> Tensor:
        return number[name] * (2 * u[..., at] - 1)

    angle, x, y = symmetric("degrees", 0), symmetric("shear", 1), symmetric("shear", 2)
    right, down = symmetric("shift_x", 3), symmetric("shift_y", 4)
    factor = number["affine_low"] + u[..., 5] * (number["affine_high"] - number["affine_low"])
    a, c = (angle - y).cos() / y.cos(), (angle - y).sin() / y.cos()  # the map's columns, with determinant 1
    b, d = -a * x.tan() - angle.sin(), -c * x.tan() + angle.cos()
    m = [d / factor, -b / factor, -c / factor, a / factor]
    return torch.stack(
        [m[0], m[1], -(m[0] * right + m[1] * down), m[2], m[3], -(m[2] * right + m[3] * down)], 2
    )


def _limits(spec: ViewSpec) -> dict[str, float]:
    """What a spec's numbers are drawn between."""
    degrees, shear, right, down, least, most = affine(spec)
    scale, jitter = spec.crop_scale or (0.0, 0.0), enumerate(spec.jitter)
    factors = [(-s, s) if i == 3 else (max(0.0, 1 - s), 1 + s) for i, s in jitter]
    return {
        "scale_low": scale[0], "scale_high": scale[1], "log_ratio_low": math.log(spec.crop_ratio[0]),
        "log_ratio_high": math.log(spec.crop_ratio[1]), "flip_prob": spec.flip_prob,
        "jitter_prob": spec.jitter_prob, "gray_prob": spec.gray_prob, "blur_prob": spec.blur_prob,
        "sigma_low": spec.blur_sigma[0], "sigma_high": spec.blur_sigma[1],
        "solarize_prob": spec.solarize_prob, "solarize_threshold": spec.solarize_threshold,
        "affine_prob": spec.affine_prob, "degrees": degrees, "shear": shear, "shift_x": right,
        "shift_y": down, "affine_low": least, "affine_high": most,
        **{f"jitter_low{i}": low for i, (low, _) in enumerate(factors)},
        **{f"jitter_high{i}": high for i, (_, high) in enumerate(factors)},
    }  # fmt: skip


_NAMES = list(_limits(ViewSpec(size=1)))


@functools.cache
def _constants(limits: tuple[float, ...], device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(each limit of all specs [V, 1], orders of the jitter, the affine map that does nothing), kept on the
    device: copying them there in each call would wait for it, and captured graphs read them."""
    table = torch.tensor(limits, dtype=torch.float64, device=device).view(-1, len(_NAMES))
    number = {name: table[:, i : i + 1] for i, name in enumerate(_NAMES)}
    orders = torch.tensor(_ORDERS, dtype=torch.float32, device=device)
    return number, orders, torch.tensor([1.0, 0, 0, 0, 1, 0], device=device)


# SplitMix64 (Steele, Lea and Flood 2014): a counter goes through a function that mixes all of its bits.

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _mix(x: Tensor) -> Tensor:
    """int64 numbers, taken for 64 bits without a sign."""
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _FIRST
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _SECOND
    return x ^ ((x >> 31) & (1 << 33) - 1)


def uniform(seed: Tensor, ids: Tensor, count: int) -> Tensor:
    """float64 [B, count] in [0, 1): a stream for each seed and id."""
    stream = _mix(_mix(seed + _STEP) + ids * _STEP)
    steps = torch.arange(1, count + 1, device=ids.device) * _STEP
    return ((_mix(stream.unsqueeze(1) + steps) >> 11) & (1 << 53) - 1).double() * 2.0**-53


# An op, so that compiled code draws the same numbers: torch.compile may fuse products and sums.
_draw_op = define(
    "draw_views(Tensor sizes, Tensor seed, Tensor ids, float[] limits) -> Tensor",
    _draw,
    lambda sizes, seed, ids, limits: sizes.new_empty(
        len(limits) // len(_NAMES), ids.shape[0], WIDTH, dtype=torch.float32
    ),
)
