"""Which layer of a deep network a layer of a shallow one stands for."""

from __future__ import annotations

from kd_plugins.errors import DistillError


def uniform(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """The last teacher layer of the block that each student layer stands for.

    >>> uniform(3, 12)
    {1: 4, 2: 8, 3: 12}
    """
    if student_layers > teacher_layers:
        raise DistillError(
            f"internal needs a teacher at least as deep as the student, got {teacher_layers} layers for"
            f" {student_layers}."
        )
    return {i: round(i * teacher_layers / student_layers) for i in range(1, student_layers + 1)}


def pairs_of(text: str) -> dict[int, int]:
    """The teacher layer of each student layer, written as `1:2,2:4`.

    >>> pairs_of("2:4,1:2")
    {1: 2, 2: 4}
    """
    try:
        pairs = sorted((int(s), int(t)) for s, t in (pair.split(":") for pair in text.split(",")))
    except ValueError:
        raise DistillError(f"Expected layers as 'uniform' or as pairs such as '1:2,2:4', got {text!r}.") from None
    if len(dict(pairs)) < len(pairs):
        raise DistillError(f"Expected one teacher layer for each student layer, got {text!r}: leave the others out.")
    return dict(pairs)
