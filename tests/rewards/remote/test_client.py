"""What a client makes of servers that are wrong, slow, away or back: scores, failures, or one error that says which."""

import json
import math
import time

import pytest
import torch

from rpo.config.load import load_config
from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward, load_rewards
from rpo.rewards.base import ask
from rpo.rewards.differentiable import require_differentiable
from rpo.rewards.function import FunctionReward
from rpo.rewards.remote.client import Options, RemoteReward, address_of
from rpo.runs.train_config import GRPORunConfig
from tests.rewards.remote.servers import LISTED, answering, response

IMAGES, PROMPTS = torch.rand(3, 3, 8, 8), ["a", "b", "c"]
QUICK = "/mine?patience=0.4&seconds=5"


def said(scores=(1.0, 2.0, 3.0), failures=(None, None, None), info=None):
    return {"scores": list(scores), "failures": list(failures), "info": info or {}}


def asked_of(place, more=QUICK, **how):
    return ask(load_reward(place + more), IMAGES, PROMPTS, name="mine", **how)


def test_an_address_is_a_reward_and_asks_nothing_before_it_is_asked():
    reward = load_reward("http://nowhere.invalid:1/ocr?seconds=7")
    assert isinstance(reward, FunctionReward) and isinstance(reward.function, RemoteReward) and reward.takes_metadata
    both = {"http://nowhere.invalid:1/ocr": 2.0, "https://other/wise?score=wiscore&seconds=3": 1.0}
    assert dict(load_rewards(both).weights) == {"http:ocr": 2.0, "http:wise.wiscore": 1.0}
    with pytest.raises(InputError, match="twice"):
        load_rewards({"http://one/ocr": 1.0, "http://two/ocr": 1.0})
    with pytest.raises(InputError, match="no gradient"):
        require_differentiable(load_rewards("http://nowhere.invalid:1/ocr"))


def test_a_configuration_takes_addresses_as_they_are():
    words = ["rewards={http://127.0.0.1:8765/ocr?seconds=60&batch=8: 1.0, my_scores:bright: 0.5}"]
    words += ["gates={my_scores:bright: http://127.0.0.1:8765/ocr > 0.5}"]
    config = load_config(GRPORunConfig, None, words)
    assert dict(config.rewards) == {"http://127.0.0.1:8765/ocr?seconds=60&batch=8": 1.0, "my_scores:bright": 0.5}
    assert config.gates == {"my_scores:bright": "http://127.0.0.1:8765/ocr > 0.5"}


def test_parts_of_an_address():
    found = address_of("https://[::1]:9/clip-score:owner/name?batch=2&patience=1.5&files=/dev/shm")
    assert (found.place.host, found.place.port, found.place.is_encrypted) == ("::1", 9, True)
    assert str(found.place) == "https://[::1]:9" and found.name == "clip-score:owner/name"
    assert found.options == Options(batch=2, patience=1.5, files="/dev/shm")
    assert address_of("http://h/my_scores%3Abright").name == "my_scores:bright"


@pytest.mark.parametrize(
    "address",
    [
        "http://host:8765",
        "http://host:8765/",
        "http:///ocr",
        "http://host:many/ocr",
        "http://me:secret@host/ocr",
        "http://host/ocr#part",
        "http://host/ocr?second=3",
        "http://host/ocr?seconds=0",
        "http://host/ocr?seconds=nan",
        "http://host/ocr?batch=1.5",
        "http://host/ocr?files=",
        "http://host/ocr?seconds",
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError) as caught:
        load_reward(address)
    assert "secret" not in str(caught.value)


def test_scores_failures_and_info():
    told = said([1, None, 3.5], [None, "too dark", None], {"letters": 4})
    with answering(response(told)) as (place, _):
        found = asked_of(place, may_fail=True)
    assert found.values[[0, 2]].tolist() == [1.0, 3.5] and math.isnan(found.values[1])
    assert found.info == {"letters": 4.0} and found.failures == {1: "too dark"}


def test_a_failure_is_an_error_where_none_may_fail():
    dark = response(said([1, None, 3], [None, "too dark", None]))
    with answering(dark) as (place, _), pytest.raises(RewardError, match="too dark") as caught:
        asked_of(place)
    assert caught.value.indices == (1,)


def test_images_are_asked_about_in_batches():
    first, second = said([1, 2], [None, None], {"x": 1.0}), said([3], [None], {"x": 4.0})
    with answering(response(first), response(second)) as (place, asked):
        found = asked_of(place, QUICK + "&batch=2")
    assert found.values.tolist() == [1, 2, 3] and found.info == {"x": 2.0}
    assert [json.loads(body)["prompts"] for _, body in asked] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_what_else_is_said_is_of_the_batches_that_were_judged(failed):
    parts = [said([number], [None], {"x": number}) for number in (1.0, 2.0, 6.0)]
    parts[failed] = said([None], ["away"])
    with answering(*map(response, parts)) as (place, _):
        found = asked_of(place, QUICK + "&batch=1", may_fail=True)
    assert found.info == {"x": (4.0, 3.5, 1.5)[failed]} and found.failures == {failed: "away"}


@pytest.mark.parametrize("token", ["hush-hush\n", "hush hush", "hush☃"])
def test_a_token_that_no_header_can_hold_is_not_told(token, monkeypatch):
    monkeypatch.setenv("RPO_REWARD_TOKEN", token)
    with answering(response(said())) as (place, asked):
        with pytest.raises(RewardError, match="RPO_REWARD_TOKEN") as caught:
            asked_of(place)
        assert not asked and "hush" not in str(caught.value)


WRONG = {
    "too few": response(said([1, 2], [None, None])),
    "too many": response(said([1, 2, 3, 4], [None] * 4)),
    "failures of others": response(said([1, 2, 3], [None])),
    "text": response(said([1, "2", 3])),
    "truth": response(said([1, True, 3])),
    "nested": response(said([[1], [2], [3]])),
    "NaN": response(json.dumps(said([1, math.nan, 3])).encode()),
    "Infinity": response(json.dumps(said([1, math.inf, 3])).encode()),
    "beyond float32": response(said([1, 1e300, 3])),
    "beyond float64": response(b'{"scores": [1, 1e999, 3], "failures": [null, null, null], "info": {}}'),
    "both": response(said([1, 2, 3], [None, "failed", None])),
    "another key": response({**said(), "more": 1}),
    "missing key": response({"scores": [1, 2, 3]}),
    "a list": response([1, 2, 3]),
    "null": response(None),
    "nothing": response(b""),
    "no JSON": response(b"1 2 3"),
    "no text": response(b"\x80\x04\x95\xff\xfe"),
    "deep": response(b"[" * 100_000),
    "HTML": response(b"<html>Squid</html>", kind="text/html"),
    "HTML as JSON": response(b"<html>Squid</html>"),
    "pickle": response(b"\x80\x04K\x01.", kind="application/octet-stream"),
    "404": response({"detail": "no such place"}, status="404 Not Found"),
    "500": response(b"Internal Server Error", status="500 Oh", kind="text/plain"),
    "redirect": b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "10 MB": response(json.dumps(said([1] * 3_400_000, [None])).encode()),
    "10 MB without a length": b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 10_000_000,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_ends_it_at_once_and_nothing_is_taken(name, tmp_path):
    with answering(WRONG[name], response(said())) as (place, asked):
        with pytest.raises(RewardError) as caught:
            asked_of(place, may_fail=True, evidence=tmp_path)
        assert len(asked) == 1
    assert "mine" in str(caught.value) and len(str(caught.value)) < 3000
    assert name == "beyond float32" or place in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 1


def cut_short(connection):
    connection.sendall(response(said())[:-5])


def dropped(connection):
    connection.close()


BUSY = response({"detail": "busy"}, status="503 Service Unavailable")


@pytest.mark.parametrize("passing", [cut_short, dropped, BUSY, response(b"", status="502 Bad Gateway")])
def test_what_may_pass_is_asked_again(passing):
    with answering(passing, passing, response(said())) as (place, asked):
        assert asked_of(place, "/mine?patience=20").values.tolist() == [1, 2, 3]
    assert len(asked) == 3 and len({body for _, body in asked}) == 1


@pytest.mark.parametrize("passing", [cut_short, dropped, BUSY])
def test_and_given_up_when_the_patience_is_at_an_end(passing):
    with answering(passing) as (place, asked), pytest.raises(RewardError, match="does not answer.*resume") as caught:
        asked_of(place)
    assert place in str(caught.value) and "'mine'" in str(caught.value) and 1 <= len(asked) <= 3


def test_a_place_where_nobody_listens():
    with answering(response(said())) as (place, _):
        pass
    start = time.monotonic()
    with pytest.raises(RewardError, match=f"{place}.*does not answer"):
        asked_of(place)
    assert time.monotonic() - start < 5


def dripping(connection):
    """A byte at a time, so that no silence is long."""
    for byte in response(said()):
        time.sleep(0.05)
        connection.sendall(bytes([byte]))


def silent(connection):
    time.sleep(1.0)


@pytest.mark.parametrize("slow", [dripping, silent])
def test_a_slow_server_is_given_up_in_time(slow):
    start = time.monotonic()
    with answering(slow) as (place, _), pytest.raises(RewardError, match="within 0.3 seconds"):
        asked_of(place, "/mine?seconds=0.3&patience=0.3")
    assert time.monotonic() - start < 3


LISTS = {
    "another name": {"rewards": ["yours"], "rpo": LISTED["rpo"]},
    "none": {"rewards": []},
    "another form": {"rewards": ["mine"], "rpo": {**LISTED["rpo"], "form": 2}},
    "another thing": {"models": ["mine"]},
    "HTML": response(b"<html>", kind="text/html"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_server_that_does_not_have_it_is_asked_for_nothing(name):
    with answering(response(said()), listed=LISTS[name]) as (place, asked), pytest.raises(RewardError, match="mine"):
        asked_of(place)
    assert not asked


def test_too_much_at_once_is_not_sent():
    small = {**LISTED, "rpo": {**LISTED["rpo"], "max_bytes": 500}}
    with answering(response(said()), listed=small) as (place, asked), pytest.raises(RewardError, match="batch="):
        asked_of(place)
    assert not asked


def test_the_token_is_sent_and_in_no_message(monkeypatch):
    monkeypatch.setenv("RPO_REWARD_TOKEN", "abcdef-secret")
    echo = response({"detail": "abcdef-secret is not it"}, status="401 Unauthorized")
    with answering(echo) as (place, asked), pytest.raises(RewardError) as caught:
        asked_of(place)
    assert b"Authorization: Bearer abcdef-secret" in asked[0][0] and "secret" not in str(caught.value)
