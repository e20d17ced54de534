"""The page of `dit-scale report`: what it says about runs in every state, and that no run can break it."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_scale import cli
from dit_scale.config import TrainConfig, load
from dit_scale.report.page.configs import differences, keys_of, nearest_recipe
from dit_scale.report.page.contents import RunReader, names_of
from dit_scale.report.page.document import MAX_BYTES, document
from dit_scale.report.page.panels import PANELS
from dit_scale.report.page.timeline import WIDTH
from tests.support.report_runs import (
    BREAKOUT,
    HOSTILE,
    JOURNAL,
    ROWS,
    SUPERVISOR,
    event,
    lines,
    write_card,
    write_grid,
    write_run,
)

NOW_S = 5000.0


class Text(HTMLParser):
    """Collects the texts of a page by section, its elements, and its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: dict[str, list[str]] = {"": []}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "section":
            self._section = str(dict(attrs)["id"])
            self.sections[self._section] = []

    def handle_endtag(self, tag: str) -> None:
        self._open.append("")
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.sections[self._section] += data.split()

    def of(self, section: str) -> str:
        return " ".join(self.sections[section])

    @property
    def data(self) -> Any:
        """What the scripts get."""
        return json.loads(self.scripts[0])


def html_of(*runs: str) -> str:
    """Return the page about runs at NOW_S, as if they were still written to."""
    return document(
        [RunReader(run, name).read(NOW_S) for run, name in zip(runs, names_of(runs), strict=True)], NOW_S
    )


def page_of(*runs: str) -> Text:
    return Text(html_of(*runs))


def test_the_headline_has_state_progress_and_the_best_score(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "a")).of("headline")
    assert text.startswith("a as of 1970-01-01 01:23:20 UTC running training")
    for part in (
        "40 of 100 steps",
        "40.0%",
        "0.625 held-out loss at step 20",
        "8 images/s",
        "MFU 37.5%",
        "1 10 steps lost",
    ):
        assert part in text, part


def test_curves_have_marks_where_attempts_resumed(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"))
    (run,) = page.data["runs"]
    assert run["curves"]["loss"] == {"x": [10, 20], "y": [1.0, 0.5]}
    assert run["restarts"] == [[20, "attempt 2: failed node1"]]
    assert [panel["name"] for panel in page.data["panels"]] == ["loss", "held_out", "speed", "mfu"]
    assert "Not recorded: Loss by timestep, " in page.of("curves")
    assert "MFU 37.5% 25.0% 10 37.5% 20" in page.of("curves")


def test_failures_are_listed_by_cause_and_node(tmp_path: Path) -> None:
    (tmp_path / "a" / "errors").mkdir(parents=True)
    (tmp_path / "a" / "errors" / "20261130-rank0.txt").write_text("Traceback")
    text = page_of(write_run(tmp_path / "a")).of("timeline")
    assert "node failed steps lost node1 1 10" in text
    assert f"1970-01-01 00:17:30 failed node1 3 30 10 {BREAKOUT}" in text
    assert "Alarms (1)" in text
    assert "Tracebacks: errors/20261130-rank0.txt" in text


def test_the_time_line_shows_attempts_nodes_and_failures(tmp_path: Path) -> None:
    """From the first round at 1000 s to the last entry at 1090 s, 10,000 units wide."""
    found = RunReader(write_run(tmp_path), "a").read(NOW_S).timeline
    assert found is not None
    assert (found.begin_s, found.end_s, found.left_out) == (1000.0, NOW_S, 0)
    attempts, node0, node1 = found.lanes
    unit = WIDTH / (NOW_S - 1000.0)
    begins = {kind: re.findall(r"M(\d+) 0h(\d+)", path) for kind, path in attempts.paths.items()}
    seconds = {"starting": [(0, 12), (60, 12)], "training": [(12, 28), (72, 18)]}
    for kind, spans in seconds.items():
        got = [(int(begin) / unit, int(length) / unit) for begin, length in begins[kind]]
        assert got == [pytest.approx(span, abs=1) for span in spans]
    assert [node0.name, len(node0.bars["member"]), node0.marks] == ["node0", 2, []]
    assert node0.bars["member"][1] == (60 / (NOW_S - 1000.0), 1.0)  # the round is open
    assert (node1.name, len(node1.bars["member"])) == ("node1", 1)
    assert [mark.text for mark in node1.marks] == ["failed, rank 3, 10 steps lost"]


def test_two_runs_share_charts_and_have_a_column_each(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer={"lr": 0.5}, rows=ROWS[:1]))
    assert [run["name"] for run in page.data["runs"]] == ["a", "b"]
    assert [run["curves"]["loss"]["x"] for run in page.data["runs"]] == [[10, 20], [10]]
    assert "optimizer.lr 0.0001 0.0001 0.5" in page.of("config")
    assert "a: No score card yet" in page.of("scores")


def test_empty_parts_say_so(tmp_path: Path) -> None:
    """A run that is starting has a journal of its supervisor and nothing else."""
    (tmp_path / "supervisors").mkdir()
    (tmp_path / "supervisors" / "node0.jsonl").write_text(lines(SUPERVISOR[:1]))
    page = page_of(str(tmp_path))
    for section, text in {
        "curves": "No log points yet.",
        "timeline": "Never interrupted.",
        "samples": "No grids of samples yet;",
        "scores": "No score card yet;",
        "config": "No config.yaml yet.",
        "headline": "no evaluations yet",
    }.items():
        assert text in page.of(section), section
    assert page.data["panels"] == []


def test_a_run_that_gave_up_says_why(tmp_path: Path) -> None:
    ending = [*SUPERVISOR[:3], event(1052.0, "gave_up", round=1)]
    text = page_of(write_run(tmp_path, JOURNAL[:3], ending)).of("headline")
    assert "failed its supervisors gave up: " + BREAKOUT in text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """A folder name, configuration, error or key must not become markup, end a script, or break the JSON."""
    run = write_run(
        tmp_path / HOSTILE,
        log={"wandb_project": BREAKOUT},
        rows=[{"step": 1, "loss": 1.0, f"eval_loss_{BREAKOUT}": 2.0}],
    )
    html = html_of(run)
    page = Text(html)
    assert page.data["runs"][0]["name"] == HOSTILE
    assert HOSTILE in page.of("headline")
    assert BREAKOUT in page.of("config")
    assert len(page.scripts) == 2
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "form", "base"} == set()
    assert "alert(" not in " ".join(page.scripts[1:])
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert [name for name in attributes if name.startswith("on") or name == "style"] == []


def test_numbers_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 30, "loss": NaN, "images_per_s": Infinity}\n{"step": 40, "loss": 2.0}\n{"step": 50, "lo'
        )
    curves = page_of(run).data["runs"][0]["curves"]
    assert curves["loss"] == {"x": [10, 20, 30, 40], "y": [1.0, 0.5, None, 2.0]}
    assert curves["images_per_s"]["y"] == [8.0, 8.0, None]


def test_the_policy_allows_only_what_is_in_the_file(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path))
    (policy,) = [
        attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "action") if name in attrs]
    assert {str(link)[:1] for link in links if link != "data:,"} == {"#"}


def test_score_cards_stand_beside_the_paper(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    card = write_card(run, 21.5)
    Image.new("RGB", (320, 320)).save(card.with_name("grid.png"))
    page = page_of(run)
    text = page.of("scores")
    assert "FID inception 21.5 0.25 500 19.47" in text
    assert "500 samples are few" in text
    card.write_bytes(card.read_bytes().replace(b"21.5", b"1.55"))
    assert "is damaged (its SHA-256 is wrong)" in page_of(run).of("scores")


def test_a_run_of_the_papers_model_shows_the_papers_figures(tmp_path: Path) -> None:
    assert "400K steps, no guidance: FID 19.47" in page_of(write_run(tmp_path)).of("scores")


# Configuration and environment


def test_the_nearest_recipe_and_the_keys_that_differ() -> None:
    config = load(TrainConfig, "dit_xl2_512", ["run=/r", "data.url=/d", "steps=7"])
    recipe = nearest_recipe(config)
    assert recipe.name == "dit_xl2_512"
    found = differences(recipe, [keys_of(config)])
    assert (recipe.differing, [*found], found["steps"][1]) == (1, ["steps"], "7")


def test_paths_differ_only_between_runs() -> None:
    one, other = (
        keys_of(TrainConfig.model_validate({"run": run, "data": {"url": run}})) for run in ("/a", "/b")
    )
    assert differences(None, [one, other]) == {"data.url": ["-", "/a", "/b"]}


def test_the_environment_is_that_of_the_newest_attempt(tmp_path: Path) -> None:
    recorded = {"versions": {"torch": "2.13.0", "cuda": "13.0"}, "devices": {"NVIDIA H200": 16}}
    newest = event(1100.0, "start", attempt=3, step=40, restore_s=0.0, world=16, environment=recorded)
    text = page_of(write_run(tmp_path, [*JOURNAL, newest])).of("environment")
    assert "processes 16 devices 16 x NVIDIA H200 nodes node0" in text
    assert "torch version 2.13.0 cuda version 13.0" in text


# Size


def test_the_file_stays_below_its_limit(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        values = np.random.default_rng(0).random((3000, 20))
        keys = [
            "loss",
            "mse",
            "vb",
            "grad_norm",
            "lr",
            "mfu",
            "data_wait",
            "images_per_s",
            "loss_max",
            "skipped",
        ]
        keys += [f"eval_loss_{number}" for number in range(10)]
        rows = [
            {"step": 7 * step, **dict(zip(keys, row, strict=True))}
            for step, row in enumerate(values.tolist())
        ]
        (Path(run) / "metrics.jsonl").write_text(lines(rows))
        for step in range(0, 200, 10):
            write_grid(run, step, side=400)
    html = html_of(*runs)
    page = Text(html)
    assert 0.8 * MAX_BYTES < len(html.encode()) <= MAX_BYTES
    assert "20 evaluations are shown" in page.of("samples")
    assert min(len(strip["pictures"]) for strip in page.data["strips"]) >= 12


def test_sixteen_long_runs_fit_on_one_page(tmp_path: Path) -> None:
    """Long tables, time lines and curves are cut before the file grows beyond its limit."""
    supervisor, journal = list[dict[str, Any]](), list[dict[str, Any]]()
    nodes = [f"a-node-with-a-long-name-{number}.example.org" for number in range(100)]
    for number in range(1, 201):
        at_s, failed = 1000.0 + 10 * number, nodes[number % 100]
        ending = {"reason": "failed", "failed_node": failed, "text": "x" * 1000, "details": {"rank": 3}}
        supervisor.append(event(at_s, "round", round=number, nodes=nodes))
        supervisor.append(event(at_s + 9, "round_ended", round=number, **ending))
        journal.append(event(at_s + 2, "start", attempt=number, step=0, restore_s=0.0))
        journal.append(event(at_s + 4, "alarm", attempt=number, step=1, text="y" * 1000))
    keys = [key for panel in PANELS for key in panel.keys if "*" not in key]
    rows = [dict.fromkeys(keys, 1.2345 + step) | {"step": step} for step in range(1000)]
    runs = [write_run(tmp_path / str(number), journal, supervisor, rows) for number in range(16)]
    html = html_of(*runs)
    assert 0.5 * MAX_BYTES < len(html.encode()) <= MAX_BYTES
    timeline = Text(html).of("timeline")
    assert "84 more nodes are not shown" in timeline
    assert "Interruptions, the last 10 of 200" in timeline
    assert "By cause and node, 10 of 100 nodes" in timeline


# The command


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert cli.main(["report", a]) == 0
    assert cli.main(["report", a, b]) == 0
    assert cli.main(["report", a, "--out", "x/y.html"]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")) == [
        "a/report.html",
        "report.html",
        "x/y.html",
    ]
    assert capsys.readouterr().out.startswith(f"{a}/report.html: a; 0.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "expected a run folder"),
        (["a"] * 17, "got 17 runs, expected at most 16"),
        (["a", "--out", "report.pdf"], "expected a name that ends in .html"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    assert cli.main(["report", *argv]) == 2
    assert message in capsys.readouterr().err


def test_watching_follows_a_run_until_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of a watched run loads itself again; the last one that is written does not."""
    run, pages = write_run(tmp_path), []

    def sleep(seconds: float) -> None:
        pages.append((tmp_path / "report.html").read_text())
        if len(pages) == 2:
            raise KeyboardInterrupt
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30, "loss": 0.25}\n')

    monkeypatch.setattr("dit_scale.cli.report.time.sleep", sleep)
    assert cli.main(["report", run, "--watch"]) == 130
    assert [Text(html).data["runs"][0]["curves"]["loss"]["x"][-1] for html in pages] == [20, 30]
    assert [Text(html).data["reload_s"] for html in pages] == [5.0, 5.0]
    last = (tmp_path / "report.html").read_text()
    assert Text(last).data["reload_s"] is None
    assert ["Pause updates" in html for html in (pages[0], last)] == [True, False]


def test_the_command_does_not_import_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    code = (
        f"import sys; from dit_scale import cli; cli.main(['report', {run!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    assert names_of(["x/a/run", "x/b/run"]) == ["a/run", "b/run"]
    assert names_of(["run", "other"]) == ["run", "other"]
