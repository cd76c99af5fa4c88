import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rpo.errors import InputError
from rpo.rewards.weights import LinearHead, check_fit, find_file, read_head, read_state


def head_state(width=8):
    torch.manual_seed(0)
    return LinearHead(width).state_dict()


def test_the_first_of_several_files_is_found(tmp_path):
    (tmp_path / "b.pt").touch()
    assert find_file(str(tmp_path), "a.pt", "b.pt") == tmp_path / "b.pt"
    (tmp_path / "a.pt").touch()
    assert find_file(str(tmp_path), "a.pt", "b.pt") == tmp_path / "a.pt"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no a\.pt or b\.pt; expected"):
        find_file(str(tmp_path), "a.pt", "b.pt")
    with pytest.raises(InputError, match=r"no a\.pt can be had of 'owner/name'"):
        find_file("owner/name", "a.pt", "b.pt")
    with pytest.raises(InputError, match=r"no a\.pt can be had of '/no/such/folder'"):
        find_file("/no/such/folder", "a.pt")


def test_both_kinds_of_files_give_float32(tmp_path):
    state = {"a": torch.arange(3).half(), "n": torch.arange(2)}
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    save_file(state, tmp_path / "safe.safetensors")
    for name in ("bare.pth", "wrapped.pt", "safe.safetensors"):
        found = read_state(tmp_path / name)
        assert found["a"].dtype == torch.float32 and found["a"].tolist() == [0, 1, 2]
        assert found["n"].dtype == torch.int64


class Danger:
    def __reduce__(self):
        return (print, ("run",))


def test_code_in_a_file_is_not_run_and_what_is_no_state_is_refused(tmp_path, capsys):
    torch.save({"a": Danger()}, tmp_path / "danger.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "broken.pt").write_bytes(b"version https://git-lfs")
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    for name in ("danger.pt", "list.pt", "broken.pt", "broken.safetensors", "absent.pt"):
        with pytest.raises(InputError, match=f"{name}.*; expected"):
            read_state(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_the_head_is_one_affine_map(tmp_path):
    state = head_state()
    assert sorted({int(name.split(".")[1]) for name in state}) == [0, 2, 4, 6, 7]
    head, x = read_head(state, 8, tmp_path), torch.randn(5, 8)
    expected = x
    for number in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    torch.testing.assert_close(head(x), expected[:, 0])
    torch.testing.assert_close(head(x[:1] + x[1:2]) + head(0 * x[:1]), head(x[:1]) + head(x[1:2]))


def test_what_does_not_fit_is_told(tmp_path):
    module, file = nn.Linear(2, 3), tmp_path / "some.pt"
    good = module.state_dict()
    check_fit(good, module, file, what="a layer")
    for state, fault in (
        ({"weight": good["weight"]}, "lacks 1 of the weights, such as bias"),
        (good | {"more": good["bias"]}, "has 1 weights too many, such as more"),
        (good | {"bias": torch.zeros(4)}, r"has bias of shape \[4\] and not \[3\]"),
    ):
        with pytest.raises(InputError, match=rf"some\.pt {fault}; expected a layer; give"):
            check_fit(state, module, file, what="a layer")
