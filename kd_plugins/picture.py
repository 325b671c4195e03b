"""What a method shows of itself in the report of a run."""

from __future__ import annotations

import base64
import dataclasses
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """One picture: what `Distiller.pictures()` returns, what the record of a run keeps, what its report draws.

    Attributes:
        kind: What the report draws.
        title: Heading of the picture.
        caption: What it shows, in words; the same words of neighbours are written once.
    """

    kind: ClassVar[str]
    title: str

    def to_json(self) -> dict[str, Any]:
        """The picture as JSON values."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}


@dataclass(frozen=True)
class Bars(Picture):
    """Bars from 0.

    Attributes:
        values: Name and length of each.
        mark: A line to compare with.
    """

    kind = "bars"
    values: Sequence[tuple[str, float]]
    mark: float | None = None
    caption: str = ""


@dataclass(frozen=True)
class Heatmap(Picture):
    """A matrix of numbers.

    Attributes:
        values: One list for each row.
        rows: Names of the rows.
        columns: Names of the columns.
        row_label: What the rows are.
        column_label: What the columns are.
        signed: Two colours, for values below and above 0.
    """

    kind = "heatmap"
    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str = ""
    column_label: str = ""
    signed: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Images(Picture):
    """Rows of small images.

    Attributes:
        rows: Images `[3, H, W]` of each row, from 0 to 255, by the row's name.
    """

    kind = "images"
    rows: Mapping[str, Sequence[Tensor]]
    caption: str = ""

    def to_json(self) -> dict[str, Any]:
        rows = {name: [png(image) for image in images] for name, images in self.rows.items()}
        return {**super().to_json(), "rows": rows}


@dataclass(frozen=True)
class Points(Picture):
    """Points in a plane.

    Attributes:
        groups: Pairs (x, y) of each group, by its name; at most eight groups.
    """

    kind = "points"
    groups: Mapping[str, Sequence[tuple[float, float]]]
    caption: str = ""


def png(image: Tensor) -> str:
    """An image `[3, H, W]`, from 0 to 255, as the data URI of a PNG file."""
    _, height, width = image.shape
    rows = image.detach().byte().cpu().movedim(0, 2).reshape(height, width * 3).tolist()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return "data:image/png;base64," + base64.b64encode(file).decode()
