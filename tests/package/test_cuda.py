"""What only a GPU can show: the same picture, half precision, no waiting, training.

    pytest tests/package/test_cuda.py                          on a machine with a GPU
    SDBOOK_TEST_DEVICE=cpu pytest tests/package/test_cuda.py   do they run at all?
"""

import json
import os

import pytest
import torch

from sdbook.pipeline import StableDiffusion
from sdbook.training import TrainingConfig, train

DEVICE = os.environ.get("SDBOOK_TEST_DEVICE", "cuda")
SHIPPED = "data/models/scenes"
PROMPTS = ["a red star above a blue house", "two green fish"]

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)


def draw(dtype=torch.float32, device=DEVICE, **options):
    """Two pictures by the shipped model, as numbers from 0 to 1."""
    pipe = StableDiffusion.from_pretrained(SHIPPED).to(device, dtype)
    options = dict(output_type="pt", num_inference_steps=10, progress=False) | options
    return pipe(PROMPTS, **options).images.float().cpu()


@pytest.fixture(scope="module")
def expected():
    return draw(device="cpu")


def test_the_same_picture_as_on_the_cpu(expected, monkeypatch):
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(backend, "allow_tf32", False)
    assert (draw() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(expected, dtype):
    drawn = draw(dtype)
    assert torch.isfinite(drawn).all()
    # An edge may move by a pixel; the picture may not change.
    assert (drawn - expected).abs().mean() < 0.02


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA can tell")
def test_the_loop_never_waits_for_the_device():
    """Nothing is read back between the first and the last step."""

    def watch(step, t, latents):
        torch.cuda.set_sync_debug_mode("error" if step < 8 else "default")

    try:
        draw(callback=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_in_half_precision_goes_on_where_it_stopped(tmp_path, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = dict(
        num_pictures=16, batch_size=4, mixed_precision="bf16", log_every=1,
        vae_weights_path=SHIPPED, text_encoder_path=SHIPPED, unet_preset="tiny",
        checkpoint_every=2, validate_every=0, warmup_steps=1, num_validation=4,
        output_dir=str(tmp_path),
    )  # fmt: skip
    train(TrainingConfig(**settings, max_steps=4))
    whole = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    last = max((tmp_path / "checkpoints").glob("step-*.pt"))
    last.unlink()  # as if the power had failed after step 2
    train(TrainingConfig(**settings, max_steps=4))
    again = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    losses = [[line["loss"] for line in lines] for lines in (whole, again)]
    assert len(losses[0]) == 4 and all(loss > 0 for loss in losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
