"""The report on disk: what it says, that it is whole, and that nothing in it is taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from p0circuit import load_model, natural_text
from p0circuit.experiments import SinkMap
from p0circuit.report.contents import command_for, number, write_overview
from p0circuit.report.html import MOST_ROWS, write_report
from tests.report.made_up import HOSTILE, ROWS, result, write_run

VOID = {"meta", "img", "br", "wbr"}


class Reader(HTMLParser):
    """The elements, links, anchors and text of a page; every element that is opened must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.anchors |= {given["id"]} if given.get("id") else set()
        self.links += [given["href"]] if given.get("href") else []
        self.images += [given["src"]] if given.get("src") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("out") / "made-up"
    write_run(directory)
    assert write_report(directory) == [directory / "report.html", directory / "report.md"]
    return directory


@pytest.fixture(scope="module")
def page(run: Path) -> Reader:
    return Reader((run / "report.html").read_text())


def test_claims_come_first_in_order_with_their_verdicts(page: Reader) -> None:
    order = [
        page.text.index(shown) for shown in ("C2 What is kept", "C10 What is lost", "C11 Also lost", "C12 What broke")
    ]
    assert order == sorted(order)
    assert "1 reproduced, 2 not reproduced, 1 broke off" in page.text
    assert "✗\u00a0not reproduced" in page.text and "!\u00a0broke off" in page.text
    assert "share is 0.350 [0.250, 0.450]; needed share, lower end of the interval, >= 0.3" in page.text


def test_every_link_leads_somewhere(run: Path, page: Reader) -> None:
    assert {"#C2", "#C10", "#C11", "#C12"} <= set(page.links)
    for link in page.links:
        assert link[1:] in page.anchors if link.startswith("#") else (run / link).is_file(), link


def test_nothing_is_loaded_from_outside(run: Path, page: Reader) -> None:
    assert "link" not in page.tags and "iframe" not in page.tags
    assert page.images and all(source.startswith("data:image/svg+xml;base64,") for source in page.images)
    assert "default-src 'none'" in (run / "report.html").read_text()


def test_figures_tables_notes_and_commands(page: Reader) -> None:
    assert len(page.images) == 3  # C2, C10, circuit; C11 points to C10's
    assert f"The first {MOST_ROWS} of {ROWS} rows" in page.text
    assert page.text.count("tables/kept-tokens.csv") == 1
    assert "A note on <b>nothing</b>." in page.text
    assert "p0circuit run kept made-up --text 'my texts/a.txt' --samples 64 --length 16 --seed 3" in page.text
    assert "ValueError: too <large>" not in page.text and "its measurement broke off" in page.text
    assert "About circuit" in page.text and "it tests no claim" in page.text
    assert "reproduce made-up" in page.text


def test_controls_stand_beside_the_model(page: Reader) -> None:
    matrix = page.text.split("The same claims on controls")[1].split("Published figures")[0]
    assert re.search(r"C2\s*✓\sreproduced\s*✗\snot reproduced\s*–\snot applicable", matrix)
    assert re.search(r"C10\s*✗\snot reproduced\s*✗\snot reproduced\s*not tried", matrix)


def test_tokens_are_text(page: Reader) -> None:
    # The page's own: the library, the view; no element out of a token.
    assert page.tags.count("script") == 2 and page.tags.count("img") == len(page.images) and "b" not in page.tags
    for token in HOSTILE[:5]:
        assert token in page.text


def test_the_library_is_there_once_and_only_with_a_view(run: Path, tmp_path: Path) -> None:
    assert len(re.findall(r"window\.CircuitsVis \?\?=", (run / "report.html").read_text())) == 1
    write_run(tmp_path)
    (tmp_path / "attention" / "kept.json").unlink()
    write_report(tmp_path)
    assert len((tmp_path / "report.html").read_text()) < 300_000


def test_markdown_for_pasting(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert "| C10 What is lost | **not reproduced** | share is 0.350 [0.250, 0.450]; needed" in text
    assert "| C10 | not reproduced |  |" in text
    assert "`share` 0.600 [0.500, 0.700]" in text
    assert "A note on \\<b>nothing\\</b>." in text


def test_several_models_and_an_overview(tmp_path: Path) -> None:
    for model in ("one", "org/two"):
        write_run(tmp_path / model.replace("/", "--"), model)
    (tmp_path / "not-a-run").mkdir()
    written = write_report(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in written if path.suffix == ".html"]
    assert names == ["one/report.html", "org--two/report.html", "report.html"]
    overview = Reader((tmp_path / "report.html").read_text())
    assert "org/two" in overview.text and "C10 What is lost" in overview.text
    for link in overview.links:
        file, _, anchor = link.partition("#")
        assert not anchor or anchor in Reader((tmp_path / file).read_text()).anchors
    assert (tmp_path / "report.md").read_text().count("# o") == 2


def test_the_overview_says_what_was_measured_on_what_and_what_is_missing(tmp_path: Path) -> None:
    for model in ("aaa", "real", "runs"):
        write_run(tmp_path / model, model)
    summary = "real has its sink in text after BOS"
    condition = {"name": "with BOS", "excess": {}, "summary": summary}
    for name, more in {
        "real": {"condition": condition, "samples": 1024, "text": "docs", "quick": True, "quantisation": "Q4_1"},
        "runs": {"runs": ["a"]},
    }.items():
        path = tmp_path / name / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    write_overview(tmp_path, [tmp_path / "real", tmp_path / "runs"], {"<i>gone</i>": "no <b>network</b>: <i>gone</i>"})
    write_report(tmp_path)
    overview = Reader((tmp_path / "report.html").read_text())
    assert "Missing: no <b>network</b>: <i>gone</i>" in overview.text and not {"b", "i"} & set(overview.tags)
    head, training = overview.text.split("Claims about training")
    # The order that was asked for, then the others; claims about training stand by themselves.
    assert re.search(r"claim\s*real \(Q4_1\)\s*aaa\s*C2", head) and "runs" not in head
    assert re.search(r"claim\s*runs\s*C2", training)
    row = re.search(r"real \(Q4_1\)\s*text after BOS\s*1,024 of docs\s*(.*?)\s*runs\s*–", training, re.S)
    claims = json.loads((tmp_path / "real" / "claims.json").read_text())
    verdicts = [control["verdict"] for claim in claims for control in claim.get("controls", ())]
    tested = len(verdicts) - verdicts.count("not applicable")
    assert (
        row is not None and f"{tested} tested something ({verdicts.count('reproduced')} of them reproduced)" in row[1]
    )
    assert f"{verdicts.count('not applicable')} not applicable" in row[1]
    report = (tmp_path / "real" / "report.html").read_text()
    assert f"{summary}." in report
    assert "p0circuit run kept real --text &#39;my texts/a.txt&#39; --length 16 --seed 3 --quick" in report
    assert "--quick" not in (tmp_path / "aaa" / "report.html").read_text()


def test_one_model_in_a_directory_of_models_gets_an_overview_too(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    assert tmp_path / "report.html" in write_report(tmp_path)


def test_a_lost_figure_and_a_missing_manifest_lose_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "figures" / "lost-map.png").unlink()
    (tmp_path / "manifest.json").unlink()
    write_report(tmp_path)
    page = Reader((tmp_path / "report.html").read_text())
    assert "could not be read: the result lost.json names lost-map.png, which is missing" in page.text
    assert "did not finish" in page.text and "What is kept" in page.text


def test_published_figures_stand_beside_ours(tmp_path: Path) -> None:
    write_run(tmp_path, "openai-community/gpt2-xl")
    write_report(tmp_path)
    page = Reader((tmp_path / "report.html").read_text())
    assert "sink_rate_random_tokens 70.29 %" in page.text and "not measured here" in page.text
    assert "published 70.29 %" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("content", [None, "{}", '[{"id": "C1"}]', "[3]"])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "claims.json").write_text(content)
    with pytest.raises(ValueError, match=r"claims\.json"):
        write_report(tmp_path)


def test_numbers_as_shown() -> None:
    given = [0, 0.12345, -2.5, 0.00001234, 123456.0, float("nan")]
    assert list(map(number, given)) == ["0.000", "0.123", "-2.500", "1.23e-05", "1.23e+05", "–"]


def test_the_command_without_a_result() -> None:
    assert command_for("kept", "a model", None) == "p0circuit run kept 'a model'"
    assert "--seed 3" in command_for("kept", "m", result("kept", 0.5, None))


def test_a_real_experiment(tmp_path: Path) -> None:
    model = load_model("p0-nano")
    found = SinkMap().run(model, natural_text(model, "stdlib", n=4))
    found.save(tmp_path)
    entry = found.claim_entry()
    assert found.judgement is not None and entry is not None
    (tmp_path / "claims.json").write_text(json.dumps([entry | {"experiment": "sink-map", "model": "p0-nano"}]))
    write_report(tmp_path)
    page = Reader((tmp_path / "report.html").read_text())
    assert found.judgement.verdict in page.text and len(page.images) == len(found.figures)
    assert "p0circuit run sink-map p0-nano --text stdlib --samples 4" in page.text
