"""The page of a graph in a browser: it loads from disk alone, and what is pinned can be saved."""

import json

import pytest
import torch
from browser import Hostile, open_page
from letters import Letters

from hf_kernel_ffn import convert
from hf_kernel_ffn.reading.contexts import contexts
from hf_kernel_ffn.reading.graph import attribution_graph, group, label, prune, write_page
from hf_kernel_ffn.reading.graph.page import page_data


@pytest.fixture(scope="module")
def graph(make_teacher, ids):
    student, _ = convert(make_teacher("gpt2"), calibration_ids=ids, copy=True)
    whole = attribution_graph(student, Hostile(), ids[0, :12], nodes=40, heads=True)
    found = contexts(student, ids.split(4), top=2)
    labelled = label(prune(whole, 0.9), student, Hostile(), found)
    units = [node.id for node in labelled.nodes if node.kind == "unit"]
    return group(labelled, "by hand", units[:2])


@pytest.fixture(scope="module")
def opened(graph, tmp_path_factory):
    """The page, open; what it logged and asked for is in ``noted``."""
    file = tmp_path_factory.mktemp("graph") / "page.html"
    write_page(file, graph)
    with open_page(file) as page:
        page.file = file
        yield page


@pytest.fixture
def page(opened):
    """The page as it opens."""
    opened.goto(opened.file.as_uri())
    yield opened
    assert opened.noted == []


def place_of(graph, kind):
    return next(place for place, node in enumerate(graph.nodes) if node.kind == kind)


def shown(graph):
    return [node for node in graph.nodes if node.kind != "bias"]


def box(page, selector):
    found = page.locator(selector).bounding_box()
    return found["x"] + found["width"] / 2, found["y"] + found["height"] / 2


def drag(page, start, end):
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    page.mouse.move(*end)
    page.mouse.up()


def test_the_data_are_the_graphs(graph):
    data = page_data(graph)
    assert len(data["nodes"]) == len(graph.nodes)
    for target, source, weight in data["edges"]:
        assert weight == pytest.approx(graph.edges[target, source].item(), rel=1e-3)
    assert len(data["edges"]) == int((graph.edges != 0).sum())
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_it_loads_and_hostile_tokens_stay_text(page, graph):
    assert page.title() == "Which made which" and page.locator("img").count() == 0
    assert page.locator(".node").count() == len(shown(graph))
    page.check("#biases")
    assert page.locator(".node").count() == len(graph.nodes)
    assert "attention patterns" in page.locator("#held").inner_text()
    assert page.locator("#details .row").count() == graph.logits


def test_a_click_shows_what_went_in(page, graph):
    place = place_of(graph, "logit")
    page.click(f"#node-{place}")
    row = graph.edges[place]
    rows = page.locator("#details .section").first.locator(".row")
    assert rows.count() == int((row != 0).sum()) + 1
    numbers = [float(text) for text in rows.locator(".number").all_inner_texts()]
    assert sum(numbers) == pytest.approx(graph.nodes[place].value, rel=0.02, abs=0.02)
    largest = row[row.abs().argmax()].item()
    assert numbers[0] == pytest.approx(largest, rel=0.01)
    rows.first.click()
    assert "Where it went" in page.locator("#details").inner_text()


def test_a_unit_has_its_words_and_contexts(page, graph):
    place = place_of(graph, "unit")
    page.click(f"#node-{place}")
    text = page.locator("#details").inner_text()
    assert f"unit {graph.nodes[place].name}" in text and "promotes" in text
    assert page.locator("#details .context").count() == len(graph.contexts[place]) > 0
    page.keyboard.press("Escape")
    assert "Next tokens" in page.locator("#details").inner_text()


def test_search(page, graph):
    name = graph.nodes[place_of(graph, "unit")].name
    page.fill("#search", f"unit {name}")
    hits = [
        place
        for place, node in enumerate(graph.nodes)
        if node.kind == "unit" and f"unit {node.name}".startswith(f"unit {name}")
    ]
    assert page.locator(".node.found").count() == len(hits)
    assert page.locator("#hits").inner_text() == f"{len(hits)} of {len(shown(graph))}"


def test_pinning_grouping_and_saving(page, graph):
    assert page.locator(".pin.super").count() == 1  # the supernode that the graph came with
    logit = place_of(graph, "logit")
    page.click(f"#node-{logit}")
    page.keyboard.press("p")
    assert page.locator("#board .pin").count() == 2
    embedding = place_of(graph, "embedding")
    page.locator(f"#node-{embedding}").scroll_into_view_if_needed()
    left, top = (
        page.locator("#board").bounding_box()["x"],
        page.locator("#board").bounding_box()["y"],
    )
    drag(page, box(page, f"#node-{embedding}"), (left + 700, top + 200))
    assert page.locator("#board .pin").count() == 3

    drag(page, box(page, "#pin-2"), box(page, "#pin-0"))
    assert page.locator("#board .pin").count() == 2
    page.fill("#name", "mine")
    with page.expect_download() as saving:
        page.click("#save")
    saved = json.loads(saving.value.path().read_text())
    by_name = {pin["name"]: [node["id"] for node in pin["nodes"]] for pin in saved["pinned"]}
    members = [graph.nodes[place].id for place in graph.supernodes[0].nodes]
    assert by_name["mine"] == [*members, graph.nodes[embedding].id]
    sources = [*graph.supernodes[0].nodes, embedding]
    expected = sum(graph.edges[logit, source].item() for source in sources)
    weights = [link["weight"] for link in saved["links"]]
    assert any(weight == pytest.approx(expected, rel=0.01) for weight in weights)

    page.click("#apart")
    assert page.locator("#board .pin").count() == 4
    page.click(f"#node-{logit}")
    page.click("#pin")
    assert page.locator("#board .pin").count() == 3


@pytest.mark.parametrize("most", [8, 60])
def test_pinned_cards_stand_apart(page, graph, most):
    for place, _ in list(enumerate(shown(graph)))[:most]:
        page.evaluate(f"pinNode({place})")
    page.evaluate("mark()")
    if most > 8:  # more than the board has room for: the rest is reached by scrolling
        assert page.locator("#board .pin").count() > 25
        page.locator("#board .pin").last.scroll_into_view_if_needed()
        assert page.evaluate("$('board').scrollTop") > 0
        lowest = page.evaluate("boardHeight()")
        assert page.evaluate("$('board').querySelector('svg').clientHeight") == lowest
    boxes = [card.bounding_box() for card in page.locator("#board .pin").all()]
    overlaps = 0
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            wide = min(one["x"] + one["width"], other["x"] + other["width"]) - max(
                one["x"], other["x"]
            )
            high = min(one["y"] + one["height"], other["y"] + other["height"]) - max(
                one["y"], other["y"]
            )
            overlaps += wide > 0 and high > 0
    assert overlaps == 0


def test_a_graph_without_labels_has_a_page_too(make_teacher, ids, tmp_path):
    graph = attribution_graph(make_teacher("llama"), Letters(), ids[0, :4], nodes=5)
    write_page(tmp_path / "deep" / "page.html", graph)
    assert "Which made which" in (tmp_path / "deep" / "page.html").read_text()
    assert torch.isfinite(graph.edges).all()
