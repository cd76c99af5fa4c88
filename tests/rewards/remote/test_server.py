"""What a server answers: to its own clients, to those of UniRL, and to whatever else is sent."""

import base64
import http.client
import io
import json
import math
import os
import pickle
import socket
import struct
import threading
import time
import zlib
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from rpo.data.pixels import to_pixels
from rpo.data.preference import encode_png
from rpo.data.prompts import AnnotatedPrompt
from rpo.rewards import REWARDS, RewardError, load_reward
from rpo.rewards.base import ask
from rpo.rewards.ranges import RANGES
from rpo.rewards.remote import form
from rpo.rewards.remote.server import Limits
from rpo.rewards.version import version_of
from tests.rewards.remote.servers import serving

IMAGES = (torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
PROMPTS = ["a", "b", "c", "d"]
PNGS = [encode_png(one) for one in to_pixels(IMAGES)]


def light(images, prompts):
    return images.mean((1, 2, 3))


def wanted(images, prompts, metadata):
    return [one.get("worth", -1) for one in metadata], {"words": [len(text.split()) for text in prompts]}


def shy(images, prompts):
    """Raises for some by their places, and for others without saying which."""
    if "all" in prompts:
        raise RuntimeError("out of memory")
    wrong = [index for index, text in enumerate(prompts) if text == "odd"]
    if wrong:
        raise RewardError("an odd prompt", indices=wrong, batch_size=len(prompts))
    return [math.nan if text == "dark" else 5.0 for text in prompts]


def infinite(images, prompts):
    return [1.0, math.inf, 3.0, 4.0]


REWARDS_HERE = {"light": light, "wanted": wanted, "shy": shy, "infinite": infinite}


@pytest.fixture(scope="module")
def server():
    with serving(REWARDS_HERE) as found:
        yield found


def asked(server, name, prompts=PROMPTS, more="", images=IMAGES):
    reward = load_reward(f"{server.address}/{name}?patience=5{more}")
    return ask(reward, images, prompts, name=name, may_fail=True)


def send(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=20)
    connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def post(server, value, **headers):
    return send(server, "POST", "/score", json.dumps(value), headers)


def test_the_same_numbers_as_in_this_process(server):
    assert torch.equal(asked(server, "light").values, ask(light, IMAGES, PROMPTS, name="light").values)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_nothing(batch_size):
    with serving(REWARDS_HERE, batch_size=batch_size) as server:
        assert torch.equal(asked(server, "light", more="&batch=2").values, light(IMAGES, PROMPTS))


def test_what_is_known_of_prompts_comes_along(server):
    prompts = [AnnotatedPrompt("a b", {"worth": 7}), "c", AnnotatedPrompt("d", {"worth": 2.5}), "e f g"]
    found = asked(server, "wanted", prompts)
    assert found.values.tolist() == [7, -1, 2.5, -1] and found.info == {"words": 1.75}


def test_what_a_reward_raises_is_a_failure_of_the_images_it_names(server):
    found = asked(server, "shy", ["odd", "fine", "dark", "odd"])
    assert found.values[1] == 5 and found.values[[0, 2, 3]].isnan().all()
    assert [("odd prompt" in found.failures[row]) for row in (0, 2, 3)] == [True, False, True]


def test_or_of_all_where_it_names_none(server):
    found = asked(server, "shy", ["all", "fine", "fine", "fine"])
    assert found.values.isnan().all() and all("out of memory" in why for why in found.failures.values())
    assert len(found.failures) == 4
    assert asked(server, "light").values.isfinite().all()  # it lives


def test_an_infinite_score_is_a_failure(server):
    found = asked(server, "infinite")
    assert (
        found.values[1].isnan() and found.values[[0, 2, 3]].isnan().sum() == 3
    )  # asked again it answers four for three


def test_files_are_read_from_the_folder_that_is_shared(tmp_path):
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir(), other.mkdir()
    (other / "x.png").write_bytes(PNGS[0])
    (shared / "link.png").symlink_to(other / "x.png")
    with serving(REWARDS_HERE, limits=Limits(files=shared)) as server:
        assert torch.equal(asked(server, "light", more=f"&files={shared}").values, light(IMAGES, PROMPTS))
        assert [one.name for one in shared.iterdir()] == ["link.png"]
        question = {"reward": "light", "prompts": ["a"], "metadata": [{}]}
        for path in (other / "x.png", shared / "../other/x.png", shared / "link.png", other / "none.png"):
            assert post(server, {**question, "files": [str(path)]})[0] == 403
        os.mkfifo(shared / "pipe.png")
        for name in ("none.png", "pipe.png", ""):
            assert post(server, {**question, "files": [str(shared / name)]})[0] == 400
        assert post(server, {**question, "files": ["\0"]})[0] == 400
        with pytest.raises(RewardError, match="403"):
            asked(server, "light", more=f"&files={other}")


def test_files_are_not_read_unless_a_folder_is_named(server, tmp_path):
    with pytest.raises(RewardError, match="403"):
        asked(server, "light", more=f"&files={tmp_path}")


def test_health_and_list(server):
    assert send(server, "GET", "/health")[1]["status"] == "ok"
    before = send(server, "GET", "/health")[1]["rewards"]["shy"]
    asked(server, "shy", ["odd", "fine", "fine", "fine"])
    after = send(server, "GET", "/health")[1]["rewards"]["shy"]
    assert (after["asked"] - before["asked"], after["failed"] - before["failed"]) == (4, 1)
    status, listed = send(server, "GET", "/rewards")
    assert status == 200 and listed["rewards"] == list(REWARDS_HERE)
    with serving({name: name for name in ("ocr", "hps-v2.1", "shapes-clip")}) as other:
        details = send(other, "GET", "/rewards")[1]["rpo"]["details"]
    assert details == {
        "ocr": {"is_differentiable": False, "range": [0, 1]},
        "hps-v2.1": {"is_differentiable": True, "range": [0.22, 0.32]},
        "shapes-clip": {"is_differentiable": True, "range": None},
    }
    assert set(RANGES) < set(REWARDS)


def test_a_version_is_that_of_the_reward_that_is_served():
    with serving({"a/light": light, "shapes-clip": "shapes-clip"}) as server:
        for name, reward in (("a/light", light), ("shapes-clip", load_reward("shapes-clip"))):
            assert version_of(load_reward(f"{server.address}/{name}")) == version_of(reward)
        assert send(server, "GET", "/version/other")[0] == 404


QUESTION = {
    "reward": "light",
    "images": [base64.b64encode(PNGS[0]).decode()],
    "prompts": ["a"],
    "metadata": [{}],
}


def huge():
    """A PNG of 30000 × 30000 pixels in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


WRONG = {
    "no image": ({"images": []}, 400),
    "two images": ({"images": QUESTION["images"] * 2}, 400),
    "no base64": ({"images": ["…"]}, 400),
    "no picture": ({"images": [base64.b64encode(b"GIF89a?").decode()]}, 400),
    "a huge picture": ({"images": [huge()]}, 400),
    "text for prompts": ({"prompts": "a"}, 400),
    "numbers for prompts": ({"prompts": [1]}, 400),
    "images and files": ({"files": ["/etc/hostname"]}, 400),
    "another reward": ({"reward": "lihgt"}, 404),
    "a key too many": ({"pickle": ""}, 400),
}


def test_what_json_cannot_hold_is_the_questions_fault(server):
    for body in (b"[" + b"1" * 5000 + b"]", json.dumps(QUESTION).replace("{}", "1e999").encode()):
        assert send(server, "POST", "/score", body)[0] == 400


@pytest.mark.parametrize("name", WRONG)
def test_wrong_questions(name, server):
    change, status = WRONG[name]
    found, answer = post(server, QUESTION | change)
    assert found == status and answer["detail"]
    assert name != "another reward" or "light" in answer["detail"]
    assert post(server, QUESTION)[0] == 200


def test_images_that_unfold_to_more_than_there_is_room_for_are_refused_together(server, monkeypatch):
    monkeypatch.setattr(form, "MAX_PIXELS_AT_ONCE", 3 * 16 * 24)
    every = [base64.b64encode(png).decode() for png in PNGS]
    for count, status in ((3, 200), (4, 413)):
        question = {"images": every[:count], "prompts": PROMPTS[:count], "metadata": [{}] * count}
        assert post(server, QUESTION | question)[0] == status
        assert post(server, unirl(PNGS[:count]))[0] == status


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_pickle_is_refused_and_not_read(server, capsys):
    body = pickle.dumps(Evil())
    for kind in ("application/octet-stream", "application/pickle", "text/plain"):
        status, answer = send(server, "POST", "/score", body, {"Content-Type": kind})
        assert status == 415 and "pickle" in answer["detail"]
    assert send(server, "POST", "/score", body)[0] == 400  # as JSON it is none
    assert capsys.readouterr().out == ""


def test_a_request_beyond_the_limit_is_told_so():
    with serving(REWARDS_HERE, limits=Limits(max_bytes=10_000)) as server:
        for size in (10_001, 20_000_000):
            status, answer = send(server, "POST", "/score", b"x" * size)
            assert status == 413 and "10,000" in answer["detail"]
        with pytest.raises(RewardError, match="batch="):
            asked(server, "light", ["a"] * 16, images=torch.rand(16, 3, 24, 24))


def test_a_body_of_unknown_length_is_not_waited_for(server):
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=20)
    connection.request("POST", "/score", iter([b"{}"]), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 411


def test_a_token_is_asked_for_but_not_for_health(monkeypatch):
    with serving(REWARDS_HERE, token="abc-123") as server:
        assert send(server, "GET", "/health")[0] == 200
        for header in ({}, {"Authorization": "Bearer abc-12"}, {"Authorization": "abc-123"}):
            assert send(server, "GET", "/rewards", headers=header)[0] == 401
            assert send(server, "POST", "/score", "{}", header)[0] == 401
        monkeypatch.setenv("RPO_REWARD_TOKEN", "wrong")
        with pytest.raises(RewardError, match="401"):
            asked(server, "light")
        monkeypatch.setenv("RPO_REWARD_TOKEN", "abc-123")
        assert torch.equal(asked(server, "light").values, light(IMAGES, PROMPTS))


class Counting:
    """How many ask it at once, and how often it is asked."""

    def __init__(self):
        self.now = self.most = self.times = 0
        self.may_go = threading.Event()

    def __call__(self, images, prompts):
        self.now += 1
        self.times += 1
        self.most = max(self.most, self.now)
        self.may_go.wait(20)
        self.now -= 1
        return [1.0] * len(prompts)


def until(is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_beyond_the_concurrency_are_told_to_come_later_and_a_reward_serves_one_at_a_time():
    counting = Counting()
    with serving({"slow": counting, "light": light}, limits=Limits(concurrency=2)) as server:
        found = []
        threads = [threading.Thread(target=lambda: found.append(asked(server, "slow"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: counting.now == 1 and server.slots._value == 0)
        assert post(server, QUESTION)[0] == 503
        assert send(server, "GET", "/health")[0] == 200
        counting.may_go.set()
        for thread in threads:
            thread.join()
        assert [one.values.tolist() for one in found] == [[1.0] * 4] * 4 and counting.most == 1


def test_nothing_is_computed_for_a_client_that_has_gone():
    counting = Counting()
    with serving({"slow": counting}) as server:
        first = threading.Thread(target=asked, args=(server, "slow"))
        first.start()
        until(lambda: counting.now == 1)
        with pytest.raises(RewardError):
            asked(server, "slow", more="&seconds=0.2&patience=0.2".replace("&patience=5", ""))
        counting.may_go.set()
        first.join()
        until(lambda: server.slots._value == 8)
        assert counting.times == 1


def test_a_body_that_does_not_come_whole_frees_its_place(server):
    with socket.create_connection(tuple(server._http.server_address)) as connection:
        head = b"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        assert b" 408 " in connection.makefile("rb").readline()
    until(lambda: server.slots._value == 8)


def unirl(images=PNGS, rewards=("light",), prompts=PROMPTS, **more):
    every = [
        {
            "history": [{"text": text, "image_b64": base64.b64encode(image).decode()}],
            "required_rewards": list(rewards),
            **more,
        }
        for text, image in zip(prompts, images, strict=False)
    ]
    return {"requests": every}


def test_the_form_of_unirl():
    with serving(REWARDS_HERE) as server:
        status, answer = post(server, unirl(rewards=("light", "shy"), prompts=["odd", "a", "b", "c"]))
    values = light(IMAGES, PROMPTS).tolist()
    assert status == 200
    assert [one["light"] for one in answer["results"]] == [{"light": value} for value in values]
    assert [one.get("shy") for one in answer["results"]] == [None, *[{"shy": 5.0}] * 3]
    assert list(answer["errors"][0]) == ["shy"] and answer["errors"][1:] == [{}, {}, {}]


def test_its_images_may_be_of_any_kind_and_size_and_its_last_turn_counts(server):
    def file(side, level, kind):
        stream = io.BytesIO()
        Image.new("RGB", (side, side), (level, level, level)).save(stream, kind)
        return stream.getvalue()

    question = unirl([file(8, 51, "JPEG"), file(16, 102, "PNG"), file(8, 204, "WEBP")])
    question["requests"][0]["history"].insert(0, {"text": "before", "image_b64": None})
    scores = [one["light"]["light"] for one in post(server, question)[1]["results"]]
    assert scores == pytest.approx([0.2, 0.4, 0.8], abs=0.01)


def test_its_metadata_and_identities_come_along(server):
    question = unirl(PNGS[:1], ("wanted",), metadata={"worth": 4}, request_id="r1", source_rank=3)
    answer = post(server, question)[1]
    assert answer["results"] == [{"wanted": {"wanted": 4.0}}]
    assert (answer["identities"][0]["request_id"], answer["identities"][0]["source_rank"]) == ("r1", 3)


@pytest.mark.parametrize(
    "change",
    [{"grad_mode": True}, {"protocol_version": "2"}, {"requests": [{"history": [], "required_rewards": ["light"]}]}]
    + [
        {"requests": [{"history": [{"text": "a", **turn}], "required_rewards": ["light"]}]}
        for turn in ({}, {"image_ipc": "x"}, {"video_b64": "x"})
    ]
    + [unirl(scorer_version="1"), unirl(rewards=("other",))],
)
def test_what_of_it_is_not_done_is_refused(change, server):
    assert post(server, unirl() | change)[0] in (400, 404)


def test_an_empty_batch_of_it(server):
    assert post(server, {"requests": []})[1] == {"results": [], "errors": [], "identities": [], "protocol_version": "1"}
