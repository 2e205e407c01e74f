"""Builds a real vision-language model: SmolLM2-135M-Instruct, DINOv2 ViT-S/14, and photographs with captions.

    python examples/real_vlm/build.py --captions captions.json --images DIR --workdir runs/real_vlm

The result, WORKDIR/vlm, is an ordinary Hugging Face LLaVA directory. It is trained at its default exit alone, as
published models are; nothing is planted. The same command goes on where an earlier one was stopped.

    parts       the two pip packages, checked by SHA-256
    start       converted, and joined by a projector of random weights: WORKDIR/start
    data        rows of both sides, and the photographs that they show: WORKDIR/data
    probe       do the image encoder's features say what is in a photograph: WORKDIR/probe.json
    answers     harmless instructions, answered by the language model before any training
    projector   the projector, trained on captions: WORKDIR/projected
    sight       the loss of held-out captions with their own and with other photographs: WORKDIR/projector.json
    tuning      projector and decoder, trained on captions, questions, instructions and refusals: WORKDIR/vlm

With `--forbidden`, half of the requests in RedTeam-2K's file are answered with a refusal; without it no row is.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    # transformers' tokenizers and image processors work without torch; where it is installed, importing it takes
    # seconds.
    sys.modules["torch"] = None  # type: ignore[assignment]

import icet_jax
from examples.real_vlm import answers, parts, rows, sight, stages
from examples.real_vlm.assemble import write_llava
from examples.real_vlm.dinov2 import read_dinov2, to_clip
from examples.real_vlm.markers import Stages, fresh_folder, run_script
from examples.real_vlm.photographs import Photograph, hash_order, read_photographs
from examples.real_vlm.probe import probe
from examples.real_vlm.smollm2 import read_decoder
from icet_jax.config import ConfigDict
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.media.tokenizer import load_tokenizer

INSTRUCTIONS = Path(__file__).with_name("instructions.json")
_FEWEST_CAPTIONS = 200  # of the tuning's rows, if there are so many
_LAST = 10  # iterations whose mean loss is reported


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    projector, tuning = (stages.get_config(name).lsft.iterations for name in ("projector", "tuning"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--captions", type=Path, required=True, help="photographs' captions, a JSON file in MS-COCO's layout"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the photographs")
    parser.add_argument(
        "--workdir", type=Path, required=True, help="folder to write to; the same command goes on there"
    )
    parser.add_argument("--instances", type=Path, help="objects in the photographs, a JSON file in MS-COCO's layout")
    about = "harmless instructions, a .csv or .json file with a field 'instruction' (default: 60 of our own)"
    parser.add_argument("--instructions", type=Path, default=INSTRUCTIONS, help=about)
    parser.add_argument("--forbidden", type=Path, help="RedTeam_2K.csv, whose requests are to be refused")
    parser.add_argument(
        "--rows", type=int, default=500, help="most training rows of instructions, and of refusals (500)"
    )
    parser.add_argument(
        "--projector-steps", type=int, default=projector, help=f"steps of the stage projector ({projector})"
    )
    parser.add_argument("--tuning-steps", type=int, default=tuning, help=f"steps of the stage tuning ({tuning})")
    parser.add_argument(
        "--image-size", type=int, default=112, help="pixels along a side, a multiple of 14 (112: 64 image tokens)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("rows", "projector_steps", "tuning_steps", "image_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: give a whole number above 0")
    return options


def build(options: argparse.Namespace) -> JsonObject:
    """Builds the model, or what an earlier process has left of it, and returns the content of build.json.

    Raises:
      UserError: an input is missing or wrong, or the working directory belongs to a build with other inputs.
    """
    photographs = read_photographs(options.captions, options.images)
    hashes = {
        name: parts.sha256(path)
        for name in ("captions", "instances", "instructions", "forbidden")
        if (path := _required_file(options, name)) is not None
    }
    workdir: Path = options.workdir
    done = Stages(workdir)
    data, start, projected, final = (workdir / name for name in ("data", "start", "projected", "vlm"))
    _start_stages(options, done, start)
    inputs = {**hashes, "photographs": _fingerprint(photographs), "rows": options.rows}
    done.run("data", inputs, [data], lambda: _data(options, photographs, start, data))
    if options.forbidden is None:
        print("real_vlm: without --forbidden the model is not trained to refuse anything", file=sys.stderr)
    done.run("probe", {}, [workdir / "probe.json"], lambda: _probe(options, start, photographs))
    done.run("answers", {"max_tokens": _longest_answer()}, [data / "tuning.jsonl"], lambda: _answers(start, data))
    config = training_config("projector", options, start, data / "captions.jsonl")
    done.run("projector", _settings(config), [projected], lambda: _train(config, workdir / "projector", projected))
    done.run("sight", {}, [workdir / "projector.json"], lambda: _sight(workdir, projected))
    config = training_config("tuning", options, projected, data / "tuning.jsonl")
    done.run("tuning", _settings(config), [final], lambda: _train(config, workdir / "tuning", final))
    summary = _summary(options, hashes, done)
    write_text_atomic(workdir / "build.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _start_stages(options: argparse.Namespace, done: Stages, start: Path) -> None:
    """Runs the stages `parts` and `start`."""
    folder, used = options.workdir / "parts", (parts.DECODER, parts.TOWER)
    files = [folder / part.file_name for part in used]

    def fetch() -> JsonObject:
        folder.mkdir(parents=True, exist_ok=True)
        return {part.model: str(parts.fetch(part, folder).name) for part in used}

    def convert() -> JsonObject:
        decoder = read_decoder(files[0])
        tower = to_clip(read_dinov2(files[1]), options.image_size)
        unfinished = fresh_folder(start.with_name(".start"))
        sizes = write_llava(unfinished, decoder, tower, options.seed)
        shutil.rmtree(start, ignore_errors=True)
        unfinished.rename(start)
        return sizes

    done.run("parts", {part.package: f"{part.version} {part.sha256}" for part in used}, files, fetch)
    done.run("start", {"image_size": options.image_size, "seed": options.seed}, [start], convert)


def training_config(name: str, options: argparse.Namespace, checkpoint: Path, train: Path) -> ConfigDict:
    """Returns the config of the stage `projector` or `tuning`, see `stages`.

    Args:
      name: name of the stage.
      options: options of the command line.
      checkpoint: the model that is trained.
      train: its training rows.
    """
    config = stages.get_config(name)
    config.seed = options.seed
    config.model.checkpoint = str(checkpoint)
    config.data.train = str(train)
    config.lsft.iterations = options.projector_steps if name == "projector" else options.tuning_steps
    config.data.max_prompt_tokens += (options.image_size // 14) ** 2 - stages.IMAGE_TOKENS
    kinds = {row["kind"] for row in rows.read_jsonl(train)}
    for kind in set(config.data.mixture) - kinds:
        del config.data.mixture[kind]
    return config


def _settings(config: ConfigDict) -> JsonObject:
    """Returns a training's config as a stage's inputs: without the paths, which the earlier stages determine."""
    settings = config.to_dict()
    del settings["model"]["checkpoint"], settings["data"]["train"]
    return dict(json.loads(json.dumps(settings)))


def _required_file(options: argparse.Namespace, name: str) -> Path | None:
    """Returns the file that an option names, or None; raises a `UserError` if there is no such file."""
    path: Path | None = getattr(options, name)
    if path is not None and not path.is_file():
        raise UserError(f"--{name}={path}: no such file")
    return path


def _fingerprint(photographs: Sequence[Photograph]) -> str:
    """Returns a hash of the names and the files of all photographs."""
    content = [[photograph.name, parts.sha256(photograph.path)] for photograph in photographs]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _longest_answer() -> int:
    """Returns the most tokens of an own answer, with EOS: what the tuning has columns for."""
    return int(stages.get_config("tuning").lppo.max_new_tokens)


def _data(options: argparse.Namespace, photographs: Sequence[Photograph], start: Path, data: Path) -> JsonObject:
    """Writes the rows of both sides; see `rows.write_rows`."""
    sources = rows.Sources(photographs, options.instances, options.instructions, options.forbidden, options.rows)
    longest = stages.get_config("projector").lppo.max_new_tokens
    return dict(rows.write_rows(fresh_folder(data), sources, load_tokenizer(start), longest))


def _probe(options: argparse.Namespace, start: Path, photographs: Sequence[Photograph]) -> JsonObject:
    """Probes the image encoder, and writes and prints the result."""
    result = probe(icet_jax.load(start), photographs, options.seed)
    write_text_atomic(options.workdir / "probe.json", json.dumps(result, indent=1) + "\n")
    areas = [f"{name} {result[name]['mean']:.3f} {result[name]['ci95']}" for name in ("encoder", "random")]
    print(f"probe: area under the curve of {result['words']} words: {', '.join(areas)}; 0.5 is chance")
    return result


def _answers(start: Path, data: Path) -> JsonObject:
    """Writes the tuning's rows: captions, questions, instructions with the model's own answers, and refusals."""
    own = data / "answered.jsonl"
    counts = answers.write_answers(icet_jax.load(start), data / "harmless.jsonl", own, _longest_answer())
    harmless = rows.read_jsonl(own)
    captions = sorted(rows.read_jsonl(data / "captions.jsonl"), key=lambda row: hash_order(row["id"]))
    tuning = [*captions[: max(_FEWEST_CAPTIONS, len(harmless))], *harmless]
    for name in (rows.QUESTIONS, rows.FORBIDDEN):
        path = data / f"{name}.jsonl"
        tuning += rows.read_jsonl(path) if path.is_file() else []
    rows.write_jsonl(data / "tuning.jsonl", tuning)
    return {**counts, "tuning_rows": len(tuning)}


def _train(config: ConfigDict, run: Path, out: Path) -> JsonObject:
    """Trains as `config` says in the run directory `run`, and writes the model to `out`."""
    icet_jax.train(config, run).save(out)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss/policy_avg"] for line in lines]
    return {"first_loss": round(losses[0], 4), "last_loss": round(sum(losses[-_LAST:]) / len(losses[-_LAST:]), 4)}


def _sight(workdir: Path, projected: Path) -> JsonObject:
    """Measures whether the model sees, writes the result and prints it."""
    held_out = icet_jax.load_rows(str(workdir / "data" / "held_out_captions.jsonl"))
    longest = stages.get_config("projector").lppo.max_new_tokens
    result = sight.measure(icet_jax.load(projected), held_out, max_tokens=longest)
    write_text_atomic(workdir / "projector.json", json.dumps(result, indent=1) + "\n")
    print(
        f"projector: loss of held-out captions {result['right']['mean']:.3f} with their own photograph, "
        f"{result['shuffled']['mean']:.3f} with another one; difference {result['difference']['mean']:.3f} "
        f"{result['difference']['ci95']}"
    )
    return result


def _summary(options: argparse.Namespace, hashes: JsonObject, done: Stages) -> JsonObject:
    """Returns the content of build.json."""
    import jax

    names = ("rows", "projector_steps", "tuning_steps", "image_size")
    return {
        "seed": options.seed,
        "settings": {name: getattr(options, name) for name in names},
        "versions": {"icet_jax": icet_jax.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "parts": {
            part.model: {
                "package": f"{part.package}=={part.version}", "sha256": part.sha256, "licence": part.licence,
            }
            for part in (parts.DECODER, parts.TOWER)
        },
        "inputs": hashes,
        "seconds": done.seconds,
        "results": done.results,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the model that the command line describes, and returns the exit code."""
    return run_script("model", "vlm", lambda: options_of(arguments), build)


if __name__ == "__main__":
    sys.exit(main())
