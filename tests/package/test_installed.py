"""The wheel by itself: each command of README.md, typed in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sdbook.__main__ import find_settings
from sdbook.clip import Tokenizer
from sdbook.features import open_clip
from sdbook.formats import find_model, find_part, find_tokenizer, shipped_models
from sdbook.run.configs import TrainingConfig
from sdbook.run.unet import find_sizes, source_of

ROOT = Path(__file__).resolve().parents[2]
# Appended to a command, so that it takes no time.
TOY = {
    "sample": "--num_inference_steps 2 --device cpu",
    "train": "--batch_size 4 --max_steps 1 --unet_preset tiny --num_pictures 8"
    " --num_validation 0 --mixed_precision no",
    "train-vae": "--batch_size 4 --max_steps 1 --block_out_channels [8,8,8]"
    " --norm_num_groups 4",
    "train-clip": "--batch_size 4 --max_steps 1 --hidden_size 32 --num_hidden_layers 1",
    "train-lora": "--batch_size 4 --max_steps 1",
    "check": "",
}
RUN = """
import contextlib, json, sys
import sdbook
from sdbook.__main__ import main
print(sdbook.__file__)
for words, file in json.load(sys.stdin):
    print("$", *words)
    with open(file or "said.txt", "w") as said:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main(words)
            said.write("[finished]")
    print(open(said.name).read()[-1000:])
"""


def readme_commands() -> list[tuple[list[str], str | None]]:
    """The words of each `sdbook …` in a block of README.md, and where its text goes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "sdbook":
                file = words[words.index(">") + 1] if ">" in words else None
                found.append((words[1 : words.index(">") if file else None], file))
    return found


# Names in place of paths ------------------------------------------------------


def test_a_shipped_model_is_known_by_name_wherever_one_is_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # no data/ and no sdbook/ here
    shipped = shipped_models()
    assert set(shipped) == {"scenes", "clip"}
    for part in ("vae", "text_encoder", "unet", "tokenizer", "scheduler"):
        assert find_part("scenes", part) == shipped["scenes"] / part
    assert find_part("clip", "text_encoder") == shipped["clip"] / "text_encoder"
    assert find_tokenizer("scenes") == shipped["scenes"] / "tokenizer"
    assert find_model("scenes") == shipped["scenes"]
    config = TrainingConfig(vae_weights_path="scenes", text_encoder_path="scenes")
    assert source_of(config, "vae") == shipped["scenes"] / "vae"
    assert find_sizes(config).in_channels == 4
    assert isinstance(open_clip("clip").tokenizer, Tokenizer)


def test_what_lies_here_comes_before_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes/images").mkdir(parents=True)  # a dataset, no model
    assert find_part("scenes", "vae") == shipped_models()["scenes"] / "vae"
    (tmp_path / "scenes/vae").mkdir()  # the output of train-vae
    assert find_part("scenes", "vae") == Path("scenes/vae")
    assert find_part("./scenes", "unet") == Path("scenes")


def test_what_is_not_there_is_told_what_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model 'nowhere'.*scenes"):
        find_part("nowhere", "vae")
    with pytest.raises(FileNotFoundError, match="no model 'clip'.*scenes"):
        find_model("clip")  # a CLIP is no Stable Diffusion
    with pytest.raises(FileNotFoundError, match="runs/vae.*train-vae.*scenes"):
        source_of(TrainingConfig(), "vae")
    wrong = TrainingConfig(text_encoder_path="nowhere")
    with pytest.raises(FileNotFoundError, match="text_encoder_path.*train-clip"):
        source_of(wrong, "tokenizer")


def test_a_part_alone_may_lie_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def fetch(repository, revision, patterns):
        asked.append((repository, patterns))
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "diffusion_pytorch_model.safetensors").touch()
        return folder

    monkeypatch.setattr("sdbook.files.fetch", fetch)
    assert find_part("somebody/vae", "vae") == tmp_path / "cache"
    ((repository, patterns),) = asked
    assert repository == "somebody/vae" and "vae/*.json" in patterns


def test_shipped_settings_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ROOT / "sdbook/configs/lora.yaml"
    for name in ("lora", "lora.yaml", "sdbook/configs/lora.yaml"):
        assert Path(find_settings(name)) == own
    assert find_settings("rank: 4") == "rank: 4"  # YAML itself
    (tmp_path / "lora.yaml").touch()
    assert find_settings("lora.yaml") == "lora.yaml"
    for name in ("nothing", "elsewhere/lora.yaml"):
        with pytest.raises(FileNotFoundError, match=f"{name}.*cpu-minutes.*lora"):
            find_settings(name)


def test_no_shipped_settings_need_a_checkout():
    for path in (ROOT / "sdbook/configs").glob("*.yaml"):
        for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if key.endswith("path") or key == "pretrained":
                assert not str(value).startswith(("data/", "sdbook/")), path.name


# The wheel --------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist as pip does."""
    folder = tmp_path_factory.mktemp("dist")

    def build(kind, source):
        command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder]
        made = subprocess.run(command, cwd=source, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr

    build("sdist", ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder)
    build("wheel", next(folder.glob("sdbook-*/")))
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        facts = message_from_string(file.read(metadata).decode())
    assert "sdbook/py.typed" in names and "sdbook/configs/lora.yaml" in names
    for model in ("scenes/unet/diffusion_pytorch_model", "clip/clip"):
        assert f"sdbook/models/{model}.safetensors" in names
    assert not any(name.startswith(("tests/", "data/", "tools/")) for name in names)
    assert facts["License-Expression"] == "Apache-2.0" and facts["Keywords"]
    assert "Typing :: Typed" in facts.get_all("Classifier")
    urls = dict(line.split(", ") for line in facts.get_all("Project-URL"))
    home = urls["Homepage"]
    assert (ROOT / "_config.yml").read_text().count(f"url: {home}\n") == 1
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", facts.get_payload())
    assert len(links) > 30
    for picture, link in links:
        start = home.replace("github.com", "raw.githubusercontent.com")
        ours = f"{start}/main/" if picture else f"{home}/blob/main/"
        assert link.startswith("https://"), link
        if link.startswith(ours):
            assert (ROOT / link.removeprefix(ours)).exists(), link


@pytest.mark.slow
def test_every_command_of_the_readme_needs_no_checkout(wheel, tmp_path):
    installed, empty = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    pictures = empty / "my-pictures"
    pictures.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a red star number {number}")
    unet = (installed / "sdbook" / "unet.py").read_text(encoding="utf-8")
    (empty / "my_unet.py").write_text(unet.replace("from .", "from sdbook."))
    commands = [
        ([*words, *shlex.split(TOY[words[0]])], file)
        for words, file in readme_commands()
    ]
    assert {words[0] for words, _ in commands} == set(TOY)
    made = subprocess.run(
        [sys.executable, "-c", RUN], cwd=empty, text=True, capture_output=True,
        input=json.dumps(commands), env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    said = made.stdout
    assert made.returncode == 0, said + made.stderr
    assert said.startswith(str(installed))
    printed = sum(file is not None for _, file in commands)
    assert said.count("[finished]") == len(commands) - printed, said + made.stderr
    assert (empty / "fish.png").is_file() and (empty / "runs/mine/unet").is_dir()
