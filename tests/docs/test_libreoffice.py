import pytest

from docs.scripts.libreoffice import aligned, main, split

PAGE = """<html><body><p>no id, no paragraph of the text</p>
<h1 id="hd_id1">{0} one two  three
 four <a href="x">five</a></h1>
<p id="par_id2">{0} few words</p><p id="par_id3">the same words in both languages</p>
<p id="par_id4">{0} a b c d e</p></body></html>"""


@pytest.fixture
def folders(tmp_path):
    for language in ("en", "de"):
        for page in ("a.html", "deep/b.html"):
            path = tmp_path / language / page
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(PAGE.format(f"{language}-{page[-6]}"), encoding="utf-8")
    (tmp_path / "en" / "alone.html").write_text(PAGE.format("x"))
    return tmp_path / "en", tmp_path / "de"


def test_paragraphs_of_one_id_are_pairs(folders):
    found = aligned(*folders)
    assert [page for page, _, _ in found] == ["a.html"] * 2 + ["deep/b.html"] * 2
    (_, english, german), (_, other, _) = found[:2]
    assert english.split()[1:] == ["one", "two", "three", "four", "five"] == german.split()[1:]
    assert english != german and other.endswith("a b c d e")  # short and equal ones are left out


def test_a_page_is_on_one_side_and_held_out_text_is_not_learned():
    pages = [(f"page{i}", f"s{i}", f"t{i}") for i in range(2000)]
    copies = [(f"other{i}", f"s{i}", "another translation") for i in range(2000)]
    sides = split(pages + copies + pages)
    sources = {name: {source for source, _ in pairs} for name, pairs in sides.items()}
    assert all(sources.values())
    assert not sources["train"] & (sources["test"] | sources["valid"])
    assert not sources["test"] & sources["valid"]
    assert all(len(pairs) == len(set(pairs)) for pairs in sides.values())
    assert 30 < len(sources["test"]) < 300 and len(sources["train"]) > 1500


def test_folders_without_pages_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path), str(tmp_path / "gone"), str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and "no .html page" in error
    assert not (tmp_path / "out").exists()
