"""The page of a run, as a real browser shows it."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from flows.engine import InlineEngine
from flows.params import Params, load_params
from flows.report.inputs import ReportInputs
from flows.report.page import render_page
from flows.report.provenance import command_line
from flows.report.write import read_inputs
from flows.session import Session
from flows.stages import STAGES, run_all
from flows.workspace import Workspace
from surgeon.store import Reference
from tests.flows.browser import Browser, open_browser
from tests.flows.project import Project, slow

HOSTILE = "<img src=x onerror=\"alert('model')\">"
CLOSING = "</style></title><script>alert('sample')</script>"
NARROW = 360
"""Width of a small phone."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


def inputs_of(project: Project) -> ReportInputs:
    """What the page of a finished project is made from."""
    session = Session(Params.model_validate(project.params), Workspace(project.root), InlineEngine())
    references = {name: Reference.from_json(value) for name, value in project.read("manifest.json").items()}
    timings = {name: project.read(f"timings/{name}.json") for name in STAGES}
    return read_inputs(session, project.results(), references, timings)


def page_of(project: Project) -> Path:
    return project.data / "report" / "index.html"


def written(folder: Path, inputs: ReportInputs) -> Path:
    page = folder / "index.html"
    page.write_text(render_page(inputs), encoding="utf-8")
    return page


def with_blocks(inputs: ReportInputs, n_blocks: int) -> ReportInputs:
    """The same as if the model had more blocks."""
    block = [linear for linear in inputs.anatomy.linears if linear.block == 0]
    linears = [replace(linear, block=b) for b in range(n_blocks) for linear in block]
    return replace(inputs, anatomy=replace(inputs.anatomy, linears=linears))


def test_needs_nothing_but_itself(finished: Project, browser: Browser) -> None:
    page = page_of(finished)
    browser.requests(), browser.complaints()
    browser.open(page)
    assert browser.complaints() == []
    assert {url for url in browser.requests() if not url.startswith("data:")} == {page.as_uri()}
    text = page.read_text()
    assert not re.search(
        r"https?:|//|@import|<script|\bon\w+=", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    )
    assert "default-src 'none'" in text


def test_same_inputs_give_the_same_bytes(finished: Project) -> None:
    """The page was written by another process."""
    assert render_page(inputs_of(finished)) == page_of(finished).read_text(encoding="utf-8")


def test_numbers_are_those_of_the_run(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished))
    results = finished.results()
    dense, pruned = results["dense"], results["pruned"]
    removed = f"{100 * pruned['sparsity']:.1f}%"
    assert browser.texts("h1") == [f"{removed} of the decoder weights removed"]
    values = browser.texts(".tile .value")
    assert values[:2] == [removed, f"\N{MULTIPLICATION SIGN}{pruned['perplexity'] / dense['perplexity']:.2f}"]
    smaller = round(100 * (1 - results["export"]["bytes"] / results["export"]["bytes_dense"]))
    assert values[2] == f"\N{MINUS SIGN}{smaller}%"
    rows = browser.rows("table.result")
    assert rows[1][1:3] == [f"{dense['perplexity']:.2f}", f"{pruned['perplexity']:.2f}"]
    assert ["non-zero parameters", f"{dense['nonzero']:,}", f"{pruned['nonzero']:,}"] in [row[:3] for row in rows]
    shots = [row[:4] for row in browser.rows("#shots table")[2:]]
    assert shots == [
        [str(s["shot"]), f"{s['target']:.2%}", f"{s['sparsity']:.2%}", f"{s['perplexity']:,.2f}"]
        for s in results["shots"]
    ]
    stages = browser.rows("#time table")[1:]
    assert [row[0] for row in stages] == list(STAGES)
    assert sum(int(row[3]) for row in stages) == results["tasks"]["executed"]


def test_maps_show_every_linear(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished))
    anatomy = inputs_of(finished).anatomy
    rows = browser.rows("#where table.map")
    assert rows[0] == ["block", "0", "1", "2", "all"]
    shown = {(row[0], block): row[1 + block] for row in rows[1:8] for block in range(3)}
    assert len(shown) == len(anatomy.linears) == 21
    for linear in anatomy.linears:
        gone = 100 * (1 - linear.live_rows * linear.live_columns / (linear.n_out * linear.n_in))
        assert float(shown[linear.linear, linear.block]) == pytest.approx(gone, abs=0.5)
    assert rows[8][0] == "all"
    assert float(rows[8][4]) == pytest.approx(100 * finished.results()["pruned"]["sparsity"], abs=0.5)
    kinds = browser.rows("table.kinds")[1:]
    removed = sum(int(row[3].replace(",", "")) for row in kinds)
    assert removed == round(finished.results()["pruned"]["sparsity"] * finished.results()["dense"]["linear_weights"])
    # The more is gone, the further on the scale.
    steps = browser.run(
        "return [...document.querySelectorAll('#where table.map tbody td')]"
        ".map(td => [Number(td.textContent), Number(td.className.match(/s(\\d+)/)[1])])"
    )
    assert [step for _, step in sorted(steps)] == sorted(step for _, step in steps)
    assert len({step for _, step in steps}) > 3


def test_plots_show_and_say_what_they_show(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished))
    plots = browser.run("""
        return [...document.querySelectorAll("svg.plot")].map(svg => {
          const box = svg.getBoundingClientRect();
          const named = svg.getAttribute("aria-labelledby").split(" ").map(id => document.getElementById(id));
          const lines = [...svg.querySelectorAll("path")].filter(p => getComputedStyle(p).fill === "none");
          return [box.width, box.height, named.map(e => svg.contains(e) && e.textContent),
                  Math.max(...lines.map(l => l.getBBox().width)), svg.getAttribute("role"),
                  svg.closest("section").querySelectorAll("table").length];
        });""")
    assert len(plots) == 2
    for width, height, (title, description), longest, role, n_tables in plots:
        assert width > 300 and height > 200 and longest > 100
        assert role == "img" and title and n_tables
        assert description
    curve = plots[0][2][1]
    for shot in finished.results()["shots"]:
        assert f"{shot['sparsity']:.1%} removed, {shot['perplexity']:,.2f}" in curve
    duplicates = (
        "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    )
    assert browser.run(duplicates) == 0


def test_spectra_are_those_of_the_factors(finished: Project, browser: Browser) -> None:
    """Sizes, ranks and condition numbers beside the plot are those that `surgeon inspect` computes."""
    browser.open(page_of(finished))
    browser.run("document.querySelector('#curvature details').open = true")
    shown = {(row[0], row[1]): row[2:] for row in browser.rows("#curvature details table")[1:]}
    assert {name.split(",")[0] for name, _ in shown} == {"0", "1", "2"}
    assert len(shown) == 2 * 21
    spectra = inputs_of(finished).spectra[1]["mlp.down_proj"]["A"]
    row = shown["1, mlp.down_proj", "inputs"]
    assert row[0] == str(len(spectra.values))
    assert float(row[1]) == pytest.approx(spectra.effective_rank(), abs=0.5)
    damped = (spectra.values[-1] + 0.01 * spectra.values.mean()) / (spectra.values[0] + 0.01 * spectra.values.mean())
    damping = finished.results()["provenance"]["parameters"]["prune"]["damping"]["activations"]
    assert damping == 0.01
    assert float(row[3].replace(",", "")) == pytest.approx(damped, rel=5e-3)


def test_fits_a_phone(finished: Project, browser: Browser, tmp_path: Path) -> None:
    """The page does not scroll sideways; wide tables and plots do, each in its box."""
    browser.open(written(tmp_path, with_blocks(inputs_of(finished), 48)), width=NARROW)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [NARROW, NARROW]
    wide = browser.run(
        "return [...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth)"
        ".map(b => b.getAttribute('aria-label'))"
    )
    assert any(label.startswith("Percent of the weights removed") for label in wide)
    assert "Plot of the spectra" in wide
    heading = "return document.querySelector('#where .scroll tbody th').getBoundingClientRect().left"
    before = browser.run(heading)
    browser.run("document.querySelector('#where .scroll').scrollLeft = 300")
    assert browser.run(heading) == pytest.approx(before, abs=3), "kinds of linears stay in view"


@pytest.mark.parametrize("width", [NARROW, 1200])
def test_themes(finished: Project, browser: Browser, width: int) -> None:
    grounds = []
    for dark in (False, True):
        browser.open(page_of(finished), width=width, dark=dark)
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
        contrasts = browser.contrasts()
        assert len(contrasts) > 400
        assert contrasts[0][0] >= 4.5, contrasts[:5]
    assert grounds[0] != grounds[1]


def test_every_step_of_the_scales_can_be_read(finished: Project, browser: Browser, tmp_path: Path) -> None:
    inputs = inputs_of(finished)
    linear = inputs.anatomy.linears[0]
    linears = [
        replace(linear, block=b, n_live=round(linear.n_out * linear.n_in * (1 - b / 20)), update_size=b / 20)
        for b in range(21)
    ]
    page = written(tmp_path, replace(inputs, anatomy=replace(inputs.anatomy, linears=linears)))
    for dark in (False, True):
        browser.open(page, dark=dark)
        grounds = browser.run(
            "return [...document.querySelectorAll('#where .map tbody td, #updates .map tbody td')]"
            ".map(td => getComputedStyle(td).backgroundColor)"
        )
        assert len(set(grounds)) == 1 + 2 * 10
        assert browser.contrasts()[0][0] >= 4.5, browser.contrasts()[:5]


def test_keyboard_reaches_everything(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished), width=NARROW)
    expected = browser.run("return document.querySelectorAll('a, summary, .scroll, pre').length")
    hidden = browser.run("return document.querySelectorAll('details:not([open]) .scroll').length")
    reached = []
    for _ in range(expected - hidden):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(
            browser.run(
                "const e = document.activeElement, s = getComputedStyle(e), b = e.getBoundingClientRect();"
                "return [e.tagName, e.className, s.outlineStyle, parseFloat(s.outlineWidth),"
                " b.bottom > 0 && b.top < 900];"
            )
        )
    assert reached[0][:2] == ["A", "skip"]
    names = [name for name, *_ in reached]
    assert names.count("SUMMARY") == browser.run("return document.querySelectorAll('summary').length") > 3
    assert names.count("PRE") == 1
    assert [style for _, style, *_ in reached].count("scroll") > 6
    assert {outline for *_, outline, _, _ in reached} == {"solid"}
    assert all(thickness >= 2 and in_view for *_, thickness, in_view in reached)
    browser.driver.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
    assert browser.run("return document.querySelector('details').open")


def test_skip_link_leads_to_the_results(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished))
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "main"
    targets = browser.run("return [...document.querySelectorAll('nav a')].map(a => document.querySelector(a.hash)?.id)")
    assert targets == browser.run("return [...document.querySelectorAll('section')].map(s => s.id)")


def test_headings_form_an_outline(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished))
    levels = [
        int(tag[1]) for tag in browser.run("return [...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")
    ]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_print_shows_what_is_folded_away(finished: Project, browser: Browser) -> None:
    browser.open(page_of(finished))
    ground = browser.run("return getComputedStyle(document.querySelector('.tile')).backgroundColor")
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [dark]})
    assert browser.run("return getComputedStyle(document.querySelector('.tile')).backgroundColor") == ground
    shown = "return [...document.querySelectorAll('details table')].filter(t => t.checkVisibility()).length"
    assert browser.run(shown) == browser.run("return document.querySelectorAll('details table').length") > 3
    assert not browser.run("return document.querySelector('nav').checkVisibility()")


def test_hostile_texts_do_no_harm(finished: Project, browser: Browser, tmp_path: Path) -> None:
    inputs = inputs_of(finished)
    results = json.loads(json.dumps(inputs.results))
    results["provenance"]["model"]["source"] = HOSTILE
    results["provenance"]["calibration"]["source"] = CLOSING
    results["samples"]["pruned"] = {"prompt": CLOSING, "continuation": f"{HOSTILE} $x$ & <b>"}
    results["export"]["why_not_stock"] = HOSTILE
    linears = [replace(linear, linear=HOSTILE + linear.linear) for linear in inputs.anatomy.linears]
    spectra = {b: {HOSTILE + name: sides for name, sides in block.items()} for b, block in inputs.spectra.items()}
    params = inputs.params.model_copy(update={"model": inputs.params.model.model_copy(update={"source": CLOSING})})
    changed = replace(
        inputs,
        results=results,
        params=params,
        spectra=spectra,
        anatomy=replace(inputs.anatomy, linears=linears),
        timings={CLOSING: inputs.timings["prune"]},
    )
    browser.complaints()
    browser.open(written(tmp_path, changed))
    assert browser.complaints() == []
    assert browser.run("return document.querySelectorAll('img, script, b').length") == 0
    assert browser.run("return document.title") == f"{HOSTILE}: pruning report"
    assert browser.texts("header strong") == [HOSTILE]
    assert (
        browser.run("return document.querySelector('.sample.pruned p').textContent") == f"{CLOSING}{HOSTILE} $x$ & <b>"
    )
    assert shlex.split(browser.texts("pre")[0].replace("\\ ", ""))[3] == f"model.source={CLOSING}"
    assert any(HOSTILE[:30] in text for text in browser.texts("#curvature svg text"))


def test_a_hostile_prompt_given_to_the_command(again: Project, browser: Browser) -> None:
    again.surgeon("report", "--quiet", "-S", f"report.prompt={json.dumps(CLOSING)}").ok()
    browser.complaints()
    browser.open(page_of(again))
    assert browser.complaints() == []
    assert browser.texts(".sample mark") == [CLOSING] * 2


METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "units, one shot": ({"widths": "free", "sparsity": 0.2, "shots": 1}, ("block 0, inputs", "Units that each block")),
    "magnitude": (
        {"method": "magnitude", "structure": "weights", "sparsity": 0.5, "shots": 1},
        ("not made of factors", "updates nothing", "nothing was damped", "stored as zeros"),
    ),
    "sparsegpt 2:4": (
        {"method": "sparsegpt", "structure": "2:4", "sparsity": 0.5, "shots": 1},
        ("block 0, inputs", "No update needed an iterative solver"),
    ),
    "weights": (
        {"structure": "weights", "sparsity": 0.4, "shots": 2},
        ("Conjugate gradients of every shot", "raise prune.max_iterations", "block 2, output gradients"),
    ),
    "wanda": ({"method": "wanda", "structure": "weights", "sparsity": 0.5, "shots": 1}, ("block 0, inputs",)),
    "diagonal": ({"curvature": "diagonal", "sparsity": 0.1, "widths": "free", "shots": 1}, ("not made of factors",)),
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("method", [slow(m) if m in ("wanda", "diagonal") else m for m in METHODS])
def test_methods(params: dict[str, Any], browser: Browser, tmp_path: Path, method: str) -> None:
    prune, phrases = METHODS[method]
    sections = Params.model_validate(params | {"prune": prune})
    results = run_all(Session(sections, Workspace(tmp_path), InlineEngine()))
    browser.complaints()
    browser.open(tmp_path / "data" / "report" / "index.html")
    assert browser.complaints() == []
    assert browser.texts("h1") == [f"{100 * results['pruned']['sparsity']:.1f}% of the decoder weights removed"]
    text = " ".join(browser.texts("body"))
    for phrase in phrases:
        assert phrase in text
    assert not re.search(r"\b(None|nan|inf)\b", re.sub(r"<style.*?</style>", "", text))
    assert len(browser.rows("#shots table")) == 2 + len(results["shots"])


@pytest.mark.usefixtures("in_process")
def test_dropped_factors_leave_their_spectra(params: dict[str, Any], tmp_path: Path) -> None:
    """They are results of their own: found when the factors are gone; without both the page says so."""

    def run(keep: str, root: Path) -> tuple[dict[str, Any], str]:
        sections = params | {
            "run": params["run"] | {"keep": keep},
            "prune": {"sparsity": 0.2, "widths": "free", "shots": 1},
        }
        results = run_all(Session(Params.model_validate(sections), Workspace(root), InlineEngine()))
        return results, (root / "data" / "report" / "index.html").read_text()

    _, page = run("last", tmp_path / "one")
    assert "block 0, inputs" in page
    results, page = run("none", tmp_path / "one")
    assert "block 0, inputs" in page
    assert results["tasks"]["executed"] == 0
    _, page = run("none", tmp_path / "other")
    assert "run.keep drops them" in page and "block 0, inputs" not in page


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["prune.sparsity=0.3", "seed=7", "run.batch_size=2", "run.engine=inline"],
        ["prune.structure=2:4", "prune.method=sparsegpt", "prune.sparsity=0.5"],
        ["calibrate.text={source: a b/$HOME'`x`.txt, split: 'first:80%'}", "prune.damping={activations: 1.0e-05}"],
        ["prune.parameters=110M", "prune.sparsity=null", "report.prompt='yes: \"no\" # \\n'", "evaluate.windows=null"],
    ],
)
def test_command_makes_the_same_parameters(overrides: list[str]) -> None:
    params = load_params(None, overrides)
    name, stage, *options = shlex.split(command_line(params).replace("\\\n", ""))
    assert (name, stage) == ("surgeon", "run") and set(options[::2]) <= {"-S"}
    again = load_params(None, options[1::2])
    assert again.model_dump(exclude={"run": {"engine"}}) == params.model_dump(exclude={"run": {"engine"}})


def test_the_page_is_made_again_only_if_something_changed(again: Project) -> None:
    page = again.data / "report" / "index.html"
    before = page.stat().st_ino
    again.surgeon("run", "--quiet").ok()
    assert page.stat().st_ino == before
    page.unlink()
    again.surgeon("run", "--quiet").ok()
    assert page.stat().st_ino
    again.surgeon("run", "--quiet", "-S", "report.prompt=Hello").ok()
    assert "Hello" in page.read_text()
