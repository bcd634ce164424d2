"""Two runs' answers, judged by hand or by a server that may fail, stall or talk nonsense."""
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval import judge
from eval.judge import JudgeConfig, make_sheet, tally, verdict
from eval.scoring import wilson_interval


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(judge, "PAUSES", (0, 0, 0))


@pytest.fixture
def answers(tmp_path):
    """Two files of answers to four prompts; those of b are longer."""
    paths = []
    for name, extra in (("a", ""), ("b", " and more of it")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(
            {"prompt": f"Question {i}?", "answer": f"Answer {i}{extra}", "model": f"out/{name}"})
            + "\n" for i in range(4)))
        paths.append(str(path))
    return paths


class Server:
    """An OpenAI-compatible server. `script` has what it does with each request, then it judges as
    `opinion(first, second)` says: points of both."""

    def __init__(self, opinion, script=()):
        self.opinion, self.script, self.requests = opinion, list(script), []
        self.release = threading.Event()        # of requests that stall
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                outer.reply(self, body)

            def do_GET(self):                   # what a redirected request becomes
                outer.requests.append((self.path, dict(self.headers), None))
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.02,))
        self.thread.start()

    def reply(self, handler, body):
        act = self.script.pop(0) if self.script else "judge"
        if isinstance(act, int):
            handler.send_error(act)
            return
        if act == "stall":
            self.release.wait()
            return
        if act == "hang up":
            return
        if callable(act):
            act(handler)
            return
        parts = dict(part.split("\n", 1) for part in
                     body["messages"][1]["content"].split("\n\n") if ":\n" in part)
        first, second = self.opinion(parts["First answer:"], parts["Second answer:"])
        text = act if act != "judge" else "I think:\n```json\n" + json.dumps(
            {"first": dict.fromkeys(judge.RUBRIC, first),
             "second": dict.fromkeys(judge.RUBRIC, second), "reason": "because"}) + "\n```"
        data = text.encode() if text.startswith("RAW") else json.dumps(
            {"choices": [{"message": {"content": text}}]}).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release.set()
        self.httpd.shutdown()
        self.thread.join()
        self.httpd.server_close()


def longer(first, second):
    return (8, 3) if len(first) > len(second) else (3, 8)


def ask(answers, server, tmp_path, *words):
    out = tmp_path / "sheet.json"
    judge.main([*answers, f"--out={out}", f"--judge={server.url}", "--timeout=30", *words])
    return json.loads(out.read_text())


def test_a_sheet_has_every_pair_in_both_orders_and_no_name_beside_an_answer(answers):
    sheet = make_sheet(*answers)
    assert sorted((item["pair"], item["order"]) for item in sheet["items"]) == [
        (i, order) for i in range(4) for order in ("ab", "ba")]
    for item in sheet["items"]:
        shown = (item["first"], item["second"])
        a, b = shown if item["order"] == "ab" else shown[::-1]
        assert (a, b) == (f"Answer {item['pair']}", f"Answer {item['pair']} and more of it")
        assert "out/" not in json.dumps(item)
    assert [item["pair"] for item in sheet["items"]] == [0, 1, 2, 3] * 2
    assert len({item["order"] for item in sheet["items"][:4]}) == 2
    assert tally(sheet)["not_judged"] == 4


def test_a_sheet_filled_in_by_hand_is_counted(answers, tmp_path, capsys):
    out = tmp_path / "sheet.json"
    judge.main([*answers, f"--out={out}"])
    sheet = json.loads(out.read_text())
    for item in sheet["items"]:
        for place, run in zip(("first", "second"), item["order"]):
            item["points"][place] = dict.fromkeys(judge.RUBRIC, 9 if run == "a" else 4)
    out.write_text(json.dumps(sheet))
    judge.main([str(out)])
    shown = capsys.readouterr().out
    assert "a: out/a: wins 4, helpful 9.00" in shown and "b: out/b: wins 0, helpful 4.00" in shown
    low, high = wilson_interval(4, 4)
    assert f"95% interval {low:.1%} to {high:.1%}" in shown


def item(order, first, second):
    return {"order": order, "points": {"first": dict.fromkeys(judge.RUBRIC, first),
                                       "second": dict.fromkeys(judge.RUBRIC, second)}}


@pytest.mark.parametrize("ab,ba,expected", [
    ((7, 5), (5, 7), "a"), ((5, 7), (7, 5), "b"), ((5, 5), (5, 5), "tie"),
    ((7, 5), (5, 5), "a"), ((5, 5), (7, 5), "b"),
    ((7, 5), (7, 5), "split"),                      # whoever comes first
    ((5, 9), (5, 9), "split"), ((7, 5), (None, 5), ""), ((7, 5), (11, 5), ""),
])
def test_a_run_wins_where_no_order_speaks_against_it(ab, ba, expected):
    assert verdict([item("ab", *ab), item("ba", *ba)]) == expected


def test_a_server_that_prefers_the_longer_answer_makes_its_run_win(answers, tmp_path, capsys,
                                                                   monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abc")
    with Server(longer) as server:
        sheet = ask(answers, server, tmp_path, "--judge_model=m", "--key=SOME_KEY")
    result = tally(sheet)
    assert (result["wins_a"], result["wins_b"], result["ties"]) == (0, 4, 0)
    assert result["points_b"]["honest"] == 8 and result["interval_a"] == wilson_interval(0, 4)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and len(server.requests) == 8
    assert headers["Authorization"] == "Bearer abc" and "out/" not in json.dumps(body)
    assert "b: out/b: wins 4" in capsys.readouterr().out
    assert "abc" not in json.dumps(sheet)


def test_a_server_that_prefers_what_comes_first_makes_ties(answers, tmp_path):
    with Server(lambda first, second: (9, 2)) as server:
        result = tally(ask(answers, server, tmp_path))
    assert result["ties"] == result["orders_disagree"] == 4 and "share_a" not in result


STALLED = ["--timeout=1"]           # what a stall costs; else so long that it never ends a request
NONSENSE = ["Both are fine.", "{", "RAW no json", '{"first": 3, "second": 4}',
            '{"first": {"helpful": 11, "honest": 1, "harmless": 1}, "second": {}}', "RAW[1]",
            '{"a": 1} {"b": 2}']


@pytest.mark.parametrize("act", [500, 429, "stall", "hang up", *NONSENSE])
def test_what_a_server_fails_at_once_is_asked_again(answers, tmp_path, act):
    with Server(longer, [act, act]) as server:
        result = tally(ask(answers, server, tmp_path, *STALLED[act != "stall":]))
    assert len(server.requests) == 10 and result["wins_b"] == 4 and result["not_judged"] == 0


def test_what_is_never_judged_is_counted_and_asked_for_by_the_same_command(answers, tmp_path,
                                                                           capsys):
    with Server(longer, ["judge"] + [503, "hang up", "what?"]) as server:
        sheet = ask(answers, server, tmp_path)
        assert tally(sheet)["not_judged"] == 1 and tally(sheet)["wins_b"] == 3
        assert "item 2 of 8 was not judged" in capsys.readouterr().out
        before = len(server.requests)
        assert tally(ask(answers, server, tmp_path))["wins_b"] == 4
        assert len(server.requests) == before + 1


def test_the_points_of_one_judge_are_not_shown_as_anothers(answers, tmp_path):
    with Server(longer) as server:
        ask(answers, server, tmp_path, "--judge_model=one")
        with pytest.raises(ValueError, match="has points by one of http.*, this is two of http"):
            ask(answers, server, tmp_path, "--judge_model=two")
        sheet = ask(answers, server, tmp_path, "--judge_model=one")     # complete: nobody is asked
        assert len(server.requests) == 8
        del sheet["judge"]                                              # as one filled in by hand
        (tmp_path / "sheet.json").write_text(json.dumps(sheet))
        with pytest.raises(ValueError, match="has points by a person"):
            ask(answers, server, tmp_path, "--judge_model=one")


def test_a_server_that_refuses_or_is_not_there_is_named(answers, tmp_path):
    with Server(longer, [401]) as server:
        with pytest.raises(ValueError, match="refuses to judge: HTTP 401.*--key"):
            ask(answers, server, tmp_path)
    assert len(server.requests) == 1
    (tmp_path / "sheet.json").unlink()
    assert tally(ask(answers, server, tmp_path))["not_judged"] == 4     # it is gone by now


def test_a_redirect_does_not_take_the_key_to_another_server(answers, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abc")

    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", other.url + "/chat/completions")
        handler.end_headers()
    with Server(longer) as other, Server(longer, [redirect]) as server:
        with pytest.raises(ValueError, match="refuses to judge: HTTP 302 Found"):
            ask(answers, server, tmp_path, "--key=SOME_KEY")
    assert not other.requests


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_says_a_byte_now_and_then_is_not_waited_for(answers, tmp_path, start):
    def drip(handler):                                  # of the status line, a header, the body
        handler.wfile.write(start)
        while not server.release.wait(0.1) and time.monotonic() < began + 30:
            handler.wfile.write(b" ")
    began = time.monotonic()
    with Server(longer, [drip]) as server:
        result = tally(ask(answers, server, tmp_path, "--timeout=2"))
    assert time.monotonic() < began + 25 and result["wins_b"] == 4


@pytest.mark.parametrize("part", [b"A: b\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"A" * 1000])
def test_a_server_whose_headers_never_end_is_left_in_time(answers, tmp_path, part):
    """As fast as it can: headers, answers before the answer, one endless line."""
    def pour(handler):
        if part[:4] != b"HTTP":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(OSError):              # the judge has hung up
            while time.monotonic() < began + 60:
                handler.wfile.write(part * 1000)
        ended.append(time.monotonic())
    began, ended = time.monotonic(), []
    with Server(longer, [pour]) as server:
        result = tally(ask(answers, server, tmp_path, "--timeout=3"))
        assert result["wins_b"] == 4 and time.monotonic() < began + 50
        while not ended:                                # nobody goes on reading
            assert time.monotonic() < began + 50
            time.sleep(0.05)


@pytest.mark.parametrize("word", ["judge=foo", "judge=file:///etc/passwd", "timeout=0",
                                  "judge=http://"])
def test_an_address_that_is_none_is_said_before_anything_is_written(answers, tmp_path, word):
    out = tmp_path / "sheet.json"
    with pytest.raises(ValueError, match=f"^{word.partition('=')[0]}="):
        judge.main([*answers, f"--out={out}", f"--{word}"])
    assert not out.exists()


def test_a_server_that_says_too_much_is_asked_again(answers, tmp_path):
    def long(handler):
        body = b" " * 2 * judge.MOST_BYTES + b'{"choices": [{"message": {"content": "{}"}}]}'
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)
    with Server(longer, [long] * 3) as server:
        reasons = judge.judge_item({"prompt": "Q", "first": "a", "second": "bb"},
                                   JudgeConfig(judge=server.url))
    assert reasons == "the server's reply is longer than 1,000,000 bytes"


def test_a_judgement_is_found_in_linear_time(answers, tmp_path):
    with Server(longer, ["{" * 400_000]) as server:
        began = time.monotonic()
        ask(answers, server, tmp_path)
    assert time.monotonic() < began + 10                # a regular expression took 40 s


def test_what_a_server_says_does_not_command_the_terminal(answers, tmp_path, capsys):
    def refuse(handler):
        handler.send_response(401, "No\x1b[2J")
        handler.end_headers()

    def garble(handler):
        handler.wfile.write(b"\x1b[2J is no status\r\n\r\n")
    with Server(longer, [garble] * 3 + [refuse]) as server:
        with pytest.raises(ValueError, match=r"HTTP 401 No\\x1b\[2J; check"):
            ask(answers, server, tmp_path)
    shown = capsys.readouterr().out
    assert r"was not judged: \x1b[2J is no status" in shown and "\x1b" not in shown


def test_files_that_do_not_fit_together_are_refused(answers, tmp_path):
    a, b = answers
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": "Other?", "answer": "x"}\n')
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"prompt": "Q", "answer": "x"}\n' * 2)
    sheet = tmp_path / "sheet.json"
    judge.main([a, b, f"--out={sheet}"])
    for words, message in (
            ([a, str(odd)], "answer different prompts"), ([a, str(twice)], "for the second time"),
            ([a], "is no sheet"), ([], "name two files"), ([a, str(tmp_path / "no")], "there is"),
            ([b, a, f"--out={sheet}"], "a sheet of other answers"),
            ([a, b, "--judge=http://x", "--key=NO_SUCH_KEY"], "no such environment variable")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            judge.main(words)
