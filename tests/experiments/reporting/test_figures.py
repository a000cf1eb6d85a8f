from xml.etree import ElementTree

from matplotlib.figure import Figure

from experiments.reporting.style import inline


def test_a_label_of_two_lines_leaves_the_picture_whole():
    figure = Figure()
    axes = figure.subplots()
    axes.set_ylabel("first\nsecond")
    svg = inline(figure, "it", "a description")
    assert ElementTree.fromstring(svg).get("aria-label") == "a description"
    assert ">first<" in svg and ">second<" in svg
    assert "font-family" not in svg
