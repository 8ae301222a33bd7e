"""Loading and saving: what fits is loaded exactly, what does not is named."""

import json
import os
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from sdbook.files import (
    WeightsError,
    read_weights,
    save_weights,
    write_atomically,
    write_json,
)
from sdbook.unet import UNetConfig
from sdbook.weights import Config, Pretrained, build_empty, load_strictly


@dataclass(frozen=True)
class TinyConfig(Config):
    width: int = 3
    sizes: tuple[int, ...] = (1, 2)

    fixed: ClassVar[dict] = {"act_fn": "silu"}
    ignored: ClassVar[tuple] = ("colour",)


class Tiny(Pretrained, nn.Module):
    config_class = TinyConfig
    diffusers_class = "Tiny"

    def __init__(self, config=None):
        super().__init__()
        self.config = config or TinyConfig()
        self.linear = nn.Linear(self.config.width, 2)


@pytest.fixture
def folder(tmp_path):
    Tiny(TinyConfig(width=4, sizes=(5,))).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(folder, **values):
    path = folder / "config.json"
    write_json({**json.loads(path.read_text()), **values}, path)


def test_round_trip(folder):
    first, second = Tiny.from_pretrained(folder), Tiny.from_pretrained(str(folder))
    assert first.config == TinyConfig(width=4, sizes=(5,))
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert not first.training and first.linear.weight.requires_grad
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_others_may_read_the_files(folder):
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert all(mode & 0o044 == 0o044 for mode in modes), modes


def test_half_precision_file_is_read_as_float32(folder):
    model = Tiny.from_pretrained(folder)
    model.save_pretrained(folder, dtype=torch.float16)
    stored = read_weights(folder / Tiny.weights_name)
    assert stored["linear.weight"].dtype == torch.float16
    again = Tiny.from_pretrained(folder)
    assert again.linear.weight.dtype == torch.float32
    half = Tiny.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.linear.weight.dtype == torch.bfloat16


def test_channels_last_weights_can_be_saved(tmp_path):
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    save_weights(conv.state_dict(), tmp_path / "conv.safetensors")
    read = read_weights(tmp_path / "conv.safetensors")
    assert torch.equal(read["weight"], conv.weight)


def test_known_options_are_accepted_and_others_refused(folder):
    edit_config(folder, act_fn="silu", colour="red", _diffusers_version="0.1")
    assert Tiny.from_pretrained(folder).config.width == 4
    edit_config(folder, act_fn="relu", wings=2)
    with pytest.raises(WeightsError, match=r"config.json.*act_fn='relu'.*wings=2"):
        Tiny.from_pretrained(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*give a folder"):
        Tiny.from_pretrained(tmp_path / "nowhere")


def test_missing_config_lists_what_is_there(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json .*diffusion_pytorch"):
        Tiny.from_pretrained(folder)


def test_broken_config(folder):
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(WeightsError, match=r"config.json is not valid JSON"):
        Tiny.from_pretrained(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(WeightsError, match=r"config.json is not valid JSON"):
        Tiny.from_pretrained(folder)
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(WeightsError, match="no JSON object"):
        Tiny.from_pretrained(folder)


def test_config_of_another_class(folder):
    edit_config(folder, _class_name="UNet2DConditionModel")
    with pytest.raises(WeightsError, match="belongs to UNet2DConditionModel"):
        Tiny.from_pretrained(folder)


def test_missing_weights(folder):
    (folder / Tiny.weights_name).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no diffusion_.*config.json"):
        Tiny.from_pretrained(folder)


def test_truncated_weights(folder):
    path = folder / Tiny.weights_name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WeightsError, match=r"safetensors is not a whole.*again"):
        Tiny.from_pretrained(folder)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="is empty"):
        Tiny.from_pretrained(folder)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!doctype html><html>404</html>", "not a whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_foreign_weights(folder, content, said):
    (folder / Tiny.weights_name).write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        Tiny.from_pretrained(folder)


def test_wrong_shapes_and_keys_are_listed_in_one_error(folder):
    edit_config(folder, width=7)
    with pytest.raises(WeightsError, match=r"weight: file \(2, 4\), model \(2, 7\)"):
        Tiny.from_pretrained(folder)
    state = {"linear.weight": torch.zeros(2, 9), "stranger": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_strictly(Tiny(), state, "here.safetensors")
    for part in ("here.safetensors", "linear.bias", "stranger", "(2, 9)", "Tiny"):
        assert part in str(caught.value)


def test_pickle_is_read_without_running_code(folder):
    state = Tiny.from_pretrained(folder).state_dict()
    (folder / Tiny.weights_name).unlink()
    pickle_path = folder / "diffusion_pytorch_model.bin"
    torch.save({"state_dict": state, "epoch": 3}, pickle_path)
    assert torch.equal(
        Tiny.from_pretrained(folder).linear.weight, state["linear.weight"]
    )

    class Trap:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"state_dict": state, "trap": Trap()}, pickle_path)
    with pytest.raises(WeightsError, match="could not be opened .*safetensors version"):
        Tiny.from_pretrained(folder)
    pickle_path.write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="could not be opened"):
        Tiny.from_pretrained(folder)


def test_failed_write_leaves_the_old_file(folder):
    path = folder / Tiny.weights_name
    before = path.read_bytes()

    def broken(file):
        file.write_bytes(b"half a")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    model = Tiny()
    model.linear.bias = nn.Parameter(torch.zeros(2).to_sparse())  # cannot be written
    with pytest.raises((ValueError, RuntimeError)):
        model.save_pretrained(folder)
    assert path.read_bytes() == before
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("content", [b"\x80\x02", b"\x80\x02X\x05", b"\x80\x02K"])
def test_torn_pickles_are_named(folder, content):
    (folder / Tiny.weights_name).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(content)
    with pytest.raises(WeightsError, match="could not be opened .*safetensors version"):
        Tiny.from_pretrained(folder)


def test_whole_numbers_are_no_weights(folder):
    state = {"linear.weight": torch.zeros(2, 3), "linear.bias": torch.zeros(2)}
    state["linear.weight"] = state["linear.weight"].to(torch.int8)
    with pytest.raises(
        WeightsError, match=r"1 not floating-point \(linear.weight: torch.int8\)"
    ):
        load_strictly(Tiny(), state)


def write_header(path, kind, count, size):
    entry = {"dtype": kind, "shape": [count], "data_offsets": [0, size]}
    header = json.dumps({"linear.bias": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def test_an_unknown_type_of_numbers_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    write_header(path, "Q4_K", 2, 16)
    with pytest.raises(WeightsError, match="numbers of the type Q4_K, which we"):
        read_weights(path)


def test_numbers_that_are_no_weights_are_named(folder):
    path = folder / Tiny.weights_name
    write_header(path, "U64", 2, 16)
    with pytest.raises(WeightsError, match=r"safetensors.*(uint64|U64)"):
        Tiny.from_pretrained(folder)


def test_the_suffix_may_be_in_capitals(folder):
    path = folder / "MODEL.SAFETENSORS"
    (folder / Tiny.weights_name).rename(path)
    assert read_weights(path)["linear.weight"].shape == (2, 4)


CROWDED = """
import errno, os, resource, sys
from sdbook.files import read_weights

read_weights(sys.argv[1])  # imports what it needs
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for free in (0, 1):
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for _ in range(free):
            os.close(held.pop())
    try:
        read_weights(sys.argv[1])
        raised = None
    except OSError as error:
        raised = error.errno
    for number in held:
        os.close(number)
    print(raised == errno.EMFILE)
"""


@pytest.mark.skipif(os.name != "posix", reason="sets the limit of open files")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_too_many_open_files_are_no_fault_of_the_file(folder, kind):
    path = folder / Tiny.weights_name
    if kind == "bin":
        path = folder / "diffusion_pytorch_model.bin"
        torch.save(Tiny().state_dict(), path)
    command = [sys.executable, "-c", CROWDED, str(path)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.stdout.split() == ["True", "True"], out.stdout + out.stderr


def test_building_draws_no_numbers_and_loads_no_compiler():
    code = """
import sys
from torch import nn
from sdbook.weights import build_empty

class Words(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(10, 3)
        nn.init.normal_(self.words.weight, std=0.02)

print(build_empty(Words, None).words.weight.is_meta, "torch._dynamo" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.split() == ["True", "False"], out.stdout + out.stderr


def test_building_in_two_threads_leaves_pytorch_as_it_was():
    draw = nn.init.normal_
    second = threading.Event()

    class Slow(nn.Module):
        def __init__(self, config):
            super().__init__()
            second.wait(0.2)  # in which the other could begin, were there no lock
            here = torch.zeros(3, device="cpu")
            assert nn.init.normal_(here).abs().min() > 0  # memory still gets numbers

    failed = []

    def build():
        try:
            build_empty(Slow, TinyConfig())
        except Exception as error:
            failed.append(error)
        second.set()

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and nn.init.normal_ is draw


@pytest.mark.parametrize("value", [None, False, 0, 0.0])
def test_an_option_that_is_off_may_be_unknown(value):
    """As the docstring of `Config` says; one that is on is refused by name."""
    assert UNetConfig.from_dict({"new_option": value}) == UNetConfig()
    with pytest.raises(WeightsError, match="new_option=.*unknown"):
        UNetConfig.from_dict({"new_option": 1})


def test_names_are_found_where_they_once_stood():
    from sdbook import evaluation, features, files, formats, weights

    for name in weights._MOVED:
        assert getattr(weights, name) is getattr(formats, name)
    assert weights.write_atomically is files.write_atomically
    assert evaluation.OurCLIP is features.BookCLIP
    assert evaluation.TheirCLIP is features.TransformersCLIP
    with pytest.raises(AttributeError, match="weights.*nothing"):
        _ = weights.nothing
