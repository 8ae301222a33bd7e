"""`sdbook evaluate`: a model drawn from and scored, and the report of it."""

from dataclasses import dataclass
from pathlib import Path

from .sampling import DTYPES, open_pipeline, pick_device
from .settings import check_settings, setting


@dataclass(frozen=True)
class EvaluationConfig:
    """Score a model of the scenes, kind by kind of prompt: `sdbook evaluate`.

    Attributes:
        checkpoint_path: a shipped model's name or a folder.
        output_dir: where scores.json, scores.md and pictures go.
        num_prompts: prompts of each kind.
        seed: of the prompts and the pictures.
        num_inference_steps: denoising steps.
        guidance_scale: how strongly the prompt pulls.
        compare_with: the output_dir of another run with the same prompts.
        clip_path: the CLIP of the CLIP score; a shipped one's name, the output of
            train-clip, or a folder of transformers.
        inception_path: weights of Inception v3 for FID and KID, in place of the
            features of the shipped CLIP.
        geneval_prompts: GenEval's evaluation_metadata.jsonl; then its prompts are
            drawn into output_dir, four pictures each, for its own tool to score.
        device: auto, cpu, cuda or mps.
        dtype: float32, float16 or bfloat16.
    """

    checkpoint_path: str = "scenes"
    output_dir: str = "evaluation"
    num_prompts: int = setting(200, at_least=1)
    seed: int = setting(0, at_least=0)
    num_inference_steps: int = setting(25, at_least=1)
    guidance_scale: float = 3.0
    compare_with: str | None = None
    clip_path: str = "clip"
    inception_path: str | None = None
    geneval_prompts: str | None = None
    device: str = "auto"
    dtype: str = setting("float32", choices=DTYPES)

    def __post_init__(self):
        check_settings(self)
        if self.geneval_prompts and (self.compare_with or self.inception_path):
            raise ValueError(
                "geneval_prompts only draws, and GenEval's own tool scores; leave out "
                "compare_with and inception_path"
            )
        other = self.compare_with
        if other and Path(other).resolve() == Path(self.output_dir).resolve():
            raise ValueError(
                f"compare_with is output_dir, {self.output_dir}, and would be written "
                "over; choose another output_dir"
            )


def evaluate(config: EvaluationConfig) -> None:
    """Draw, judge and measure; write the report, and print its tables."""
    from .. import evaluation, reports

    drawing = {
        "seed": config.seed,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
    }
    model = config.checkpoint_path, config.device, config.dtype
    folder = Path(config.output_dir)
    if config.geneval_prompts:
        listed = reports.read_geneval(config.geneval_prompts)
        reports.write_geneval(open_pipeline(*model), listed, folder, **drawing)
        print(f"wrote {folder}")
        return
    other = reports.read_report(config.compare_with) if config.compare_with else None
    folder.mkdir(parents=True, exist_ok=True)  # or fail before the work
    clip = evaluation.open_clip(config.clip_path)
    network = evaluation.open_features(config.inception_path)
    network = network.to(pick_device(config.device))
    pipe = open_pipeline(*model)
    settings = {"num_prompts": config.num_prompts, **drawing}
    records = evaluation.evaluate(pipe, **settings)
    measures = evaluation.measure(records, clip, network, config.seed)
    facts = {"model": config.checkpoint_path, **settings, "clip": config.clip_path}
    inception = config.inception_path
    facts["features"] = Path(inception).name if inception else "clip"
    evaluation.save_report(records, folder, measures, **facts)
    print((folder / "scores.md").read_text(encoding="utf-8"))
    if other:
        table = evaluation.compare(records, other["records"])
        reports.write_text(folder / "comparison.md", table)
        print(table)
    print(f"wrote {folder}")
