"""English–German text out of LibreOffice's help pages, for measuring (MPL-2.0; not kept here).

    python -m docs.scripts.libreoffice EN_FOLDER DE_FOLDER OUT_FOLDER

The folders are `usr/share/libreoffice/help/en-US` and `…/de` of Debian's packages
`libreoffice-help-en-us` and `libreoffice-help-de`, as `dpkg-deb -x` unpacks them. A paragraph has
the same id in both languages, so the alignment is exact. Written are `train.en`, `train.de` and the
same of `valid` and `test`: a page lies on one side, and what stands on the validation or test side
as source or as target is not trained on.
"""

import hashlib
import html.parser
import sys
from pathlib import Path

from experiments.errors import UserError

TEST, VALID = range(0, 4), range(4, 7)  # of 100 buckets of pages
FEWEST_WORDS = 5  # on both sides: shorter ones are labels
_TAGS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}


class _Paragraphs(html.parser.HTMLParser):
    """The text of each paragraph and heading that has an id, whitespace evened out."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self._id, self._tag, self._parts = None, "", []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        name = dict(attributes).get("id") or ""
        if tag in _TAGS and name.startswith(("par_id", "hd_id")):
            self._id, self._tag, self._parts = name, tag, []

    def handle_endtag(self, tag: str) -> None:
        if self._id and tag == self._tag:
            self.texts.setdefault(self._id, " ".join("".join(self._parts).split()))
            self._id = None

    def handle_data(self, data: str) -> None:
        self._parts.append(data)


def _paragraphs(path: Path) -> dict[str, str]:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.texts


def aligned(english: Path, german: Path) -> list[tuple[str, str, str]]:
    """(page, English, German) for each paragraph that both have and that is not the same in both.

    Raises UserError where a folder has no pages.
    """
    pages = sorted(p.relative_to(english) for p in english.rglob("*.html"))
    pages = [page for page in pages if (german / page).is_file()]
    if not pages:
        raise UserError(f"{english} and {german} have no .html page in common")
    found = []
    for page in pages:
        ours, theirs = _paragraphs(english / page), _paragraphs(german / page)
        found += [
            (page.as_posix(), text, theirs[name])
            for name, text in ours.items()
            if name in theirs and text != theirs[name]
            and min(len(text.split()), len(theirs[name].split())) >= FEWEST_WORDS
        ]  # fmt: skip
    return found


def split(found: list[tuple[str, str, str]]) -> dict[str, list[tuple[str, str]]]:
    """train, valid and test: each pair once, and on no two sides a source or a target."""
    sides: dict[str, dict[tuple[str, str], None]] = {"test": {}, "valid": {}, "train": {}}
    for page, source, target in found:
        bucket = int.from_bytes(hashlib.sha256(page.encode()).digest()[:8], "big") % 100
        side = "test" if bucket in TEST else "valid" if bucket in VALID else "train"
        sides[side][source, target] = None
    held_out: set[str] = set()
    kept = {}
    for name, pairs in sides.items():  # test first: it keeps all its pairs
        kept[name] = [pair for pair in pairs if not held_out & set(pair)]
        held_out.update(text for pair in kept[name] for text in pair)
    return kept


def main(arguments: list[str]) -> None:
    """Writes the six files, and says how many pairs each side has."""
    if len(arguments) != 3:
        print(__doc__)
        sys.exit(2)
    english, german, out = map(Path, arguments)
    try:
        found = aligned(english, german)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    for name, pairs in split(found).items():
        for language, side in (("en", 0), ("de", 1)):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            (out / f"{name}.{language}").write_text(text, encoding="utf-8")
        print(f"{name}: {len(pairs):,} pairs")


if __name__ == "__main__":
    main(sys.argv[1:])
