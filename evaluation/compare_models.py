"""Compare editors on the same images, instructions and seeds: a page, a contact sheet, scores and blind votes.

    python evaluation/compare_models.py --model timbrooks/instruct-pix2pix --model my-editor+my-lora \\
        --dataset_name my-pairs --dataset_split test --num_samples 50 --output_dir comparison
    python evaluation/compare_models.py ... --vote

An adapter is added to an editor with +. Writes index.html (grid, slider, filter and scores), sheet-1.png and
results.json beside the edits. --vote serves a page on this machine that shows two edits without their editors; the
votes, in votes.jsonl, give the ratings. Run the same command again to resume.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.flags import (  # noqa: E402
    IP2P_CLIP,
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

DEFAULT_PORT = 7870


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, IP2P_CLIP)
    add = parser.add_argument_group("comparison").add_argument
    add("--guidance_scale", type=float, metavar="S", help="of the text, of all editors (default: each editor's)")
    add("--image_guidance_scale", type=float, metavar="S", help="of the image (default: each editor's)")
    add("--vote", action="store_true", help="serve the page for blind votes, until Ctrl-C")
    add("--port", type=int, default=DEFAULT_PORT, metavar="N", help=f"of --vote, on localhost (default {DEFAULT_PORT})")
    add_judge_flags(parser)
    return parser.parse_args(argv)


def find_problems(args: argparse.Namespace) -> list[str]:
    problems = find_setting_problems({name: getattr(args, name) for name in ("guidance_scale", "image_guidance_scale")})
    problems += find_judge_problems(args)
    if args.judge and len(args.model) < 2:
        problems.append("--judge compares two edits: give --model at least twice")
    if not 0 <= args.port < 65536:
        problems.append(f"--port {args.port}: must be from 0 to 65535")
    if args.vote and len(args.model) < 2:
        problems.append("--vote compares two edits: give --model at least twice")
    return problems


def run(args: argparse.Namespace) -> int:
    check_flags(args, *find_problems(args))
    quiet_libraries()
    from accelerate import PartialState

    from evaluation.comparison_page import judge_pairs, save_inputs, serve_votes, write_comparison
    from evaluation.editing import SampleEditor
    from evaluation.samples import DatasetOptions, open_samples
    from evaluation.scoring import load_scorer
    from evaluation.tables import TableRow
    from utils.editing.flags import EditorOptions
    from utils.editing.settings import EditSettings

    state, samples = PartialState(), open_samples(pick(args, DatasetOptions))
    scorer = None
    if state.is_main_process:
        scorer = load_scorer(args.clip_model, args.dino_model, str(state.device), args.mask_model)
    settings, rows, paths = replace(pick(args, EditSettings), keep_size=True), [], {}
    for model, label in label_models(args.model).items():
        name, *adapters = model.split("+")
        options = EditorOptions(name, lora=tuple(adapters) or None, device=args.device, dtype=args.dtype)
        editor = SampleEditor.open(options, state, args.seed, args.batch_size)
        folder = args.output_dir / "edits" / label
        paths[label] = editor.edit(samples, settings, folder, label)
        del editor
        if scorer:
            rows.append(TableRow.measure(label, scorer, samples, paths[label]))
    if not scorer:
        return 0
    rows.append(TableRow.measure("input, not edited", scorer, samples, [sample.original for sample in samples]))
    inputs = save_inputs(samples, args.output_dir)
    write_comparison(samples, inputs, paths, rows, args.output_dir)
    print(f"wrote {args.output_dir / 'index.html'}, sheet-1.png and results.json", flush=True)
    if args.judge:
        from evaluation.judge import Judge, JudgeOptions

        judge_pairs(Judge(pick(args, JudgeOptions), args.output_dir), samples, paths, args.output_dir)
    if args.vote:
        serve_votes(samples, inputs, paths, args.output_dir, args.port)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(parse_flags, run, argv)


if __name__ == "__main__":
    sys.exit(main())
