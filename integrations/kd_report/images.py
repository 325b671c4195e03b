"""Small PNG pictures as data URIs, without any imaging library."""

from __future__ import annotations

import base64
import struct
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["heat", "rgb", "shade"]

# Anchors of a dark-to-bright palette whose lightness rises evenly; readable on white and on black.
_HEAT = ((38, 30, 74), (46, 62, 138), (42, 104, 158), (38, 146, 152), (92, 184, 120), (188, 212, 92), (250, 236, 150))
# The accent in a tone between its two themes; how much of it is seen is the value.
_SHADE = (72, 112, 214)


def rgb(image: Tensor) -> str:
    """A picture as a data URI.

    Args:
        image: `[3, H, W]`, 0 to 255.
    """
    _, height, width = image.shape
    rows = image.byte().permute(1, 2, 0).contiguous().view(height, width * 3)
    return _png(width, height, 2, [bytes(row) for row in rows.tolist()])


def heat(values: Tensor) -> str:
    """A map in colours as a data URI, scaled from its minimum to its maximum.

    Args:
        values: `[H, W]`.
    """
    values = values.float()
    low, high = values.min(), values.max()
    return _indexed((values - low) / (high - low).clamp_min(1e-12), _heat_palette(), None)


def shade(values: Tensor, full: float) -> str:
    """A map in one colour that is the more opaque the larger the value, so that it suits a light and a dark page.

    Args:
        values: `[H, W]`, from 0.
        full: The value that is opaque.
    """
    return _indexed(values.float() / max(full, 1e-12), bytes(_SHADE) * 256, bytes(range(256)))


def _indexed(unit: Tensor, palette: bytes, alpha: bytes | None) -> str:
    height, width = unit.shape
    rows = (unit.clamp(0, 1) * 255).round().int().tolist()
    extra = [(b"PLTE", palette)] + ([(b"tRNS", alpha)] if alpha is not None else [])
    return _png(width, height, 3, [bytes(row) for row in rows], extra)


@lru_cache(maxsize=1)
def _heat_palette() -> bytes:
    colours = bytearray()
    for i in range(256):
        place = i / 255 * (len(_HEAT) - 1)
        k = min(int(place), len(_HEAT) - 2)
        colours += bytes(round(a + (b - a) * (place - k)) for a, b in zip(_HEAT[k], _HEAT[k + 1], strict=True))
    return bytes(colours)


def _png(width: int, height: int, kind: int, rows: list[bytes], extra: list[tuple[bytes, bytes]] | None = None) -> str:
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    chunks = [(b"IHDR", header), *(extra or []), (b"IDAT", data), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
