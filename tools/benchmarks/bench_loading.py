"""How long loading takes and how much memory, beside diffusers, from the same files.

    tools/benchmarks/bench_loading.py                     Stable Diffusion 1.5's size
    tools/benchmarks/bench_loading.py --json result.json  keep the numbers, too

Makes the files first, with random weights: 9 GB in a temporary folder, which is
removed again (--folder keeps them elsewhere). Then every row is a fresh Python that
loads the whole pipeline and looks at every weight once. Memory is the largest
resident set; `import torch` alone is subtracted, and the file's size is 1.00.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

MAKE = """
import sys
from sdbook import StableDiffusion
from sdbook.clip import CLIPTextModel, Tokenizer
from sdbook.schedulers import make_scheduler
from sdbook.unet import UNet
from sdbook.vae import AutoencoderKL

tokenizer = Tokenizer.train(["a red star above a blue house"], vocab_size=514)
scheduler = make_scheduler("ddim", beta_schedule="scaled_linear", steps_offset=1)
pipe = StableDiffusion(
    AutoencoderKL(), CLIPTextModel(), tokenizer, UNet(), scheduler
)
pipe.save_pretrained(sys.argv[1] + "/folder")
pipe.save_original(sys.argv[1] + "/file.safetensors")
"""

LOAD = """
import resource, sys, time
import torch

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch_alone = peak()
who, source, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
if who == "ours":
    from sdbook import StableDiffusion
    from transformers import CLIPTokenizer  # which diffusers imports beforehand, too
    start = time.perf_counter()
    pipe = StableDiffusion.from_pretrained(
        source, dtype, config=None if source == folder else folder
    )
else:
    import diffusers
    diffusers.StableDiffusionPipeline
    start = time.perf_counter()
    if source == folder:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    else:
        pipe = diffusers.StableDiffusionPipeline.from_single_file(
            source, config=folder, dtype=dtype, local_files_only=True
        )
loaded = time.perf_counter() - start
for part in (pipe.unet, pipe.vae, pipe.text_encoder):
    for parameter in part.parameters():
        assert parameter.dtype == dtype
        parameter.detach().view(-1)[::64].sum().item()
print(loaded, time.perf_counter() - start, torch_alone, peak())
"""


def run(code: str, *arguments: str) -> str:
    """What a fresh Python prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.check_output(command, text=True)


def rows(folder: Path):
    """Measure each layout and dtype, ours and theirs."""
    model, file = folder / "folder", folder / "file.safetensors"
    size = file.stat().st_size
    for layout, source in (("folder", model), ("one file", file)):
        for dtype in ("float32", "float16"):
            for who in ("ours", "diffusers"):
                out = run(LOAD, who, str(source), str(model), dtype)
                loaded, seen, alone, peak = map(float, out.split()[-4:])
                yield {
                    "layout": layout, "dtype": dtype, "who": who,
                    "file_bytes": size, "seconds_to_load": round(loaded, 2),
                    "seconds_with_first_look": round(seen, 2),
                    "torch_alone_bytes": int(alone), "peak_bytes": int(peak),
                    "peak_over_file": round((peak - alone) / size, 3),
                }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of loading.")
    parser.add_argument("--folder", type=Path, help="where the files lie, or will")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "file.safetensors").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            run(MAKE, str(folder))
        print(f"{'':<30}{'load':>9}{'+ look':>9}{'peak':>10}{'/ file':>8}")
        results = []
        for row in rows(folder):
            results.append(row)
            what = f"{row['layout']}, {row['dtype']}, {row['who']}"
            print(
                f"{what:<30}{row['seconds_to_load']:7.2f} s"
                f"{row['seconds_with_first_look']:7.2f} s"
                f"{row['peak_bytes'] / 1e9:7.2f} GB{row['peak_over_file']:8.2f}",
                flush=True,
            )
    if options.json:
        command = "python tools/benchmarks/bench_loading.py"
        record = {"command": command, "machine": platform.platform(), "rows": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
