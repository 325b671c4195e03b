"""Where a method comes from: what `kd-plugins info` prints and what a user cites."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_SKIPPED_TITLE_WORDS = {"a", "an", "the", "on", "in", "of", "for", "to", "and", "with", "towards", "via", "like"}


@dataclass(frozen=True)
class Paper:
    """The publication that a distiller implements.

    Args:
        title: As printed.
        authors: Full names, first name first.
        venue: Abbreviated, without the year: "ICLR", "NeurIPS Workshop"; "arXiv" for what appeared nowhere else.
        year: Of the venue, or of the first version where there is no venue.
        arxiv: Identifier without "arXiv:", such as "1707.01219".
        journal: Whether the venue is a journal and not a conference.

    >>> paper = Paper("Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    ...               ("Zehao Huang", "Naiyan Wang"), "arXiv", 2017, arxiv="1707.01219")
    >>> str(paper)
    'Huang & Wang, arXiv 2017'
    >>> paper.key
    'huang2017what'
    """

    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str | None = None
    journal: bool = False

    def __str__(self) -> str:
        last = [_last_name(author) for author in self.authors]
        who = " & ".join(last) if len(last) <= 2 else f"{last[0]} et al."
        return f"{who}, {self.venue} {self.year}"

    @property
    def url(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    @property
    def key(self) -> str:
        """Citation key: first author, year, first telling word of the title."""
        words = re.findall(r"\w+", _ascii(self.title).lower())
        word = next((word for word in words if word not in _SKIPPED_TITLE_WORDS), "")
        author = re.sub(r"\W", "", _ascii(_last_name(self.authors[0]))).lower() if self.authors else ""
        return f"{author}{self.year}{word}"

    @property
    def bibtex(self) -> str:
        preprint = self.venue.lower() in ("", "arxiv")
        entry = "misc" if preprint else "article" if self.journal else "inproceedings"
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(self.authors)}
        if not preprint:
            fields["journal" if self.journal else "booktitle"] = self.venue
        fields["year"] = str(self.year)
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        return "\n".join([f"@{entry}{{{self.key},", *(f"  {key} = {{{value}}}," for key, value in fields.items()), "}"])


def _last_name(author: str) -> str:
    """The family name, with its particles: "van den Oord" of "Aaron van den Oord"."""
    words = author.split()
    first = next((i for i, word in enumerate(words) if i and word[0].islower()), len(words) - 1)
    return " ".join(words[first:])


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
