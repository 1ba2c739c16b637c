"""Draw how editors trade staying close to the input for following the instruction, over the guidance scales.

    python evaluation/guidance_curves.py --model my-editor --model timbrooks/instruct-pix2pix \\
        --dataset_name my-pairs --dataset_split test --num_samples 200 --output_dir curves

Edits every sample with every image guidance scale and draws the curves of InstructPix2Pix (2211.09800, figures 8 and
10): x is the CLIP directional similarity, y the CLIP image similarity; both should be high, and copying the input is
the point at (0, 1). Writes curves.png, curves.pdf, curves.jsonl and results.json beside the edits. --recommend stores
the best scales in the editor, where infer.py, app.py and its card find them. Run the same command again to resume.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.flags import IP2P_CLIP, check_flags, label_models, make_parser, run_script  # noqa: E402
from utils.cli import pick  # noqa: E402
from utils.editing.settings import find_setting_problems  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

IMAGE_SCALES = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2]  # of metrics/compute_metrics.py
TEXT_SCALE, LEGACY_STEPS, LEGACY_RESOLUTION = 7.5, 100, 512
CRITERIA = ("psnr", "ssim", "l1", "clip_target", "dino_target", "clip_product")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, IP2P_CLIP)
    add = parser.add_argument_group("guidance").add_argument
    image = "image guidance scales (default 1.0 1.2 ... 2.2)"
    add("--image_guidance_scales", type=float, nargs="+", default=IMAGE_SCALES, metavar="S", help=image)
    add("--guidance_scales", type=float, nargs="+", default=[TEXT_SCALE], metavar="S", help="of the text (default 7.5)")
    add(
        "--legacy",
        action="store_true",
        help="as the original's compute_metrics.py, with its faults (docs/evaluation.md)",
    )
    add("--recommend", action="store_true", help="store the best scales in each --model, which must be a folder")
    criterion = "what --recommend maximizes (l1: minimizes); default psnr with target images, else clip_product"
    add("--criterion", choices=CRITERIA, help=criterion)
    return parser.parse_args(argv)


def find_problems(args: argparse.Namespace) -> list[str]:
    scales = [("image_guidance_scale", value) for value in args.image_guidance_scales]
    scales += [("guidance_scale", value) for value in args.guidance_scales]
    problems = [problem for name, value in scales for problem in find_setting_problems({name: value})]
    if args.recommend:
        hub = [model for model in args.model if not Path(model).is_dir()]
        problems += [f"--recommend writes into the editor, and --model {model} is not a folder" for model in hub]
    if args.legacy and args.resolution:
        problems.append(f"--legacy always uses {LEGACY_RESOLUTION} pixels, as the original does: remove --resolution")
    if args.legacy and args.clip_model == "none":
        problems.append("--legacy needs --clip_model")
    return problems


def run(args: argparse.Namespace) -> int:
    check_flags(args, *find_problems(args))
    quiet_libraries()
    from accelerate import PartialState

    from evaluation.curves import CurvePoint, draw_curves, measure_point, write_table
    from evaluation.editing import SampleEditor
    from evaluation.samples import DatasetOptions, open_samples
    from evaluation.scoring import load_scorer
    from utils.editing.flags import EditorOptions
    from utils.editing.recommended import Recommendation, choose_best, store_recommendation
    from utils.editing.settings import EditSettings

    state, steps = PartialState(), args.steps or (LEGACY_STEPS if args.legacy else None)
    resolution = LEGACY_RESOLUTION if args.legacy else args.resolution
    samples = open_samples(pick(args, DatasetOptions))
    scorer = None
    if state.is_main_process:
        scorer = load_scorer(args.clip_model, args.dino_model, str(state.device), args.mask_model, args.legacy)
    points: list[CurvePoint] = []
    for model, label in label_models(args.model).items():
        options = EditorOptions(model, device=args.device, dtype=args.dtype)
        editor = SampleEditor.open(options, state, args.seed, args.batch_size)
        for text, image in itertools.product(args.guidance_scales, args.image_guidance_scales):
            settings = EditSettings(steps, text, image, resolution=resolution, keep_size=True)
            folder = args.output_dir / "edits" / label / f"text-{text:g}-image-{image:g}"
            point = measure_point(editor, samples, settings, folder, label, scorer)
            points += [point] if point else []
        del editor
    if not state.is_main_process:
        return 0
    write_table(points, samples, scorer, args.output_dir, vars(args))
    draw_curves(points, args.output_dir)
    if args.recommend:
        for model, label in label_models(args.model).items():
            best, criterion, value = choose_best([point for point in points if point.label == label], args.criterion)
            found = Recommendation(best.settings, criterion, value, len(samples), args.dataset_name)
            print(store_recommendation(Path(model), found), flush=True)
    print(f"wrote {args.output_dir / 'curves.png'}, curves.pdf, curves.jsonl and results.json", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(parse_flags, run, argv)


if __name__ == "__main__":
    sys.exit(main())
