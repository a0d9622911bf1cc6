"""MT-Bench: answers in FastChat's format, and a judge behind a stub of an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import os
import string
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from iapt.benchmarks import judge, mtbench, mtbench_answers
from iapt.benchmarks.judge import JudgeConfig, Question, RefusedError, rating
from iapt.benchmarks.mtbench import MtBenchConfig, evaluate, read_questions
from iapt.benchmarks.mtbench_answers import Answerer, Layout
from iapt.config.errors import TrainingError, UserError
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import to_dict
from iapt.config.task import TaskConfig
from iapt.data.task import build_task
from iapt.folder.files import append_row, read_rows
from iapt.folder.summary import read_summary
from iapt.methods.settings import load_config
from iapt.runs import experiment
from iapt.runs.restore import build_model, read_saved
from tests.test_experiment import config

DATA = Path(os.environ.get("IAPT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
QUESTIONS = [
    {"question_id": 7, "category": "writing", "turns": ["Name a dog.", "Name {another} one."]},
    {"question_id": 8, "category": "math", "turns": ["What is 1 + 1?", "And 2 + 2?"]},
    {"question_id": 9, "category": "math", "turns": ["What is 3 + 1?", "And 2 + 5?"]},
]
REFERENCE = {"question_id": 8, "choices": [{"index": 0, "turns": ["the reference is 2", "the reference is 4"]}]}
CHAT = {"name": "chat", "template": "### Instruction: {instruction}\n{input}### Response:", "metrics": ["bleu"]}
Reply = Callable[["Stub", dict[str, Any]], Any]


class Stub:
    """A judge's server: `reply` decides what each request gets; a number is a status, a text the judge's words."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Reply = lambda stub, body: "Fine. Rating: [[7]]"
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(body)
                stub.keys.append(self.headers.get("Authorization"))
                assert self.path == "/v1/chat/completions"
                answer = stub.reply(stub, body)
                status = answer if isinstance(answer, int) else 200
                content = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                data = answer if isinstance(answer, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has given up
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def prompts(self) -> list[str]:
        return [body["messages"][1]["content"] for body in self.asked]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Stub()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in run/, questions and references beside it."""
    root = tmp_path_factory.mktemp("mt")
    experiment.run(config("describe", zero_shot=False), root / "run")
    (root / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (root / "reference.jsonl").write_text(json.dumps(REFERENCE) + "\n")
    return root


def settings(place: Path, url: str | None = None, **changes: Any) -> MtBenchConfig:
    """Short answers, no waiting; keys of the judge begin with `judge_`."""
    patience: dict[str, Any] = {"retries": 2, "backoff": 0.0, "timeout": 5.0}
    own = {k.removeprefix("judge_"): v for k, v in changes.items() if k.startswith("judge_")}
    rest = {k: v for k, v in changes.items() if not k.startswith("judge_")}
    graded = JudgeConfig(base_url=url, model="stub", **(patience | own)) if url else JudgeConfig()
    return MtBenchConfig(**({"questions": str(place / "question.jsonl"), "max_new_tokens": 5, "judge": graded} | rest))


def answers_of(folder: Path) -> dict[int, list[str]]:
    return {row["question_id"]: row["choices"][0]["turns"] for row in read_rows(folder / "answers.jsonl")}


# --- answers ----------------------------------------------------------------------------------------------


def test_answers_are_in_fastchats_format(place: Path, tmp_path: Path) -> None:
    summary = evaluate(place / "run", tmp_path / "out", {}, settings(place, batch_size=2))
    rows = read_rows(tmp_path / "out" / "answers.jsonl")
    assert [row["question_id"] for row in rows] == [7, 8, 9]
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        [choice] = row["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == 2
        assert all(isinstance(turn, str) for turn in choice["turns"])
    assert len({row["answer_id"] for row in rows}) == 3
    assert {row["model_id"] for row in rows} == {"random-iapt-1"}
    assert (summary.task, summary.method, summary.test, summary.status) == ("mt_bench", "iapt", None, "ok")
    assert "3 answers, no judge yet" in summary.note
    assert read_summary(tmp_path / "out") == summary


def test_answers_are_the_models_own_whatever_the_batch(place: Path, tmp_path: Path) -> None:
    """Each turn by itself through `generate`, the second after the first's very text."""
    evaluate(place / "run", tmp_path / "out", {}, settings(place, batch_size=3))
    saved = read_saved(place / "run", {})
    model, _ = build_model(saved)
    tokenizer = model.backbone.tokenizer
    template = saved.config.task.template

    def say(text: str) -> str:
        out = model.generate(**tokenizer([text], return_tensors="pt", return_token_type_ids=False), max_new_tokens=5)  # type: ignore[operator]
        return str(tokenizer.decode(out[0], skip_special_tokens=True)).strip()

    [column] = {piece[1] for piece in string.Formatter().parse(template) if piece[1]}
    for row in QUESTIONS:
        first, second = (template.format(**{column: turn}) for turn in row["turns"])  # type: ignore[attr-defined]
        one = say(first)
        two = say(first + saved.config.task.separator + one + "\n\n" + second)
        assert answers_of(tmp_path / "out")[row["question_id"]] == [one, two]  # type: ignore[index]
    model.detach()


def test_what_opens_a_text_is_asked_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mtbench_answers, "opening", lambda *given: asked.append(given) or ())  # type: ignore[func-returns-value]
    summary = evaluate(place / "run", tmp_path / "out", {}, settings(place, batch_size=1))
    assert len(asked) == 1
    assert summary.preflight["status"] == "passed"
    assert evaluate(place / "run", tmp_path / "out", {"resume": True}, settings(place)).preflight is None


def test_the_model_that_answers_carries_the_saved_adapter(place: Path) -> None:
    saved = read_saved(place / "run", {})
    model, _ = build_model(saved)
    state = model.adapter_state()
    model.detach()
    assert state.keys() == saved.tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.tensors.items())
    with pytest.raises(UserError, match="trained on backbone 'random', which this one .* is not"):
        build_model(read_saved(place / "run", {"backbone": {"shape": {"hidden_size": 16}}}))


def test_the_second_instruction_has_the_first_turn_in_the_templates_layout() -> None:
    task = load_config(CHAT | {"separator": " "}, TaskConfig)
    layout = Layout(task, None, "\n\n")
    assert layout.first("Say {x}") == "### Instruction: Say {x}\n### Response:"
    assert layout.second(("one {", "two"), "an } answer") == (
        "### Instruction: one {\n### Response: an } answer\n\n### Instruction: two\n### Response:"
    )
    assert Layout(task, "input", "\n").first("?") == "### Instruction: \n?### Response:"
    fingerprints = {Layout(task, c, j).fingerprint() for c in ("input", "instruction") for j in ("\n", " ")}
    assert len(fingerprints) == 4
    with pytest.raises(UserError, match="name the one that takes a question: input, instruction"):
        Layout(task, "question", "\n")
    other = load_config(CHAT | {"template": "{premise} {hypothesis}"}, TaskConfig)
    with pytest.raises(UserError, match="name the one that takes a question: hypothesis, premise"):
        Layout(other, None, "\n")
    with pytest.raises(UserError, match="no question fits into it"):
        Layout(load_config(CHAT | {"template": "{answers:d}"}, TaskConfig), "answers", "\n")


def test_a_question_reads_like_a_training_row_without_input(tmp_path: Path) -> None:
    """Alpaca's template, its rows from a file: the layout is what training shows."""
    task = load_config(
        yaml.safe_load((CONFIG_DIR / "task" / "alpaca.yaml").read_text()) | {"carve_size": 1}, TaskConfig
    )
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "So."} for i in range(4)]
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {e.instruction for examples in build_task(task, str(tmp_path)).splits.values() for e in examples}
    layout = Layout(task, None, "\n\n")
    assert shown == {layout.first(str(row["instruction"])) for row in rows}
    with pytest.raises(UserError, match="no question fits into .* it lacks {input}"):
        Layout(load_config(to_dict(task) | {"templates_without": {"instruction": "Go"}}, TaskConfig), "input", "")


def test_long_conversations_lose_their_beginning_with_a_word(place: Path, tmp_path: Path) -> None:
    row = {"question_id": 1, "category": "writing", "turns": ["the red dog " * 60, "the old cat " * 60]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    summary = evaluate(place / "run", tmp_path / "out", {}, settings(place, questions=str(tmp_path / "long.jsonl")))
    assert "2 of 2 instructions lost their beginning" in summary.note
    with pytest.raises(UserError, match=r"mt_bench.max_new_tokens = 500: leaves no room"):
        evaluate(place / "run", tmp_path / "no", {}, settings(place, max_new_tokens=500))
    assert not (tmp_path / "no").exists()


def test_a_temperature_samples_its_category_alone(place: Path, tmp_path: Path) -> None:
    greedy = settings(place, max_new_tokens=20)
    sampled = settings(place, max_new_tokens=20, temperatures={"math": 5.0})
    evaluate(place / "run", tmp_path / "a", {}, greedy)
    evaluate(place / "run", tmp_path / "b", {}, sampled)
    evaluate(place / "run", tmp_path / "c", {}, sampled)
    a, b, c = (answers_of(tmp_path / name) for name in "abc")
    assert a[7] == b[7]
    assert a[8] != b[8]
    assert b == c


def test_an_interrupted_answering_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(place / "run", tmp_path / "whole", {}, settings(place, batch_size=1))
    real, asked = Answerer.__call__, []

    def dies(self: Answerer, questions: list[Question], temperature: float) -> Any:
        asked.extend(q.id for q in questions)
        if 8 in asked and len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, questions, temperature)

    monkeypatch.setattr(Answerer, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(place / "run", tmp_path / "out", {}, settings(place, batch_size=1))
    assert not (tmp_path / "out" / "summary.json").exists()
    with (tmp_path / "out" / "answers.jsonl").open("a") as file:
        file.write('{"question_id": 8, "cho')  # a line that the end cut
    first = read_rows(tmp_path / "out" / "answers.jsonl")
    evaluate(place / "run", tmp_path / "out", {}, settings(place, batch_size=1))
    assert asked == [7, 8, 8, 9]
    assert read_rows(tmp_path / "out" / "answers.jsonl")[:1] == first
    assert answers_of(tmp_path / "out") == answers_of(tmp_path / "whole")


def test_a_folder_never_mixes_models_or_questions(place: Path, tmp_path: Path) -> None:
    evaluate(place / "run", tmp_path / "out", {}, settings(place))
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    with pytest.raises(UserError, match="made with another max_new_tokens; nothing was changed"):
        evaluate(place / "run", tmp_path / "out", {}, settings(place, max_new_tokens=6))
    (tmp_path / "few.jsonl").write_text(json.dumps(QUESTIONS[0]))
    with pytest.raises(UserError, match="made with another questions"):
        evaluate(place / "run", tmp_path / "out", {}, settings(place, questions=str(tmp_path / "few.jsonl")))
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="already holds a finished run"):
        evaluate(place / "run", place / "run", {}, settings(place))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "answers.jsonl").write_bytes(before)
    with pytest.raises(UserError, match="nothing says what it was made from"):
        evaluate(place / "run", tmp_path / "strange", {}, settings(place))


@pytest.mark.skipif(not (DATA / "mt_bench").is_dir(), reason=f"no MT-Bench in {DATA} (set IAPT_TEST_DATA)")
def test_the_real_questions_and_references_are_read() -> None:
    questions = read_questions(DATA / "mt_bench" / "question.jsonl")
    assert len(questions) == 80
    assert len({q.category for q in questions}) == 8
    references = judge.read_references(str(DATA / "mt_bench" / "reference_answer_gpt-4.jsonl"))
    assert {q.category for q in questions if q.id in references} == {"math", "reasoning", "coding"}
    assert len(references) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"question_id": 1, "category": "a", "turns": ["x"]}', "row 1 needs question_id, category and turns"),
        ('{"question_id": 1, "turns": ["x", "y"]}', "row 1 needs question_id, category"),
        ('\n{"question_id": 1, "category": "a"', "line 2 is no JSON"),
        ("[1]", "line 1 is list, a JSON object is expected"),
        ('{"question_id": 1, "category": "a", "turns": ["x", "y"]}\n' * 2, "question_id 1 comes twice"),
    ],
)
def test_bad_question_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.jsonl")


# --- the judge --------------------------------------------------------------------------------------------


def test_ratings_are_read_or_refused() -> None:
    assert rating("Good.\nRating: [[8]]") == 8
    assert rating("[[7.5]] because ... so [[7.5]]") == 7.5
    assert rating("[[ 10 ]]") == 10
    for reply in ("8", "[8]", "Rating: [[eight]]", "[[3]] or rather [[4]]", "[[0]]", "[[11]]", ""):
        with pytest.raises(RefusedError):
            rating(reply)


def test_grades_by_turn_and_category(place: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(stub: Stub, body: dict[str, Any]) -> str:
        text = body["messages"][1]["content"]
        second, math = "second answer" in text, "dog" not in text
        return f"Because. Rating: [[{2 + 4 * math + 1 * second}]]"

    stub.reply = reply
    monkeypatch.setenv("MY_KEY", "secret")
    given = settings(place, stub.url, judge_api_key_env="MY_KEY", judge_references=str(place / "reference.jsonl"))
    summary = evaluate(place / "run", tmp_path / "out", {}, given)
    grades = summary.mt_bench["grades"]
    assert grades["turns"] == {"1": pytest.approx((2 + 6 + 6) / 3), "2": pytest.approx((3 + 7 + 7) / 3)}
    assert grades["categories"] == {"writing": 2.5, "math": 6.5}
    assert grades["mean"] == pytest.approx(31 / 6)
    assert (grades["n_judged"], grades["n_failed"]) == (6, 0)
    assert summary.test == pytest.approx(3.1 / 6)
    assert summary.metrics["test"]["rating"] == grades["mean"]
    assert stub.keys == ["Bearer secret"] * 6
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]
    assert {(body["model"], body["temperature"]) for body in stub.asked} == {("stub", 0)}
    rows = read_rows(tmp_path / "out" / "judgments.jsonl")
    keys = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert all(set(row) == keys and row["judge"][0] == "stub" for row in rows)
    # What a judge sees: question and answer; in the second turn both, and what reference there is.
    said = answers_of(tmp_path / "out")
    [second] = [row["user_prompt"] for row in rows if (row["question_id"], row["turn"]) == (8, 2)]
    for part in (*QUESTIONS[1]["turns"], *said[8], "the reference is 2", "the reference is 4"):  # type: ignore[misc]
        assert part in second
    [first] = [row["user_prompt"] for row in rows if (row["question_id"], row["turn"]) == (8, 1)]
    assert "the reference is 2" in first
    assert "the reference is 4" not in first
    assert "And 2 + 2?" not in first
    assert not [p for p in stub.prompts() if "3 + 1" in p and "reference" in p.lower()]


def test_a_second_step_judges_answers_that_are_there(
    place: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(place / "run", tmp_path / "out", {}, settings(place))
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    monkeypatch.setattr(mtbench, "build_model", lambda saved: pytest.fail("no model is needed"))
    summary = evaluate(place / "run", tmp_path / "out", {}, settings(place, stub.url))
    assert (summary.test, len(stub.asked)) == (0.7, 6)
    judged = (tmp_path / "out" / "judgments.jsonl").read_bytes()
    # Once more: nothing is asked, nothing changes.
    again = evaluate(place / "run", tmp_path / "out", {}, settings(place, stub.url))
    assert (again.test, len(stub.asked)) == (0.7, 6)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    assert (tmp_path / "out" / "judgments.jsonl").read_bytes() == judged
    # Another judge has grades of its own, and the first one's stay.
    stub.reply = lambda stub, body: "[[3]]"
    other = settings(place, stub.url)
    other.judge.model = "other"
    assert evaluate(place / "run", tmp_path / "out", {}, other).test == 0.3
    assert (tmp_path / "out" / "judgments.jsonl").read_bytes().startswith(judged)


BROKEN: dict[str, Any] = {
    "a server's error": 500,
    "too many requests": 429,
    "no rating": "I liked it.",
    "two ratings": "[[3]] [[4]]",
    "out of range": "[[12]]",
    "no JSON": b"<html>",
    "no completion": b'{"error": "x"}',
    "no text": b'{"choices": [{"message": {"content": null}}]}',
    "a list": b"[]",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_failure_is_retried(place: Path, tmp_path: Path, stub: Stub, broken: Any) -> None:
    seen: dict[str, int] = {}

    def reply(stub: Stub, body: dict[str, Any]) -> Any:
        text = body["messages"][1]["content"]
        seen[text] = seen.get(text, 0) + 1
        return broken if seen[text] <= 2 else "[[6]]"

    stub.reply = reply
    grades = evaluate(place / "run", tmp_path / "out", {}, settings(place, stub.url)).mt_bench["grades"]
    assert (grades["mean"], grades["n_judged"], grades["n_failed"]) == (6, 6, 0)
    assert list(seen.values()) == [3] * 6


def test_what_keeps_failing_is_counted_left_out_and_asked_again_next_time(
    place: Path, tmp_path: Path, stub: Stub
) -> None:
    def reply(stub: Stub, body: dict[str, Any]) -> Any:
        return 503 if "3 + 1" in body["messages"][1]["content"] else "[[8]]"

    stub.reply = reply
    summary = evaluate(place / "run", tmp_path / "out", {}, settings(place, stub.url))
    grades = summary.mt_bench["grades"]
    assert (grades["mean"], grades["n_judged"], grades["n_failed"]) == (8, 4, 2)
    assert [(f["question_id"], f["turn"]) for f in grades["failures"]] == [(9, 1), (9, 2)]
    assert "HTTP 503" in grades["failures"][0]["reason"]
    assert "2 of 6 judgments failed" in summary.note
    assert len(stub.asked) == 4 + 2 * 3
    stub.reply = lambda stub, body: "[[2]]"
    grades = evaluate(place / "run", tmp_path / "out", {}, settings(place, stub.url)).mt_bench["grades"]
    assert (grades["mean"], grades["n_judged"], grades["n_failed"]) == (6, 6, 0)
    assert len(stub.asked) == 10 + 2


def test_a_judge_that_never_answers(place: Path, tmp_path: Path, stub: Stub) -> None:
    stub.reply = lambda stub, body: time.sleep(1.0) or "[[9]]"  # type: ignore[func-returns-value]
    given = settings(place, stub.url, judge_timeout=0.1, judge_retries=1)
    with pytest.raises(TrainingError, match="all 6 judgments failed: no reply: timed out"):
        evaluate(place / "run", tmp_path / "out", {}, given)
    assert len(answers_of(tmp_path / "out")) == 3
    assert len(stub.asked) == 12
    gone = settings(place, "http://127.0.0.1:9/v1", judge_retries=0)
    with pytest.raises(TrainingError, match="no reply: .*[Rr]efused"):
        evaluate(place / "run", tmp_path / "out", {}, gone)


def test_a_prompt_that_the_judge_cannot_take_fails_alone_and_at_once(place: Path, tmp_path: Path, stub: Stub) -> None:
    stub.reply = lambda stub, body: 400 if "3 + 1" in body["messages"][1]["content"] else "[[8]]"
    grades = evaluate(place / "run", tmp_path / "out", {}, settings(place, stub.url)).mt_bench["grades"]
    assert (grades["n_judged"], grades["n_failed"], len(stub.asked)) == (4, 2, 6)


class Clock(threading.Event):
    """Notes how long somebody wanted to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        return False


def test_pauses_grow_and_heed_the_server(stub: Stub) -> None:
    stub.reply = lambda stub, body: 500
    config = JudgeConfig(base_url=stub.url, model="m", retries=4, backoff=1.5)
    with pytest.raises(RefusedError):
        judge._ask_again("?", config, judge._client(config), clock := Clock())
    assert clock.pauses == [1.5, 3.0, 6.0, 12.0]

    def limited(text: str) -> str:
        raise RefusedError("later", pause=20.0)

    with pytest.raises(RefusedError):
        judge._ask_again("?", JudgeConfig(base_url="x", model="m", retries=7), limited, clock := Clock())
    assert clock.pauses == [20.0] * 5 + [32.0, 60.0]


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_for_good_ends_at_once_and_keeps_what_was_graded(
    place: Path, tmp_path: Path, stub: Stub, status: int
) -> None:
    evaluate(place / "run", tmp_path / "out", {}, settings(place))
    stub.reply = lambda stub, body: "[[5]]" if len(stub.asked) <= 2 else status
    given = settings(place, stub.url, judge_workers=1, judge_retries=5)
    with pytest.raises(UserError, match=f"HTTP {status}") as caught:
        evaluate(place / "run", tmp_path / "out", {}, given)
    assert ("no key in OPENAI_API_KEY" in str(caught.value)) == (status == 401)
    assert len(read_rows(tmp_path / "out" / "judgments.jsonl")) == 2
    assert stub.keys == [None] * 3


def test_without_the_extra_there_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = JudgeConfig(base_url="http://host/v1", model="m")
    assert judge.problems(config) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [line] = judge.problems(config)
    assert line.endswith("pip install 'iapt[judge]'")


# --- rows and the command ---------------------------------------------------------------------------------


def test_rows_survive_an_end_at_any_byte(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.jsonl", [{"a": 1}, {"b": "ü\n"}]
    assert read_rows(path) == []
    for row in rows:
        append_row(path, row)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        kept = read_rows(path)
        assert kept == rows[: data[:length].count(b"\n")]
        append_row(path, {"c": 3})
        assert read_rows(path) == [*kept, {"c": 3}]


def test_the_command_answers_then_judges(place: Path, iapt_eval: Callable[..., Any], stub: Stub) -> None:
    basis = (f"checkpoint={place / 'run'}", f"mt_bench.questions={place / 'question.jsonl'}", "hydra.run.dir=here")
    basis += ("mt_bench.max_new_tokens=4", "mt_bench.temperatures={math: 0.5}")
    code, out, err = iapt_eval(*basis)
    assert code == 0, err
    assert "no judge yet" in out
    code, out, err = iapt_eval(*basis, f"mt_bench.judge.base_url={stub.url}", "mt_bench.judge.model=stub")
    assert code == 0, err
    assert "70.0" in out
    assert "rating/10" in out
    assert len(stub.asked) == 6


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("mt_bench.question=x", "did you mean 'questions'?"),
        ("mt_bench.questions=nothing.jsonl", "mt_bench.questions = 'nothing.jsonl': no such file"),
        ("mt_bench.max_new_tokens=3", "mt_bench.max_new_tokens: does nothing without mt_bench.questions"),
        ("mt_bench.judge.model=x", "mt_bench.judge: does nothing without mt_bench.questions"),
        ("mt_bench.questions=q mt_bench.judge.model=x", "mt_bench.judge.model: does nothing without"),
        ("mt_bench.questions=q mt_bench.judge.base_url=http://x", "mt_bench.judge.model: missing"),
        ("mt_bench.questions=q mt_bench.judge.base_url=host mt_bench.judge.model=x", "expected http://"),
        ("mt_bench.questions=q mt_bench.judge.workers=0", "mt_bench.judge.workers = 0: must be at least 1"),
        ("mt_bench.questions=q mt_bench.judge.retrys=1", "did you mean 'retries'?"),
        (
            "mt_bench.questions=q mt_bench.temperatures={math:-1}",
            "mt_bench.temperatures.math = -1.0: must be at least 0",
        ),
        ("mt_bench.questions=q mt_bench.temperatures={math:hot}", "mt_bench.temperatures"),
    ],
)
def test_bad_input(place: Path, iapt_eval: Callable[..., Any], arguments: str, word: str) -> None:
    code, out, err = iapt_eval(f"checkpoint={place / 'run'}", *arguments.split())
    assert code == 2
    assert word in err
    assert "Traceback" not in out + err
    assert not [p for p in Path().rglob("*") if p.is_file()]
