"""Score editors on a benchmark or on any dataset of pairs, beside copying the input and published figures.

    python evaluation/benchmark.py --model my-editor --dataset_name my-pairs --dataset_split test --output_dir results
    python evaluation/benchmark.py --model my-editor --benchmark magicbrush --output_dir magicbrush
    python evaluation/benchmark.py --model my-editor --dataset_name restorations --vae_round_trip --output_dir out

pairs: any dataset that training accepts; with --edited_image_column none, without target images. magicbrush edits every
turn from its true input, magicbrush_multi from the edit of the turn before, and scores the last turn of each session.
emu_edit: facebook/emu_edit_test_set. gedit, imgedit and kris also save the edits where the official scorers expect
them (imgedit and kris: --dataset_name is their folder). The first row of every table is the input itself: an editor has
to beat it. Writes results.json, results.md and the edits; run the same command again to resume.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.flags import (  # noqa: E402
    IP2P_CLIP,
    MAGICBRUSH_CLIP,
    add_judge_flags,
    check_flags,
    find_judge_problems,
    label_models,
    make_parser,
    run_script,
)
from utils.cli import pick  # noqa: E402
from utils.editing.settings import find_setting_problems  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

MAGICBRUSH = dict(dataset_name="osunlp/MagicBrush", dataset_split="dev", clip_model=MAGICBRUSH_CLIP)
EMU_EDIT = dict(
    dataset_name="facebook/emu_edit_test_set",
    dataset_split="validation",
    original_image_column="image",
    edit_prompt_column="instruction",
    edited_image_column="none",
    clip_model=MAGICBRUSH_CLIP,
)
GEDIT = EMU_EDIT | dict(
    dataset_name="stepfun-ai/GEdit-Bench", dataset_split="train", original_image_column="input_image"
)
OFFICIAL = {"gedit": GEDIT, "imgedit": {"edited_image_column": "none"}, "kris": {"edited_image_column": "none"}}
BENCHMARKS = {"pairs": {}, "magicbrush": MAGICBRUSH, "magicbrush_multi": MAGICBRUSH, "emu_edit": EMU_EDIT} | OFFICIAL
TARGET_SCORES = ("l1", "l2", "clip_target", "dino_target", "clip_text")
JUDGED = ("judge_sc", "judge_pq", "judge_o")
SHOWN = {  # the columns of the table, as the papers have them
    "magicbrush": TARGET_SCORES,
    "magicbrush_multi": TARGET_SCORES,
    "emu_edit": ("clip_direction", "clip_text", "clip_image", "dino", "source_l1"),
}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, IP2P_CLIP)
    parser.set_defaults(clip_model=None, dataset_name=None, dataset_split=None)
    for action in parser._actions:
        action.required = action.required and action.dest != "dataset_name"
    add = parser.add_argument_group("benchmark").add_argument
    add(
        "--benchmark",
        choices=BENCHMARKS,
        default="pairs",
        help="sets the data flags that are not given (default pairs)",
    )
    add("--vae_round_trip", action="store_true", help="a row for the target through the editor's VAE: the ceiling")
    add("--guidance_scale", type=float, metavar="S", help="of the text (default: the editor's)")
    add("--image_guidance_scale", type=float, metavar="S", help="of the image (default: the editor's)")
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    for name, value in BENCHMARKS[args.benchmark].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dataset_split, args.clip_model = args.dataset_split or "train", args.clip_model or IP2P_CLIP
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    problems = find_setting_problems({name: getattr(args, name) for name in ("guidance_scale", "image_guidance_scale")})
    problems += find_judge_problems(args)
    if not args.dataset_name:
        problems.append("--dataset_name is missing: give a dataset, or a --benchmark that names one")
    if args.vae_round_trip and args.edited_image_column == "none":
        problems.append("--vae_round_trip needs target images, and --edited_image_column is none: remove one")
    return problems


def start_judge(args: argparse.Namespace) -> object | None:
    """The judge of --judge, after it has checked itself. Raises InputError."""
    if not args.judge:
        return None
    from evaluation.judge import Judge, JudgeOptions

    judge = Judge(pick(args, JudgeOptions), args.output_dir)
    print(judge.check_itself(), flush=True)
    return judge


def run(args: argparse.Namespace) -> int:
    check_flags(args, *find_problems(args))
    quiet_libraries()
    from accelerate import PartialState

    from evaluation.editing import SampleEditor, round_trip
    from evaluation.official import open_official_samples, write_official
    from evaluation.samples import DatasetOptions, last_turns, open_samples
    from evaluation.scoring import load_scorer
    from evaluation.tables import TableRow, read_published, write_results
    from utils.editing.flags import EditorOptions
    from utils.editing.settings import EditSettings

    state, is_multi = PartialState(), args.benchmark == "magicbrush_multi"
    is_folder = args.benchmark in ("imgedit", "kris")
    options = pick(args, DatasetOptions)
    samples = open_official_samples(args.benchmark, options) if is_folder else open_samples(options)
    scored = last_turns(samples) if is_multi else samples
    scorer = None
    if state.is_main_process:
        scorer = load_scorer(args.clip_model, args.dino_model, str(state.device), args.mask_model)
    judge = start_judge(args) if scorer else None
    originals = [sample.original for sample in scored]
    rows = [TableRow.measure("input, not edited", scorer, scored, originals, judge)] if scorer else []
    settings = replace(pick(args, EditSettings), keep_size=True)
    for model, label in label_models(args.model).items():
        options = EditorOptions(model, device=args.device, dtype=args.dtype)
        editor = SampleEditor.open(options, state, args.seed, args.batch_size)
        folder = args.output_dir / "edits" / label
        edit = editor.edit_turns if is_multi else editor.edit
        edited = zip(samples, edit(samples, settings, folder, label), strict=True)
        paths = {sample.number: path for sample, path in edited}
        if scorer and args.vae_round_trip and len(rows) == 1:
            decoded = [round_trip(editor.editor, sample.edited, args.resolution) for sample in scored]
            rows.append(TableRow.measure("target through the VAE", scorer, scored, decoded))
        del editor
        if scorer:
            edits = [paths[sample.number] for sample in scored]
            if args.benchmark in OFFICIAL:
                place = write_official(args.benchmark, scored, edits, label, args.output_dir / "official")
                print(f"for the official scorer: {place}", flush=True)
            rows.append(TableRow.measure(label, scorer, scored, edits, judge))
    if scorer:
        published, shown = read_published(args.benchmark), SHOWN.get(args.benchmark)
        shown = (*shown, *JUDGED) if shown else None
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        table = write_results(rows, published, shown, args.output_dir, flags)
        if judge:
            print(f"{judge.num_malformed} malformed answers of the judge, {judge.num_refused} questions refused")
        print(f"\n{table}\nwrote {args.output_dir / 'results.json'} and results.md", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(parse_flags, run, argv)


if __name__ == "__main__":
    sys.exit(main())
