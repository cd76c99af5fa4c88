"""A server that does everything wrong: what is a fault, what stops the run, and what is asked only once."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from rpo.config.load import load_config
from rpo.curation.audit import AuditConfig
from rpo.curation.components import load_critic, load_instructor
from rpo.curation.curate_config import ChatConfig
from rpo.curation.judge import load_judge
from rpo.curation.records import RAW_LIMIT, Critique, Fault, Problem, Unavailable
from rpo.curation.vlm.answers import answer_schema
from tests.curation.vlm.fake_server import SMALL_QUESTION, Response, fake_server, in_turn, kept_in, saying, text_of

GOOD = '{"problems": [{"what": "the hat is blue", "where": "", "severity": 2}], "keep": [], "overall": 6}'
VALUE = Critique(problems=(Problem(what="the hat is blue", severity=2),), overall=6)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def config(server, **changes):
    return ChatConfig(**{"kind": "server", "model": "m", "base_url": server.url, "max_retries": 2, **changes})


def ask_once(server, **changes):
    (answer,) = load_critic(config(server, **changes))([IMAGE], ["a red hat"])
    return answer


def test_a_good_answer_and_what_was_asked_for_it():
    with fake_server(saying(GOOD)) as server:
        assert ask_once(server, temperature=0.5, seed=7, max_tokens=99) == VALUE
    (request,) = server.requests
    image, text = request["messages"][0]["content"]
    scheme, _, data = image["image_url"]["url"].partition(",")
    assert scheme == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(IMAGE))
    assert '"a red hat"' in text["text"] and "JSON schema" not in text["text"]
    assert request["response_format"]["json_schema"]["schema"] == answer_schema(Critique)
    assert request["response_format"]["json_schema"]["strict"] is True
    assert (request["model"], request["temperature"], request["seed"], request["max_tokens"]) == ("m", 0.5, 7, 99)


def test_the_key_comes_from_the_environment_only(monkeypatch):
    with fake_server(saying(GOOD)) as server:
        assert ask_once(server) == VALUE
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        critic = load_critic(config(server))
        assert critic([IMAGE], ["a hat"]) == [VALUE]
    assert [headers["authorization"] for headers in server.headers] == ["Bearer none", "Bearer sk-secret"]
    assert "sk-secret" not in json.dumps(dict(critic.identity))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="no base_url is set, .* has no OPENAI_API_KEY; set the key there, or give"):
        load_critic(ChatConfig(kind="server", model="m"))


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("", "empty", "the answer is empty"),
        (None, "empty", "the answer is empty"),
        ("What a lovely hat!", "parse_error", "there is no JSON object"),
        ('{"problems": [], "overall": "six"}', "invalid", "overall: Input should be a valid integer (got 'six')"),
        ('{"problems": []}', "invalid", "overall: Field required"),
    ],
)
def test_what_a_model_says_wrongly_is_a_fault_with_its_words(content, kind, message):
    with fake_server(saying(content)) as server:
        fault = ask_once(server)
    assert isinstance(fault, Fault) and fault.kind == kind
    assert message in fault.message and fault.raw == (content or "")
    assert len(server.requests) == 1, "the model has answered; asking again would be guessing"


def test_a_refusal_a_filter_and_a_cut_answer():
    behaviour = in_turn(
        [
            Response(None, message={"refusal": "I will not judge people."}),
            Response(None, finish_reason="content_filter"),
            Response(GOOD[:50], finish_reason="length"),
        ]
    )
    with fake_server(behaviour) as server:
        refused, filtered, cut = (ask_once(server) for _ in range(3))
    assert refused == Fault(
        "invalid", "the model refused to answer: I will not judge people.", "I will not judge people."
    )
    assert filtered.message == "the model refused to answer: content filter"
    assert cut.kind == "parse_error" and cut.message.endswith("raise max_tokens") and cut.raw == GOOD[:50]


def test_megabytes_are_a_fault_of_twenty_kilobytes():
    with fake_server(saying("hat " * 1_000_000)) as server:
        fault = ask_once(server)
    assert fault.kind == "parse_error" and "4000000 characters" in fault.message and len(fault.raw) == RAW_LIMIT


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (Response(body=b"<html>Welcome to the hotel's network</html>", content_type="text/html"), "raised"),
        (Response(body=b'{"choices": [{"mess'), "raised"),
        (Response(body=b"{}"), "empty"),
        (Response(body=b'{"id":"x","object":"chat.completion","created":0,"model":"m","choices":[]}'), "empty"),
        (Response(body=b'{"error": "model overloaded"}'), "empty"),
        (Response(body=b"[1, 2]"), "raised"),
        (Response(body=b'{"choices": [{"index": 0}]}'), "empty"),
        (Response(body=b'{"choices": "none"}'), "empty"),
    ],
)
def test_a_body_that_is_no_completion_is_a_fault_with_the_body(response, kind):
    with fake_server(lambda request: response) as server:
        fault = ask_once(server)
    assert isinstance(fault, Fault) and fault.kind == kind, fault
    assert fault.raw


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408, 409])
def test_what_passes_is_asked_again(status):
    with fake_server(in_turn([Response("busy", status=status)] * 2 + [Response(GOOD)])) as server:
        assert ask_once(server) == VALUE
    assert len(server.requests) == 3


def test_a_connection_lost_in_the_middle_of_an_answer_is_asked_again():
    with fake_server(in_turn([Response(GOOD, is_cut_off=True), Response(GOOD)])) as server:
        assert ask_once(server) == VALUE
    assert len(server.requests) == 2


def test_a_slow_answer_is_asked_for_again():
    with fake_server(in_turn([Response(GOOD, wait_seconds=60), Response(GOOD)])) as server:
        assert ask_once(server, timeout_seconds=1) == VALUE
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_server_that_serves_nobody_stops_the_run(status):
    with (
        fake_server(lambda _: Response("no service", status=status)) as server,
        pytest.raises(Unavailable, match=rf"^the server at {server.url} does not answer for model 'm': .*{status}"),
    ):
        ask_once(server)
    assert len(server.requests) == {401: 1, 403: 1, 404: 1, 429: 3}.get(status, 4)


def test_a_server_that_is_down_stops_the_run():
    with fake_server(saying(GOOD)) as server:
        pass
    with pytest.raises(Unavailable, match="Connection error. ← .*; see that it runs and knows the model, then run aga"):
        ask_once(server)


def test_a_server_that_never_comes_to_an_end_stops_the_run():
    with (
        fake_server(lambda _: Response(GOOD, wait_seconds=60)) as server,
        pytest.raises(Unavailable, match="timed out"),
    ):
        ask_once(server, timeout_seconds=0.1, max_retries=1)


@pytest.mark.parametrize("status", [400, 413, 422, 500, 503])
def test_a_question_that_breaks_a_working_server_is_its_own_fault(status):
    def behave(request):
        is_bad = "a cursed hat" in text_of(request)
        return Response("cannot take this", status=status) if is_bad else Response(GOOD)

    with fake_server(behave) as server:
        critic = load_critic(config(server))
        good, bad, other = critic([IMAGE] * 3, ["a hat", "a cursed hat", "a red hat"])
    assert good == other == VALUE
    assert bad.kind == "raised" and "cannot take this" in bad.raw
    assert SMALL_QUESTION in map(text_of, server.requests)


def test_a_question_that_takes_for_ever_is_its_own_fault():
    def behave(request):
        return Response(GOOD, wait_seconds=60 if "slow hat" in text_of(request) else 0)

    with fake_server(behave) as server:
        (fault,) = load_critic(config(server, timeout_seconds=1, max_retries=0))([IMAGE], ["a slow hat"])
    assert fault.kind == "raised" and "APITimeoutError" in fault.message


def test_a_server_without_json_schema_is_refused_loudly_until_the_prompt_is_asked_to_do():
    def behave(request):
        if "response_format" in request:
            return Response("response_format json_schema is not supported", status=400)
        return Response(f"Sure!\n```json\n{GOOD}\n```")

    with fake_server(behave) as server:
        with pytest.raises(
            Unavailable, match=r'refuses all .*: .*400.*; if it does not know json_schema, .* "prompt"$'
        ):
            ask_once(server)
        assert ask_once(server, answer_format="prompt") == VALUE
        assert json.dumps(answer_schema(Critique)) in text_of(server.requests[-1])


OPENAI_SAYS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("max_tokens",), OPENAI_SAYS),
        (("temperature",), "Unsupported value: 'temperature' does not support 0 with this model. Only 1 is supported."),
        (("seed",), "Extra inputs are not permitted: seed"),
        (("max_tokens", "temperature"), "unknown fields: max_tokens, temperature"),
    ],
)
def test_a_setting_that_a_server_refuses_is_named_and_may_be_left_out(names, said):
    def behave(request):
        return Response(said, status=400) if set(names) & set(request) else Response(GOOD)

    listed = " and ".join(names)
    with fake_server(behave) as server:
        with pytest.raises(Unavailable) as caught:
            ask_once(server)
        assert str(caught.value).startswith(
            f"the server at {server.url} refuses all questions for model 'm': Error code: 400 - "
        )
        assert said in str(caught.value)
        assert str(caught.value).endswith(f"; if it does not take {listed}, set {listed} to null, which is not sent")
        assert ask_once(server, **dict.fromkeys(names)) == VALUE
    sent = {"max_tokens", "temperature", "seed"} & set(server.requests[-1])
    assert sent == {"max_tokens", "temperature", "seed"} - set(names)


def test_a_setting_that_is_left_out_is_not_blamed_and_is_part_of_the_identity():
    with fake_server(lambda _: Response("no temperature, please", status=400)) as server:
        with pytest.raises(Unavailable, match='if it does not know json_schema, set answer_format to "prompt"$'):
            ask_once(server, temperature=None)
        with pytest.raises(Unavailable, match="see that it runs and knows the model, then run again$"):
            ask_once(server, temperature=None, answer_format="prompt")
        identities = [dict(load_critic(config(server, temperature=one)).identity) for one in (None, 0.0)]
    assert [one["temperature"] for one in identities] == ["None", "0.0"]


def test_null_in_a_file_leaves_a_setting_out(tmp_path):
    (tmp_path / "run.yaml").write_text("critic: {max_tokens: null, temperature: null}\njudge: {seed: null}\n")
    found = load_config(AuditConfig, tmp_path / "run.yaml", ["judge.max_tokens=null"])
    assert (found.critic.max_tokens, found.critic.temperature, found.critic.seed) == (None, None, 0)
    assert (found.judge.max_tokens, found.judge.temperature, found.judge.seed) == (None, 0.0, None)


def test_never_more_at_once_than_asked_for():
    three, left = threading.Barrier(3), iter(range(3))

    def behave(_):
        if next(left, None) is not None:  # the first three wait for each other
            three.wait(timeout=60)
        return Response(GOOD, wait_seconds=0.03)

    with fake_server(behave) as server:
        critic = load_critic(config(server, concurrency=3))
        with ThreadPoolExecutor(4) as pool:
            batches = [pool.submit(critic, [IMAGE] * 5, [f"hat {index}"] * 5) for index in range(4)]
            assert all(batch.result() == [VALUE] * 5 for batch in batches)
    assert server.most_at_once == 3
    assert len(server.requests) == 20


def test_the_order_of_a_batch_is_kept():
    def behave(request):
        number = int(text_of(request).rpartition("hat ")[2].split('"')[0])
        return Response(f'{{"problems": [], "keep": [], "overall": {number}}}', wait_seconds=0.02 * (number % 3))

    with fake_server(behave) as server:
        answers = load_critic(config(server))([IMAGE] * 9, [f"hat {number}" for number in range(1, 10)])
    assert [answer.overall for answer in answers] == list(range(1, 10))


def test_a_question_is_asked_once(tmp_path):
    with fake_server(saying(GOOD)) as server:
        for _ in range(2):
            critic = load_critic(config(server), kept_in(tmp_path))
            assert critic([IMAGE, IMAGE.rotate(90)], ["a hat", "a hat"]) == [VALUE] * 2
        assert len(server.requests) == 2
        assert load_critic(config(server, cache=False), kept_in(tmp_path))([IMAGE], ["a hat"]) == [VALUE]
        assert len(server.requests) == 3
    assert load_critic(config(server), kept_in(tmp_path))([IMAGE], ["a hat"]) == [VALUE], "no server is needed any more"
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 2 and all(path.suffix == ".json" for path in kept)


@pytest.mark.parametrize("change", ["model", "temperature", "seed", "max_tokens", "answer_format", "prompt", "image"])
def test_another_question_is_asked(change, tmp_path):
    (tmp_path / "mine.txt").write_text("Look at {{ caption }}. {{ schema }}")
    changes = {
        "model": "n",
        "temperature": 1.0,
        "seed": 1,
        "max_tokens": 5,
        "answer_format": "prompt",
        "prompt": str(tmp_path / "mine.txt"),
    }
    other = {name: value for name, value in changes.items() if name == change}
    image = IMAGE.copy()
    if change == "image":
        image.putpixel((3, 3), (0, 0, 0))
    with fake_server(saying(GOOD)) as server:
        load_critic(config(server), kept_in(tmp_path / "cache"))([IMAGE], ["a hat"])
        load_critic(config(server, **other), kept_in(tmp_path / "cache"))([image], ["a hat"])
    assert len(server.requests) == 2


def test_another_caption_and_another_address_are_asked(tmp_path):
    for _ in range(2):
        with fake_server(saying(GOOD)) as server:
            critic = load_critic(config(server), kept_in(tmp_path))
            critic([IMAGE], ["a hat"])
            critic([IMAGE], ["a cap"])
        assert len(server.requests) == 2


def test_answers_that_were_wrong_are_kept_but_failures_are_not(tmp_path):
    with fake_server(saying("What a hat!")) as server:
        faults = [load_critic(config(server), kept_in(tmp_path))([IMAGE], ["a hat"]) for _ in range(2)]
        assert faults[0] == faults[1] and len(server.requests) == 1
    with fake_server(in_turn([Response(body=b"{}"), Response(GOOD)])) as server:
        assert load_critic(config(server), kept_in(tmp_path))([IMAGE], ["a hat"])[0].kind == "empty"
        assert load_critic(config(server), kept_in(tmp_path))([IMAGE], ["a hat"]) == [VALUE]


def test_a_damaged_cache_file_is_asked_again(tmp_path):
    with fake_server(saying(GOOD)) as server:
        load_critic(config(server), kept_in(tmp_path))([IMAGE], ["a hat"])
        (kept,) = tmp_path.rglob("*.json")
        for damage in (b"", kept.read_bytes()[:20], b"[]", b'{"other": 1}'):
            kept.write_bytes(damage)
            assert load_critic(config(server), kept_in(tmp_path))([IMAGE], ["a hat"]) == [VALUE]
    assert len(server.requests) == 5


def test_a_server_killed_half_way_and_restarted_costs_only_what_was_in_flight(tmp_path):
    enough = threading.Semaphore(4)

    def dying(request):
        if enough.acquire(blocking=False):
            return Response(GOOD)
        return Response("shutting down", status=503)

    captions = [f"hat {number}" for number in range(10)]
    with fake_server(dying) as server:
        critic = load_critic(config(server, concurrency=2, max_retries=0), kept_in(tmp_path))
        with pytest.raises(Unavailable):
            critic([IMAGE] * 10, captions)
        answered = len(list(tmp_path.rglob("*.json")))
        assert answered == 4
    with fake_server(saying(GOOD), server.port) as restarted:
        assert critic([IMAGE] * 10, captions) == [VALUE] * 10
    assert len(restarted.requests) == 10 - answered


def test_the_identity_says_what_decides_and_not_where(tmp_path):
    with fake_server(saying(GOOD)) as server:
        one, other = load_critic(config(server)), load_critic(config(server, base_url="http://elsewhere:1/v1"))
    assert one.identity == other.identity
    assert one.identity.keys() == {
        *("kind", "model", "answer_format", "max_tokens", "temperature", "seed"),
        "prompt_sha256",
    }
    (tmp_path / "mine.txt").write_text("Look at {{ caption }}.")
    mine = load_critic(config(server, prompt=str(tmp_path / "mine.txt")))
    assert mine.identity["prompt_sha256"] != one.identity["prompt_sha256"]


def test_configurations_that_cannot_be_asked():
    with pytest.raises(ValueError, match="^a server is to be asked, but model is empty; give the name"):
        load_critic(ChatConfig(kind="server", base_url="http://127.0.0.1:1/v1"))
    with pytest.raises(
        ValueError,
        match="^ChatConfig sets 'concurrency' to 0, but a whole number",
    ):
        load_critic(ChatConfig(kind="server", model="m", base_url="http://127.0.0.1:1/v1", concurrency=0))


def test_the_instructor_is_told_caption_and_critique():
    with fake_server(saying('{"instructions": ["make the hat red"]}')) as server:
        instructor = load_instructor(ChatConfig(kind="server", model="m", base_url=server.url))
        (answer,) = instructor([IMAGE], ["a red hat"], [VALUE])
    assert answer.text == "make the hat red"
    (text,) = server.texts()
    assert '"a red hat"' in text and '"what": "the hat is blue"' in text
    assert server.requests[0]["response_format"]["json_schema"]["name"] == "Instructions"


def test_instructions_that_are_no_orders_are_faults_with_the_words():
    with fake_server(saying('{"instructions": ["make the hat red", "the hat is too big"]}')) as server:
        instructor = load_instructor(ChatConfig(kind="server", model="m", base_url=server.url))
        (fault,) = instructor([IMAGE], ["a red hat"], [VALUE])
    assert fault.kind == "invalid" and fault.raw == "make the hat red; the hat is too big"
    assert fault.message.startswith("the instruction 'the hat is too big' begins with 'the', so it is no order; ")


def test_the_judge_is_asked_in_both_orders():
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (255, 255, 255))

    def prefers_light(request):
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
            for part in request["messages"][0]["content"][:2]
        ]
        first, second = (picture.getpixel((0, 0))[0] for picture in pictures)
        winner = "tie" if first == second else "first" if first > second else "second"
        return Response(json.dumps({"reason": "light", "winner": winner}))

    judge_config = {"kind": "server", "model": "m"}
    with fake_server(prefers_light) as server:
        judge = load_judge(ChatConfig(**judge_config, base_url=server.url))
        verdicts = judge([black, white, black], [white, black, black], ["a", "b", "c"])
    assert verdicts == ["second", "first", "tie"] and len(server.requests) == 6
    with fake_server(saying('{"reason": "it stands first", "winner": "first"}')) as server:
        judge = load_judge(ChatConfig(**judge_config, base_url=server.url))
        (fault,) = judge([black], [white], ["a"])
        (both,) = judge.orders([black], [white], ["a"])
    assert (both.forward, both.backward, both.is_consistent) == ("first", "second", False)
    assert fault == both.verdict
    assert fault.kind == "invalid" and fault.message == (
        "the verdict depends on the order of the images: first is better in this order, second in the other"
    )
    with fake_server(saying("Both are fine.")) as server:
        (fault,) = load_judge(ChatConfig(**judge_config, base_url=server.url))([black], [white], ["a"])
    assert fault.kind == "parse_error" and fault.raw == "Both are fine."
