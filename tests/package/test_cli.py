"""The command line: every flag, pictures that can be made again, bad input."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import small_pipeline
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import sdbook
from sdbook import StableDiffusion
from sdbook.__main__ import COMMANDS, find, main, read_flags
from sdbook.data import Scenes, write_folder
from sdbook.finetuning import (
    LoRA,
    LoRATrainingConfig,
    WordTrainingConfig,
    add_word,
    save_lora,
    save_word,
)
from sdbook.run.curves import find_curves, read_log
from sdbook.run.next_steps import next_command
from sdbook.run.sampling import open_picture, write_png
from sdbook.run.settings import check_settings
from sdbook.training import (
    CLIPTrainingConfig,
    TrainingConfig,
    VAETrainingConfig,
)
from sdbook.vae import AutoencoderKL

CONFIGS = Path(sdbook.__file__).parent / "configs"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model of 64×64 pictures, saved: a few thousand weights."""
    pipe = small_pipeline((16, 32), (8, 8, 8), width=16, image_size=64)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def draw(model, tmp_path):
    """Run `sdbook sample` in this process; gives the path of the picture."""

    def draw(*flags, prompt=("a red star",), steps=2, name="out.png"):
        path = tmp_path / name
        flags = ["--prompt", *prompt, "--checkpoint_path", str(model), *flags]
        flags += ["--num_inference_steps", str(steps), "--output_path", str(path)]
        main(["sample", *flags])
        return path

    return draw


@pytest.fixture(scope="module")
def pieces(model, tmp_path_factory):
    """A LoRA and a new word for the model, saved."""
    folder, pipe = (
        tmp_path_factory.mktemp("pieces"),
        StableDiffusion.from_pretrained(model),
    )
    lora = LoRA(pipe.unet)
    for pair in lora.pairs:
        torch.nn.init.ones_(pair.up.weight)
    save_lora(folder / "lora", lora)
    add_word(pipe, "<new>")
    save_word(folder / "word", pipe, "<new>")
    return {"lora": folder / "lora", "word": folder / "word"}


def refused(capsys, arguments) -> str:
    """The one line that a command says before it ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip()
    aside = re.compile("warning|it/s")  # warnings, and the bar of a run that began
    lines = [line for line in said.splitlines() if line and not aside.search(line)]
    assert exit_.value.code == 2, said
    assert len(lines) == 1 and "Traceback" not in said, said
    assert lines[0].startswith(f"sdbook {arguments[0]}: error: ")
    return lines[0]


# ---- usage ----


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_lists_the_commands(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["draw"])
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert "no command 'draw'" in said.err and "sample" in said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--config" in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_process_of_its_own(model, tmp_path):
    """And what it imports: PyTorch and the tokenizer's library, and nothing heavy."""
    path = tmp_path / "fish.png"
    command = [sys.executable, "-X", "importtime", "-m", "sdbook", "sample"]
    command += ["--prompt", "two blue fish", "--checkpoint_path", str(model)]
    command += ["--num_inference_steps", "1", "--output_path", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}" in done.stdout
    assert Image.open(path).size == (64, 64)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if "|" in line}
    heavy = "accelerate diffusers matplotlib scipy torchvision webdataset datasets "
    heavy += "pandas IPython torch._dynamo torch._inductor sympy sdbook.training"
    assert "torch" in imported and not set(heavy.split()) & imported


# ---- pictures that can be made again ----


def test_a_lora_and_a_word_change_the_picture(draw, pieces):
    def pixels(*flags):
        return np.asarray(Image.open(draw(*flags, prompt=["a <new> star"])))

    plain = pixels()
    assert (pixels("--lora_path", str(pieces["lora"])) != plain).any()
    assert (pixels("--word_path", str(pieces["word"])) != plain).any()


def test_a_scale_without_a_lora_is_refused(capsys):
    said = refused(capsys, ["sample", "--prompt", "a", "--lora_scale", "0.5"])
    assert "lora_scale 0.5 without lora_path" in said


def test_a_picture_says_how_it_was_made(draw, model):
    text = Image.open(draw("--seed", "7", "--guidance_scale", "2.5")).text
    assert text["prompt"] == "a red star"
    assert text["seed"] == "7"
    assert text["num_inference_steps"] == "2"
    assert text["guidance_scale"] == "2.5"
    assert text["scheduler"] == "DDIMScheduler"
    assert text["model"] == str(model)
    assert text["version"] == f"sdbook {sdbook.__version__}"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--negative_prompt", "a dark, 'quoted' boat", "--seed", "3"],
        ["--scheduler", "ddpm", "--image_size", "32", "--guidance_scale", "1"],
        ["--scheduler", "dpmpp_2m"],
        ["--dtype", "bfloat16"],
        ["--height", "24", "--width", "40", "--tile_size", "16"],
        ["--image_path", "{picture}", "--strength", "0.6"],
        ["--image_path", "{picture}", "--mask_path", "{mask}"],
        ["--lora_path", "{lora}", "--lora_scale", "0.5", "--word_path", "{word}"],
    ],
    ids="plain negative others solver bfloat16 oblong image mask pieces".split(),
)
def test_the_metadata_make_the_same_picture_again(draw, tmp_path, flags, pieces):
    files = {name: tmp_path / f"{name}.png" for name in ("picture", "mask")} | pieces
    Image.radial_gradient("L").save(files["mask"])
    Image.radial_gradient("L").convert("RGB").resize((40, 32)).save(files["picture"])
    flags = [flag.format(**files) for flag in flags]
    first = Image.open(draw(*flags, prompt=['a "red" star, über alles']))
    again = tmp_path / "again.png"
    words = shlex.split(first.text["command"])
    assert words[:2] == ["sdbook", "sample"]
    main([*words[1:], "--output_path", str(again)])
    second = Image.open(again)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert second.text == first.text


def test_further_pictures_carry_their_own_seed(draw, tmp_path):
    path = draw("--num_images", "2", "--seed", "5", prompt=["a star", "a moon"])
    files = [path, *(tmp_path / f"out-{k}.png" for k in (1, 2, 3))]
    texts = [Image.open(file).text for file in files]
    assert [text["seed"] for text in texts] == ["5", "6", "7", "8"]
    prompts = [text["prompt"] for text in texts]
    assert prompts == ["a star", "a star", "a moon", "a moon"]
    alone = tmp_path / "alone.png"
    words = shlex.split(texts[3]["command"])[1:]
    main([*words, "--output_path", str(alone)])
    one, other = (np.asarray(Image.open(f), int) for f in (files[3], alone))
    assert np.abs(one - other).max() <= 1  # a batch may round differently


def test_grid_is_one_labelled_sheet(draw, tmp_path):
    path = draw("--grid", "true", "--num_images", "2", prompt=["a star", "a moon"])
    assert [file.name for file in tmp_path.glob("*.png")] == ["out.png"]
    sheet = Image.open(path)
    assert sheet.width > 4 * 64 and sheet.height > 64
    assert sheet.text["prompt"] == "a star\na moon"
    again = tmp_path / "again.png"
    main([*shlex.split(sheet.text["command"])[1:], "--output_path", str(again)])
    assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(again)))


# ---- flags ----


def pixels(path):
    return np.asarray(Image.open(path), int)


def test_every_flag_of_the_first_design_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = capsys.readouterr().out
    for flag in (
        "prompt negative_prompt checkpoint_path output_path image_size guidance_scale "
        "num_inference_steps scheduler seed num_images device dtype"
    ).split():
        assert f"--{flag}" in said


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"],
        ["--guidance_scale", "9"],
        ["--negative_prompt", "two green fish"],
        ["--scheduler", "ddpm"],
    ],
    ids=lambda flags: flags[0][2:],
)
def test_a_flag_changes_the_picture(draw, flags):
    plain, changed = draw(name="plain.png"), draw(*flags, name="changed.png")
    assert np.abs(pixels(plain) - pixels(changed)).max() > 0


def test_size_device_and_folder(draw, tmp_path):
    path = draw("--image_size", "32", "--device", "cpu", name="new/folder/out.png")
    assert Image.open(path).size == (32, 32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_draws_nearly_the_same(draw, dtype):
    plain, half = draw(name="plain.png"), draw("--dtype", dtype, name="half.png")
    assert np.abs(pixels(plain) - pixels(half)).mean() < 4


@pytest.mark.parametrize(
    "prompts",
    [
        ("a red star 🍎",),
        ("a red star 🍎", "b"),
        ("[x]", '["a", "b"]', "{a: b}", "3", "null", "", "- a"),
        ("a\x01\x7f\x85\u2028b", "über 𝔸 👩‍🚀"),
    ],
    ids=["emoji", "two", "looks like YAML", "control characters"],
)
def test_a_prompt_is_drawn_as_it_is_typed(prompts, draw):
    path = draw(prompt=prompts, steps=1)
    for number, text in enumerate(prompts):
        file = path.with_name(f"out-{number}.png") if number else path
        assert Image.open(file).text["prompt"] == text


def test_a_prompt_with_an_equals_sign(model, tmp_path):
    flags = ["--checkpoint_path", str(model), "--num_inference_steps", "1"]
    flags += ["--output_path", str(tmp_path / "a.png")]
    main(["sample", "--prompt=a 🍎 b", *flags])
    assert Image.open(tmp_path / "a.png").text["prompt"] == "a 🍎 b"


# ---- config files ----


def print_config(capsys, *arguments) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_flags_override_the_config(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("prompt: a red star\nseed: 3\nguidance_scale: 2\n")
    config = print_config(capsys, "sample", "--config", str(file), "--seed", "4")
    assert config["prompt"] == "a red star"
    assert config["seed"] == 4
    assert config["guidance_scale"] == 2
    assert config["num_inference_steps"] == 25


def test_a_printed_config_is_a_config(tmp_path, capsys):
    flags = ["--kinds", "[single, two]", "--batch_size", "3", "--flip"]
    first = print_config(capsys, "train", *flags)
    file = tmp_path / "printed.yaml"
    file.write_text(yaml.safe_dump(first))
    assert print_config(capsys, "train", "--config", str(file)) == first
    assert first["kinds"] == ["single", "two"] and first["flip"] is True


def test_prompts_in_a_config(draw, model, tmp_path):
    file = tmp_path / "mine.yaml"
    settings = {"prompt": ["a star", "a moon"], "num_inference_steps": 1}
    settings |= {"checkpoint_path": str(model), "output_path": str(tmp_path / "a.png")}
    file.write_text(yaml.safe_dump(settings))
    main(["sample", "--config", str(file)])
    assert Image.open(tmp_path / "a-1.png").text["prompt"] == "a moon"


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_keys_are_named(command, capsys, tmp_path):
    required = ["--prompt", "a"] if command == "sample" else []
    said = refused(capsys, [command, *required, "--stepz", "3"])
    assert "stepz" in said and f"sdbook {command} --help" in said
    file = tmp_path / "mine.yaml"
    file.write_text("stepz: 3\n")
    assert "stepz" in refused(capsys, [command, *required, "--config", file])


@pytest.mark.parametrize(
    "command, flag, value",
    [
        ("sample", "seed", "x"),
        ("sample", "num_inference_steps", "2.5"),
        ("sample", "dtype", "int8"),
        ("evaluate", "num_prompts", "many"),
        ("train", "batch_size", "1.5"),
        ("train", "unet_dim", "[32, wide]"),
        ("train-vae", "learning_rate", "fast"),
        ("train-clip", "twins", "3"),
    ],
)
def test_wrong_types_are_named(command, flag, value, capsys, tmp_path):
    required = ["--prompt", "a"] if command == "sample" else []
    said = refused(capsys, [command, *required, f"--{flag}", value])
    assert flag in said
    file = tmp_path / "mine.yaml"
    file.write_text(f"{flag}: {value}\n")
    assert flag in refused(capsys, [command, *required, "--config", file])


def test_a_config_that_is_not_there_or_not_yaml(tmp_path, capsys):
    said = refused(capsys, ["train", "--config", tmp_path / "nothing.yaml"])
    assert "nothing.yaml" in said
    file = tmp_path / "broken.yaml"
    file.write_text("seed: [1\n")
    assert "config" in refused(capsys, ["train", "--config", file])


@pytest.mark.parametrize(
    "name, command, config_class",
    [
        ("scenes-vae", "train-vae", VAETrainingConfig),
        ("scenes-clip", "train-clip", CLIPTrainingConfig),
        ("scenes-singles-cpu", "train", TrainingConfig),
        ("scenes-singles-gpu", "train", TrainingConfig),
        ("scenes-overfit-cpu", "train", TrainingConfig),
        ("scenes-overfit-gpu", "train", TrainingConfig),
        ("scenes-unet-cpu", "train", TrainingConfig),
        ("scenes-unet-gpu", "train", TrainingConfig),
        ("scenes-again-cpu", "train", TrainingConfig),
        ("folder", "train", TrainingConfig),
        ("cpu-minutes", "train", TrainingConfig),
        ("one-gpu", "train", TrainingConfig),
        ("several-gpus", "train", TrainingConfig),
        ("continue-sd15", "train", TrainingConfig),
        ("lora", "train-lora", LoRATrainingConfig),
        ("word", "train-word", WordTrainingConfig),
    ],
)
def test_shipped_configs_parse(name, command, config_class, capsys):
    config = print_config(capsys, command, "--config", str(CONFIGS / f"{name}.yaml"))
    assert set(config) == {field.name for field in fields(config_class)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    assert config_class(**values).output_dir == config["output_dir"]


def test_a_plan_of_a_shipped_config(tmp_path, capsys, monkeypatch):
    """The last part of the shipped model's training, and no step of it."""
    monkeypatch.chdir(CONFIGS.parent.parent)
    capsys.readouterr()
    config = CONFIGS / "scenes-again-cpu.yaml"
    flags = ["--dry_run", "--output_dir", str(tmp_path / "run")]
    main(["train", "--config", str(config), *flags])
    said = capsys.readouterr().out
    assert "scenes: 80,000 pictures to train on, 64 held out, 0 rejected" in said
    assert "18,000 of 32 pictures" in said and str(tmp_path / "run") in said
    assert "wrote" not in said and not (tmp_path / "run").exists()


def test_a_plan_of_a_fine_tuning(tmp_path, capsys):
    write_folder(Scenes(64), tmp_path / "pictures", 3)
    flags = ["--dry_run", "--train_text_encoder", "--output_dir", str(tmp_path / "run")]
    flags += ["--dataset_path", str(tmp_path / "pictures")]
    main(["train-lora", "--config", str(CONFIGS / "lora.yaml"), *flags])
    said = capsys.readouterr().out
    assert "3 pictures to train on" in said and "400 of 8 pictures" in said
    assert "class   60 pictures drawn first" in said
    assert "wrote" not in said and not (tmp_path / "run").exists()


def test_ctrl_c_in_a_training(capsys, tmp_path):
    left = iter(range(2))

    def ctrl_c(optimiser, *given):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGINT)

    flags = ["--output_dir", str(tmp_path), "--block_out_channels", "[8, 8]"]
    flags += ["--norm_num_groups", "4", "--batch_size", "2", "--max_steps", "9"]
    hook = register_optimizer_step_post_hook(ctrl_c)
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["train-vae", *flags, "--validate_every", "0"])
    finally:
        hook.remove()
    assert exit_.value.code == 130
    said = capsys.readouterr().err
    assert "stopped after step 3; the same command goes on" in said
    assert (tmp_path / "checkpoints" / "step-00000003.pt").exists()


def test_every_shipped_config_is_tested():
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    (mark,) = test_shipped_configs_parse.pytestmark
    assert names == {name for name, _, _ in mark.args[1]}


# ---- bad input: an error of one line, or a warning and a picture ----


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_with_a_broken_picture_or_caption(tmp_path, capsys, workers):
    folder = tmp_path / "pictures"
    write_folder(Scenes(64), folder, 3)
    flags = ["train-vae", "--dataset_path", folder, "--output_dir", tmp_path / "run"]
    flags += ["--batch_size", 3, "--max_steps", 1, "--num_workers", workers]
    flags += ["--on_error", "raise"]
    for name, data, words in (
        ("images/00001.png", b"no picture", ("00001.png", "mend or remove")),
        ("captions/00001.txt", "grün".encode("latin-1"), ("00001.txt:1", "iconv")),
    ):
        (folder / name).write_bytes(data)
        said = refused(capsys, flags)
        assert all(word in said for word in words), said


def bad_sample(model, *flags, prompt="a star"):
    given = ["--checkpoint_path", model, "--num_inference_steps", "2"]
    return ["sample", "--prompt", prompt, *given, *flags]


def test_an_empty_prompt_draws(draw):
    assert Image.open(draw(prompt=[""])).text["prompt"] == ""


def test_ten_thousand_words_draw_with_one_warning(draw, capsys):
    path = draw(prompt=["star " * 10_000])
    said = capsys.readouterr().err
    warned = [line for line in said.splitlines() if "warning" in line]
    assert len(warned) == 1 and len(warned[0]) < 1000
    assert warned[0].startswith("sdbook: warning: ")
    assert Image.open(path).size == (64, 64)


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("num_inference_steps", "0", "at least 1"),
        ("num_inference_steps", "-1", "at least 1"),
        ("num_inference_steps", "1001", "1000"),
        ("image_size", "0", "at least 1"),
        ("image_size", "-8", "at least 1"),
        ("image_size", "50", "multiples of 4"),
        ("strength", "0", "more than 0"),
        ("strength", "1.5", "at most 1"),
        ("guidance_scale", "inf", "number"),
    ],
)
def test_impossible_numbers(model, capsys, flag, value, words):
    said = refused(capsys, bad_sample(model, f"--{flag}", value))
    assert flag.removeprefix("image_") in said or "height" in said
    assert value in said and words in said


def test_a_photograph_that_is_turned_by_a_note(tmp_path):
    picture, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert open_picture(str(tmp_path / "photo.jpg")).size == (20, 40)


def test_where_the_tokenizer_and_the_variant_come_from(draw, model, monkeypatch):
    given, pipe = {}, StableDiffusion.from_pretrained(model)

    def from_pretrained(name, **options):
        given.update(options)
        return pipe

    monkeypatch.setattr(StableDiffusion, "from_pretrained", from_pretrained)
    draw()
    assert given == {"dtype": torch.float32}
    draw("--tokenizer_path", "words", "--variant", "fp16")
    assert given == {"dtype": torch.float32, "tokenizer": "words", "variant": "fp16"}


def test_a_vae_from_elsewhere_and_fewer_layers(draw, model, tmp_path):
    torch.manual_seed(1)
    other = AutoencoderKL(StableDiffusion.from_pretrained(model).vae.config)
    other.save_pretrained(tmp_path / "vae")
    plain = np.asarray(Image.open(draw())).astype(int)
    for flag, value in (("vae_path", str(tmp_path / "vae")), ("clip_skip", "1")):
        picture = Image.open(draw(f"--{flag}", value))
        assert picture.text[flag] == value
        assert f"--{flag} {value}" in picture.text["command"]
        assert not np.array_equal(np.asarray(picture), plain)
    assert np.array_equal(np.asarray(Image.open(draw("--clip_skip", "0"))), plain)


def test_layers_that_the_text_model_lacks(model, capsys):
    said = refused(capsys, bad_sample(model, "--clip_skip", "2"))
    assert "clip_skip=2" in said and "2 layers" in said


def test_half_a_character_is_found_before_a_model_is_opened(tmp_path, capsys):
    said = refused(capsys, bad_sample(tmp_path / "no model", prompt="caf\udce9"))
    assert "half of a character" in said and "UTF-8" in said


def test_a_picture_that_overflows_is_no_success(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: z[:, :3] * torch.nan)
    path = tmp_path / "black.png"
    said = refused(capsys, bad_sample(model, "--output_path", path))
    assert "VAE overflowed in float32" in said and not path.exists()


def test_a_mask_with_transparency_is_refused(model, capsys, tmp_path):
    for name, alpha in (("picture", 255), ("mask", 0)):
        picture = Image.new("RGBA", (64, 64), (255, 0, 0, alpha))
        picture.save(tmp_path / f"{name}.png")
    given = ["--image_path", tmp_path / "picture.png"]
    given += ["--mask_path", tmp_path / "mask.png"]
    said = refused(capsys, bad_sample(model, *given))
    assert "mask" in said and "transparency" in said


def test_pictures_that_cannot_be_opened(model, capsys, tmp_path, monkeypatch):
    missing, torn = tmp_path / "missing.png", tmp_path / "torn.png"
    Image.radial_gradient("L").save(torn)
    torn.write_bytes(torn.read_bytes()[:200])
    for path, words in ((missing, "no such file"), (torn, "cannot read the picture")):
        said = refused(capsys, bad_sample(model, "--image_path", str(path)))
        assert str(path) in said and words in said
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.radial_gradient("L").save(torn)
    said = refused(capsys, bad_sample(model, "--image_path", str(torn)))
    assert "cannot read the picture" in said
    monkeypatch.undo()
    said = refused(capsys, bad_sample(model, "--tile_size", "4"))
    assert "4" in said and "pixels" in said
    said = refused(capsys, bad_sample(model, "--strength", "0.5"))
    assert "strength 0.5 without image_path" in said


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("scheduler", "magic", ["magic", "ddim"]),
        ("device", "gpu", ["gpu", "cpu"]),
        ("device", "cpu:x", ["cpu:x", "auto"]),
        ("device", "cuda:99", ["cuda:99", "auto"]),
        ("num_images", "0", ["num_images", "at least 1"]),
        ("output_path", "picture.jpg", ["picture.jpg", ".png"]),
        ("checkpoint_path", "nowhere", ["nowhere", "folder"]),
    ],
)
def test_other_impossible_flags(model, capsys, flag, value, words):
    said = refused(capsys, bad_sample(model, f"--{flag}", value))
    assert all(word in said for word in words), said


def test_a_gpu_that_is_not_there(model, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(capsys, bad_sample(model, "--device", "cuda"))
    assert "cuda" in said and "cpu" in said


def test_no_prompt(capsys):
    assert "prompt" in refused(capsys, ["sample"])
    assert "prompt" in refused(capsys, ["sample", "--prompt"])


def test_a_place_where_nothing_can_be_written(model, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "out.png"
    assert "file" in refused(capsys, bad_sample(model, "--output_path", path))


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_truncated_checkpoint(copy, capsys):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = refused(capsys, bad_sample(copy))
    assert str(weights) in said and "copy or download it again" in said


def test_an_incomplete_checkpoint(copy, capsys):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert str(copy / "vae") in refused(capsys, bad_sample(copy))
    shutil.rmtree(copy / "text_encoder")
    assert str(copy / "text_encoder") in refused(capsys, bad_sample(copy))


def test_a_foreign_checkpoint(copy, capsys, tmp_path):
    index = json.loads((copy / "model_index.json").read_text())
    index["unet"] = ["diffusers", "FluxTransformer2DModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert "FluxTransformer2DModel" in refused(capsys, bad_sample(copy))
    (tmp_path / "pictures").mkdir()
    said = refused(capsys, bad_sample(tmp_path / "pictures"))
    assert "pictures" in said and "model_index.json" in said


def test_a_checkpoint_of_other_shapes(copy, capsys):
    file = copy / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"cross_attention_dim": 24}))
    said = refused(capsys, bad_sample(copy))
    assert str(copy) in said and "cross_attention_dim" in said


def test_training_without_its_frozen_parts(capsys, tmp_path):
    said = refused(capsys, ["train", "--vae_weights_path", tmp_path / "nothing"])
    assert "nothing" in said
    said = refused(capsys, ["train-vae", "--dataset_path", tmp_path / "nothing"])
    assert "nothing" in said


# ---- evaluate ----


def test_evaluate_writes_a_report(model, tmp_path, capsys):
    folder = tmp_path / "report"
    flags = ["--checkpoint_path", model, "--output_dir", folder, "--num_prompts", 1]
    main(["evaluate", *map(str, flags), "--num_inference_steps", "1"])
    report = json.loads((folder / "scores.json").read_text())
    assert report["facts"]["model"] == str(model)
    assert report["facts"]["num_prompts"] == 1
    assert set(report["scores"]) == set(report["records"])
    assert len(report["scores"]) == 7
    assert (folder / "scores.md").read_text() in capsys.readouterr().out


def test_evaluate_refuses_nothing(model, capsys):
    arguments = ["evaluate", "--checkpoint_path", model, "--num_prompts", "0"]
    assert "num_prompts" in refused(capsys, arguments)


@pytest.mark.parametrize("flag", ["unet_channels", "norm_num_groups", "offset_noise"])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_flag_of_the_first_edition_is_gone(tmp_path, capsys, flag, in_a_file):
    given = [f"--{flag}", "3"]
    if in_a_file:
        (tmp_path / "old.yaml").write_text(f"{flag}: 3\n")
        given = ["--config", str(tmp_path / "old.yaml")]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *given])
    assert stopped.value.code == 2
    assert f"{flag} is gone" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["3", "true", "[a star, 4]", "{a: b}"])
def test_a_prompt_in_a_file_that_is_no_text_is_refused(tmp_path, capsys, prompt):
    (tmp_path / "prompt.yaml").write_text(f"prompt: {prompt}\n")
    with pytest.raises(SystemExit):
        main(["sample", "--config", str(tmp_path / "prompt.yaml")])
    assert "quotes" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["no.json", "."])
def test_a_unet_config_that_is_no_file_is_named(path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--unet_config", path, "--dry_run"])
    assert "unet_config: there is no file" in capsys.readouterr().err


def test_an_old_flag_that_another_command_has_is_not_gone(capsys):
    with pytest.raises(SystemExit):
        main(["train-vae", "--layers_per_block", "x"])
    assert "gone" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"batch_size": "x"}, {"batch_size": 1.5}, {"batch_size": ()}, {"ema_decay": 1.0},
     {"seed": -1}, {"crops": -1}, {"on_error": "x"}, {"learning_rate": float("nan")}],
)  # fmt: skip
def test_a_setting_of_another_kind_is_refused_by_name(options):
    ((name, value),) = options.items()
    config = TrainingConfig()
    object.__setattr__(config, name, value)  # the tests' own types would refuse it
    with pytest.raises(ValueError, match=name):
        check_settings(config)


# ---- settings: every field of every command ----

ASKED = {"sample": {"prompt": ("a star",)}, "plot": {"runs": ("run",)}}
EVERY = {command: find(COMMANDS[command][1]) for command in COMMANDS}


BLANK = """
import sys
from dataclasses import fields
from sdbook.__main__ import COMMANDS, find, make_parser
import sdbook.__main__ as command_line

count, path = 0, sys.argv[1]
for command, (_, place, _) in COMMANDS.items():
    config_class = find(place)
    parser = make_parser(command, config_class)
    command_line.make_parser = lambda *given: parser  # 200 times the same
    asked = {"sample": "prompt: a", "plot": "runs: a", "check": "answer: a"}
    asked = asked.get(command, "seed: 3")
    for one in fields(config_class):
        alone = [""] if command in ("sample", "train") else []
        for other in (*alone, asked):
            if other.startswith(one.name):
                continue
            with open(path, "w") as file:
                file.write(f"{one.name}:\\n{other}\\n")
            try:
                command_line.read_flags(command, config_class, ["--config", path])
                assert one.default is None, (command, one.name)
            except ValueError as error:
                said = str(error)
                assert one.default is not None or not other, (command, said)
                assert one.name in said and ("no value" in said or "None" in said), said
            count += 1
assert "torch" not in sys.modules
print(count)
"""


def test_a_blank_value_in_a_file_is_named(tmp_path):
    """Of every field of every command; without the tests' own types."""
    done = subprocess.run(
        [sys.executable, "-c", BLANK, str(tmp_path / "blank.yaml")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = sum(len(fields(config_class)) for config_class in EVERY.values())
    assert int(done.stdout) > expected


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_path_or_name_is_refused(command):
    for one in fields(EVERY[command]):
        if one.type in (str, str | None) and one.default != "":
            for empty in ("", " "):
                with pytest.raises(ValueError, match=f"{one.name} has an empty value"):
                    EVERY[command](**ASKED.get(command, {}), **{one.name: empty})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_of_another_kind_is_refused(command):
    """From Python, too: the tests' own types would say it first, hence `check`."""
    config = EVERY[command](**ASKED.get(command, {}))
    for one in fields(config):
        kept = getattr(config, one.name)
        for wrong in (b"x", {}, [1, []], 3j, math.nan):
            object.__setattr__(config, one.name, wrong)
            with pytest.raises(ValueError, match=f"{one.name} is .*; give"):
                check_settings(config)
        object.__setattr__(config, one.name, kept)


def test_values_are_kept_as_their_kind():
    config = TrainingConfig()
    for name, given, kept in (
        ("batch_size", np.int64(3), 3), ("learning_rate", np.float32(0.5), 0.5),
        ("kinds", ["two", "single"], ("two", "single")), ("output_dir", Path("a"), "a"),
    ):  # fmt: skip
        object.__setattr__(config, name, given)
        check_settings(config)
        now = getattr(config, name)
        assert now == kept and type(now) is type(kept)
    for name, given in (("batch_size", True), ("flip", 1), ("learning_rate", 10**400)):
        config = TrainingConfig()
        object.__setattr__(config, name, given)
        with pytest.raises(ValueError, match=name):
            check_settings(config)


@pytest.mark.parametrize(
    "command, options",
    [
        ("train-clip", {"vocab_size": 513}),
        ("train-clip", {"max_length": 2}),
        ("train-clip", {"num_hidden_layers": 0}),
        ("train-vae", {"block_out_channels": (0, 8)}),
        ("train-lora", {"alpha": -1.0}),
        ("train", {"beta_schedule": "squaredcos"}),
        ("train", {"prediction_type": "noise"}),
        ("train", {"seed": 2**64}),
        ("train", {"output_dir": "models", "pretrained": "./models"}),
        ("train-lora", {"output_dir": "models", "pretrained": "models"}),
        ("evaluate", {"num_prompts": 0}),
        ("evaluate", {"output_dir": "a", "compare_with": "./a"}),
    ],
)
def test_limits_of_settings(command, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=next(reversed(options))):
        EVERY[command](**options)


# ---- what is imported ----


def modules_after(code, folder=None) -> set[str]:
    """The modules that a fresh Python has imported after some lines."""
    code = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_wrong_flags_are_refused_before_anything_heavy_is_imported():
    code = f"""
from sdbook.__main__ import main
for command in {list(COMMANDS)}:
    try:
        main([command, "--stepz", "3"])
    except SystemExit as error:
        assert error.code == 2
"""
    assert not {"torch", "numpy", "PIL", "transformers"} & modules_after(code)


# ---- did you mean ----


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sample", "--prompt", "a", "--sed", "3"], "did you mean --seed?"),
        (["train", "--batch-size", "3"], "did you mean --batch_size?"),
        (["train", "-batch_size", "3"], "did you mean --batch_size?"),
        (["train", "--batch", "3"], "there is no --batch"),
        (["train", "--kinds", "single"], "kinds is single; give a list of texts"),
        (["train", "--num_train_epochs", "x"], "epochs is x; give a whole number"),
    ],
)
def test_a_mistyped_flag(arguments, words, capsys):
    assert words in refused(capsys, arguments)


def test_a_mistyped_key_or_command(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("bach_size: 3\n")
    said = refused(capsys, ["train", "--config", tmp_path / "mine.yaml"])
    assert "did you mean batch_size?" in said
    (tmp_path / "mine.yaml").write_text("seed: 3\nbatch_size: 2\nseed: 4\n")
    said = refused(capsys, ["train", "--config", tmp_path / "mine.yaml"])
    assert "mine.yaml has seed twice" in said
    (tmp_path / "mine.yaml").write_bytes("output_dir: grün\n".encode("latin-1"))
    said = refused(capsys, ["train", "--config", tmp_path / "mine.yaml"])
    assert "mine.yaml:1: not UTF-8" in said and "iconv" in said
    (tmp_path / "mine.yaml").write_text("")
    assert "config" in refused(capsys, ["train", "--config", tmp_path / "mine.yaml"])
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "did you mean train?" in capsys.readouterr().err


# ---- prompts from a file; what is written where ----


def test_prompts_from_a_file(draw, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red  star 🍎\r\n\r\n  \n[ein] grüner Fisch".encode())
    path = draw("--prompt_file", str(file), prompt=(), steps=1)
    texts = [Image.open(p).text["prompt"] for p in (path, tmp_path / "out-1.png")]
    assert texts == ["a red star 🍎", "[ein] grüner Fisch"]
    assert not (tmp_path / "out-2.png").exists()
    assert "prompt_file" not in Image.open(path).text["command"]
    sample = ["sample", "--prompt_file", file]
    assert "one of the two" in refused(capsys, [*sample, "--prompt", "a"])
    for data, words in (
        ("grün\n".encode("latin-1"), "prompts.txt:1: not UTF-8"),
        ("a star\n".encode("utf-16"), "UTF-16"),
        (b"\n \n", "holds no prompt"),
    ):
        file.write_bytes(data)
        assert words in refused(capsys, sample)
    assert "10 MB" in refused(capsys, ["sample", "--prompt_file", "/dev/zero"])
    file.unlink()
    assert str(file) in refused(capsys, sample)


def test_many_pictures_are_drawn_a_few_at_a_time(draw, monkeypatch):
    flags = ["--num_images", "3", "--seed", "5"]
    whole, few = draw(*flags, name="a.png"), []
    monkeypatch.setattr("sdbook.run.sampling.PIXELS_AT_ONCE", 2 * 64**2)
    called = StableDiffusion.__call__

    def call(pipe, prompt, **options):
        few.append(len(prompt))
        return called(pipe, prompt, **options)

    monkeypatch.setattr(StableDiffusion, "__call__", call)
    parts = draw(*flags, name="b.png")
    assert few == [2, 1]
    for end in ("", "-1", "-2"):
        one, other = (path.with_stem(path.stem + end) for path in (whole, parts))
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
        assert Image.open(one).text == Image.open(other).text


@pytest.mark.parametrize("flag", ["image_path", "mask_path"])
def test_no_picture_is_written_over_what_it_starts_from(model, tmp_path, capsys, flag):
    own = tmp_path / "own.png"
    Image.radial_gradient("L").convert("RGB").save(own)
    (tmp_path / "link.png").symlink_to(own)
    os.link(own, tmp_path / "own-1.png")
    before = own.read_bytes()
    flags = ["--image_path", own, f"--{flag}", own]
    for target in ("own.png", "link.png", "other/../own.png"):
        (tmp_path / "other").mkdir(exist_ok=True)
        flags = ["--image_path", own, f"--{flag}", own, "--output_path"]
        said = refused(capsys, bad_sample(model, *flags, tmp_path / target))
        assert f"is the {'image' if flag == 'image_path' else ''}" in said
    several = ["--image_path", tmp_path / "own-1.png", "--num_images", "2"]
    several += ["--output_path", own]
    assert "own.png is the image_path" in refused(capsys, bad_sample(model, *several))
    assert own.read_bytes() == before


def test_a_full_disk_leaves_what_was_there(monkeypatch, tmp_path):
    path, facts = tmp_path / "out.png", {"checkpoint_path": "scenes"}
    write_png(Image.new("RGB", (8, 8)), path, facts)
    before = path.read_bytes()

    def full(image, file, *given, **options):
        Path(file).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(Image.Image, "save", full)
    for name in ("out.png", "new.png"):
        with pytest.raises(OSError, match=f"{name} could not be written .No space"):
            write_png(Image.new("RGB", (8, 8)), tmp_path / name, facts)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


# ---- plot ----


def write_log(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("\n".join(map(str, lines)) + "\n")


def test_the_curves_of_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = [json.dumps({"step": s, "loss": 1 / s, "seconds": 2}) for s in (1, 2, 3)]
    nan = '{"step": 4, "loss": NaN, "psnr": 20, "scenes": "all", "done": true}'
    write_log(tmp_path / "one", *one, "5", "{}", "[]", '{"step": "x"}', nan, "{cut")
    write_log(tmp_path / "two", '{"step": 10, "val_error": 0.5}')
    assert find_curves(read_log("one")) == {
        "loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)], "psnr": [(4, 20)]
    }  # fmt: skip
    main(["plot", "one", "two/log.jsonl", "--output_path", "new/all.png"])
    assert "wrote new/all.png" in capsys.readouterr().out
    assert Image.open("new/all.png").width > 3 * 144 * 4
    main(["plot", "two"])
    assert Image.open("curves.png").width < 2 * 144 * 4


def test_what_cannot_be_plotted(tmp_path, capsys):
    write_log(tmp_path / "none", "no log")
    write_log(tmp_path / "words", '{"step": 1, "scenes": "all"}')
    (tmp_path / "folder").mkdir()
    for arguments, words in (
        ([], "sdbook plot runs/unet"),
        ([tmp_path / "nowhere"], "there is no"),
        ([tmp_path / "folder"], "log.jsonl"),
        ([tmp_path / "none"], "no log of a training"),
        ([tmp_path / "words"], "no number"),
        ([tmp_path / "words", "--output_path", "a.jpg"], ".png"),
    ):
        assert words in refused(capsys, ["plot", *arguments])


# ---- what to run next ----


def test_the_next_command_is_one(tmp_path, monkeypatch):
    """Each can be typed as it stands, and names the paths of the run before."""
    monkeypatch.chdir(tmp_path)
    write_folder(Scenes(64), tmp_path / "my pictures", 2)
    caption = (tmp_path / "my pictures/captions/00000.txt").read_text().strip()
    own = {"dataset_path": "my pictures", "image_size": 32, "flip": True}

    def after(command, **options):
        words = shlex.split(next_command(command, EVERY[command](**options)))
        assert words[0] == "sdbook"
        return words[1], read_flags(words[1], EVERY[words[1]], words[2:])

    command, config = after("train-vae", **own, output_dir="runs/my-vae")
    assert (command, config.output_dir) == ("train-clip", "runs/my-clip")
    assert (config.dataset_path, config.image_size) == ("my pictures", 32)
    assert config.flip
    command, config = after("train-clip", kinds=("single", "two"), output_dir="a/text")
    assert (command, config.output_dir) == ("train-vae", "a/text-vae")
    assert config.kinds == ("single", "two")
    for command in ("train-vae", "train-clip"):
        (tmp_path / "runs" / command.removeprefix("train-")).mkdir(parents=True)
        following, config = after(command, **own) if command[-1] == "p" else (0, 0)
    assert (following, config.output_dir) == ("train", "runs/unet")
    assert config.vae_weights_path == "runs/vae"
    assert config.text_encoder_path == "runs/clip"
    assert config.image_size == 32
    for command, made in (
        ("train", {"checkpoint_path": "out"}),
        ("train-lora", {"checkpoint_path": "scenes", "lora_path": "out"}),
        ("train-word", {"checkpoint_path": "scenes", "word_path": "out"}),
    ):
        following, config = after(command, **own, output_dir="out")
        assert following == "sample" and config.prompt == (caption,)
        assert made == {name: getattr(config, name) for name in made}
    _, config = after("train-lora", **own, output_dir="out", rank=0)
    assert (config.checkpoint_path, config.lora_path) == ("out/pipeline", None)
    _, config = after("train", output_dir="out", sample_prompts=("- a 🍎",))
    assert config.prompt == ("- a 🍎",)


def test_a_training_says_what_it_wrote_and_what_to_run_next(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "my-vae"), "--block_out_channels", "[8, 8]"]
    flags += ["--norm_num_groups", "4", "--batch_size", "2", "--max_steps", "1"]
    main(["train-vae", *flags, "--num_pictures", "64", "--validate_every", "0"])
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"wrote {tmp_path / 'my-vae'}"
    assert said[-1].startswith("next: sdbook train-clip --num_pictures 64 --output_dir")
    assert any("1 of 2 pictures (3.12 % of all" in line for line in said)
    assert any("× 1 process = 2" in line for line in said)


def test_far_too_few_pictures(tmp_path, capsys):
    write_folder(Scenes(64), tmp_path / "pictures", 3)
    flags = ["--dataset_path", str(tmp_path / "pictures"), "--dry_run"]
    main(["train-clip", *flags])
    said = capsys.readouterr().err
    assert "3 pictures to train on" in said and "train-lora" in said
    main(["train-clip", "--num_pictures", "3", "--dry_run"])  # of endless scenes
    assert "far too few" not in capsys.readouterr().err


def test_counts_as_people_say_them():
    from sdbook.counts import counted, readable

    assert counted(1, "picture") == "1 picture"
    assert counted(0, "picture") == "0 pictures"
    assert counted(20_000, "process", "processes") == "20,000 processes"
    assert (readable(3_200_000_000), readable(5_000_000)) == ("3.2 GB", "5.0 MB")
