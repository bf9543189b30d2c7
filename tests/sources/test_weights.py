from __future__ import annotations

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from modelops.errors import InputRefused, UsageError
from modelops.sources._weights import check_safetensors, load_strictly, read_state


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))


def _raw(path, header: str, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


def test_weights_replace_all_of_the_modules_own(tmp_path):
    state = {name: torch.randn_like(value) for name, value in _net().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        net = _net()
        assert load_strictly(net, tmp_path / name) == ()
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("0.bias"), "missing: 0.bias"),
        (lambda state: state.update(head=torch.ones(2)), "unexpected: head"),
        (lambda state: state.update({"0.bias": torch.ones(5)}), r"0.bias has shape \[5\], the module \[2\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, said):
    state = dict(_net().state_dict())
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputRefused, match=said):
        load_strictly(_net(), tmp_path / "w.safetensors")


def test_one_of_two_tied_weights_is_enough(tmp_path):
    def tied() -> torch.nn.Module:
        net = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
        net[1].weight = net[0].weight
        return net

    save_file({"0.weight": torch.eye(3)}, tmp_path / "w.safetensors")
    net = tied()
    load_strictly(net, tmp_path / "w.safetensors")
    assert torch.equal(net[1].weight, torch.eye(3))


def test_half_precision_weights_are_converted_and_it_is_said(tmp_path):
    save_file({name: value.half() for name, value in _net().state_dict().items()}, tmp_path / "w.safetensors")
    net = _net()
    (note,) = load_strictly(net, tmp_path / "w.safetensors")
    assert "float16" in note and net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_safetensors_file_that_was_cut_short_is_refused(tmp_path, keep):
    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:keep])
    with pytest.raises(InputRefused, match="truncated"):
        check_safetensors(tmp_path / "w.safetensors")


def test_a_safetensors_file_with_a_tail_is_refused(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")
    with open(tmp_path / "w.safetensors", "ab") as file:
        file.write(b"PK")
    with pytest.raises(InputRefused, match="longer than its header says"):
        check_safetensors(tmp_path / "w.safetensors")


def test_a_name_that_appears_twice_is_refused(tmp_path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    _raw(tmp_path / "w.safetensors", f'{{"w":{entry},"w":{entry}}}', b"\0" * 4)
    with pytest.raises(InputRefused, match="names 'w' twice"):
        check_safetensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("header", ["[]", "{", '{"w":1}', '{"w":{"dtype":"F32"}}', "[" * 100_000])
def test_a_header_that_is_none_is_refused(tmp_path, header):
    _raw(tmp_path / "w.safetensors", header)
    with pytest.raises(InputRefused):
        check_safetensors(tmp_path / "w.safetensors")


class _Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_in_a_checkpoint_never_runs(tmp_path, legacy):
    canary = tmp_path / "canary"
    if legacy:
        (tmp_path / "w.pt").write_bytes(pickle.dumps({"w": _Canary(str(canary))}))
    else:
        torch.save({"w": _Canary(str(canary))}, tmp_path / "w.pt")
    with pytest.raises(InputRefused, match="more than weights"):
        read_state(tmp_path / "w.pt")
    assert not canary.exists()


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1 << 16)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(InputRefused, match="is compressed"):
        read_state(tmp_path / "bomb.pt")


def test_a_missing_or_unknown_file_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="no such weights file"):
        read_state(tmp_path / "w.safetensors")
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(InputRefused, match="no form of weights"):
        read_state(tmp_path / "w.h5")
