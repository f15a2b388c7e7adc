"""The report in a browser: it loads from disk alone, and computes what the layer computes."""

import pytest
import torch
from browser import Hostile, open_page
from letters import Letters

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.regimes import contributions
from hf_kernel_ffn.reading.report import other_mixtures, report_data, write_report

SLIDE = """(slider, value) => {
    slider.value = value;
    slider.dispatchEvent(new Event('input'));
}"""


@pytest.fixture(scope="module")
def passes(llama, ids):
    """A student whose prototypes all fire, its trace, and its teacher's."""
    student, _ = convert(llama, KernelFFNConfig(kernel="yat"), calibration_ids=ids, copy=True)
    return student, trace(student, Hostile(), ids[0, :20]), trace(llama, Hostile(), ids[0, :20])


@pytest.fixture(scope="module")
def page(passes, tmp_path_factory):
    """The page, open; what it logged and asked for is in ``page.noted``."""
    student, passed, teacher = passes
    file = tmp_path_factory.mktemp("report") / "page.html"
    write_report(
        file,
        report_data(passed, teacher, tokenizer=Hostile(), alternatives=other_mixtures(passed, 3)),
    )
    with open_page(file) as page:
        yield page


@pytest.fixture(autouse=True)
def nothing_noted(request):
    yield
    if "page" in request.fixturenames:
        assert request.getfixturevalue("page").noted == []


def numbers(page, panel):
    return [
        float(text.rstrip("%")) for text in page.locator(f"{panel} .row .number").all_inner_texts()
    ]


def test_it_loads_and_hostile_tokens_stay_text(page):
    assert page.title() == "What the FFNs wrote" and page.locator("img").count() == 0
    assert page.locator("td button").count() == 3 * 20
    assert "onerror" in page.locator("#prompt").inner_text()


def test_a_click_shows_the_mixture(page, passes):
    _, passed, teacher = passes
    page.click("#cell-1-5")
    path = list(passed.ffn_inputs)[1]
    part, unit = contributions(passed.ffn(path), 5)[0], contributions(teacher.ffn(path), 5)[0]
    rows = page.locator("#student-panel .row")
    shares = {part.name: part.share for part in contributions(passed.ffn(path), 5)}
    shown = dict(
        zip(
            page.locator("#student-panel .row .name").all_inner_texts(),
            numbers(page, "#student-panel"),
        )
    )
    assert rows.count() > 10 and part.name in shown
    for name in list(shown)[:10]:
        assert shown[name] == pytest.approx(100 * shares[name], abs=0.06)
    signed = dict(
        zip(
            page.locator("#teacher-panel .row .name").all_inner_texts(),
            page.locator("#teacher-panel .number").all_inner_texts(),
        )
    )
    assert unit.name in signed and not signed[unit.name].endswith("%")
    assert "no shares" in page.locator("#teacher-panel p").inner_text()
    assert "token 5" in page.locator("#where").inner_text()


def test_the_keyboard_moves_between_cells(page):
    page.click("#cell-1-5")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.id") == "cell-2-6"
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.id") == "cell-2-0"
    assert page.get_attribute("#cell-2-0", "aria-selected") == "true"


def test_the_temperature_remixes(page):
    page.click("#cell-0-9")
    own = float(page.get_attribute("#tau", "data-effective"))
    bars = numbers(page, "#student-panel")
    found = []
    for value in ("-3", "3"):
        page.locator("#tau").evaluate(
            SLIDE,
            value,
        )
        found.append(float(page.get_attribute("#tau", "data-effective")))
        assert numbers(page, "#student-panel") != bars
    assert found[0] == pytest.approx(1, abs=0.05) and found[0] < own < found[1]
    assert "global mean" in page.locator("#tau-text").inner_text()
    page.click("#tau-reset")
    assert float(page.get_attribute("#tau", "data-effective")) == own


def test_other_decompositions_leave_the_output_where_it_is(page):
    page.click("#cell-2-19")
    bars = numbers(page, "#student-panel")
    assert page.is_enabled("#alt")
    for value in (0.5, 1, 1.7):
        page.locator("#alt").evaluate(
            SLIDE,
            str(value),
        )
        assert numbers(page, "#student-panel") != bars
        assert float(page.get_attribute("#alt", "data-moved")) < 1e-5
        assert "moved by 0.0000" in page.locator("#alt-text").inner_text()
    page.click("#cell-2-4")
    assert page.is_disabled("#alt") and numbers(page, "#student-panel") != bars


def test_dragging_the_query_moves_the_readout(page, passes):
    student, passed, _ = passes
    page.click("#cell-1-3")
    page.locator("#left").scroll_into_view_if_needed()
    box = page.locator("#left").bounding_box()
    before = page.get_attribute("#right", "data-x")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2 - 25, steps=4)
    page.mouse.up()
    page.focus("#left")
    page.keyboard.press("ArrowLeft")
    a, b = (float(page.get_attribute("#left", f"data-{name}")) for name in "ab")
    assert page.get_attribute("#right", "data-x") != before
    # The same point through the layer itself, and its output in the picture's plane.
    path = list(passed.ffn_inputs)[1]
    x, record = passed.ffn_inputs[path].double(), passed.ffn(path)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2]
    outputs = record.coefficients.double() @ record.dictionary.double()
    plane = torch.linalg.svd(outputs - outputs.mean(0), full_matrices=False).Vh[:2]
    written = []
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):  # of principal directions, which are free
        point = x.mean(0) + a * signs[0] * axes[0] + b * signs[1] * axes[1]
        found = student.kernel_ffns()[path].readout(point[None].float())
        written.append((found.coefficients.double() @ found.dictionary.double() @ plane.T)[0].abs())
    shown = torch.tensor(
        [abs(float(page.get_attribute("#right", f"data-{name}"))) for name in "xy"]
    )
    assert any(torch.allclose(shown.double(), point, rtol=2e-3, atol=1e-3) for point in written)


def test_light_and_dark(page):
    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = background()
    page.emulate_media(color_scheme="dark")
    assert background() != light
    page.click("#theme")
    assert background() == light
    page.click("#theme")


@pytest.mark.slow
def test_it_stays_small(make_teacher, ids, tmp_path):
    """12 layers, 12 heads, 3072 prototypes each, 64 tokens."""
    wide = make_teacher("gpt2", n_layer=12, n_head=12, n_embd=48, n_inner=3072, n_positions=64)
    student, _ = convert(wide, KernelFFNConfig(), calibration_ids=ids[:4].repeat(1, 2))
    passed = trace(student, Letters(), torch.cat([ids[0], ids[1]]))
    write_report(
        tmp_path / "page.html",
        report_data(passed, trace(wide, Letters(), passed.ids), tokenizer=Letters()),
    )
    assert 1e5 < (tmp_path / "page.html").stat().st_size < 5e6


def test_what_does_not_belong_together(passes, gpt2, ids):
    _, passed, _ = passes
    with pytest.raises(InputError, match="expected the same"):
        report_data(passed, trace(gpt2, Letters(), ids[1]))
    with pytest.raises(InputError, match="expected paths among"):
        report_data(passed, alternatives={"nowhere": torch.ones(1, 1)})
    path = list(passed.ffn_inputs)[0]
    with pytest.raises(InputError, match="expected nonnegative shares"):
        report_data(passed, alternatives={path: torch.ones(2, 3)})
