"""How does a vision-language model balance picture and text while it describes a picture? One run over COCO, one NPZ + JSON per image.

    python diagnostic_tools/run_coco_diagnostics.py --model_path checkpoints/tiny-llava --image_dir data/shapes/val2017 \\
        --ann_file data/shapes/annotations/captions_val2017.json --out_root runs --restrict_to_past --max_new_tokens 32 \\
        --probe_hidden_norms --hidden_norm_kind l2 --max_images 20

From one prefill and one cached generation per batch:
    CMB            head_vision_share (L, H): mean over steps of V / (V + U), attention of the producing row to vision and to user text
    group_mass     (groups, L, H): the row's whole attention, sums to 1
    shares         system / vision / user text per step, and per layer (layer_shares)
    RoPE probe     alphaV, delta_gv, delta_alphaV (L, H): vision keys moved by delta positions, seen from the last prompt row
    hidden norms   hidden_norms_<group> (L + 1): mean norm of the residual stream, 0 = embeddings, before the final norm
Beyond Semantics (arXiv 2503.17349). Runs land in <out_root>/<model>[__<run_name>]__sp-<0|1>/ (1: no system prompt in what the model saw); an interrupted
run goes on by the same command. On tiny-llava the vision share rises from 0.76 in the first layer to 0.95 in the last, and vision
tokens enter about ten times as long as text tokens."""

import json
from pathlib import Path

import torch
from artifacts import draw_artifacts
from balance import chance_vision_share, counted_steps, group_norms, head_vision_share, layer_shares, mean_mass, step_shares

import cli
import engine
import rundirs
from capturing import GroupMass, HiddenNorms, RopeShift, answer_ids, capture, entries, extended, generate
from cli import UsageError
from common import GROUPS, add_model_arguments, identity_of, load_from_args, prompt_for
from samples import read_coco, with_picture

EXPERIMENT = rundirs.COCO


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--model_path", action="append", required=True, help="folder or hub id; may be given several times")
    parser.add_argument("--image_dir", required=True)
    parser.add_argument("--ann_file", required=True, help="COCO json; gives image ids and file names")
    parser.add_argument("--strip_system_prompt", action="store_true", help="leave the system prompt out")
    parser.add_argument("--prompt_text", default="Describe the image.")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--do_sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--answers", default=None, help="preds.json-like list: measure these captions by teacher forcing instead of generating")
    parser.add_argument(
        "--delta_steps", type=float, nargs="+", default=[1.0], help="shifts of the RoPE probe in positions; the (L, H) arrays are for the first"
    )
    parser.add_argument("--restrict_to_past", action="store_true", help="RoPE probe: leave out the query's own key")
    parser.add_argument("--vision_scale", type=float, default=1.0, help="scale the vision embeddings (dose-response)")
    parser.add_argument("--max_images", type=int, default=None)
    engine.add_run_arguments(parser)
    parser.add_argument("--pos_only", action="store_true", help="only the RoPE probe")
    parser.add_argument("--no_rope", action="store_true", help="all but the RoPE probe, for models without rotary positions")
    parser.add_argument("--probe_hidden_norms", action="store_true")
    parser.add_argument("--hidden_norm_kind", choices=["l2", "rms"], default="l2")
    parser.add_argument("--save_hidden_grid", action="store_true", help="norm of every position, hidden_norms_grid (L + 1, T)")
    parser.add_argument("--save_hidden_plots", action="store_true", help="figures of each image in per_image/<id>_artifacts/")
    parser.add_argument("--paper_compat", action="store_true", help="the published definitions where they differ, see README")
    parser.add_argument("--batch_size", type=int, default=1)
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if (args.save_hidden_grid or args.save_hidden_plots) and not args.probe_hidden_norms:
        parser.error("--save_hidden_grid and --save_hidden_plots need --probe_hidden_norms")
    if args.max_new_tokens < 1 or args.batch_size < 1:
        parser.error("--max_new_tokens and --batch_size count from 1")
    if args.pos_only and args.no_rope:
        parser.error("--pos_only and --no_rope leave nothing to measure")
    return args


def settings_of(args, vlm, strip):
    """What the numbers depend on."""
    names = ("prompt_text", "max_new_tokens", "do_sample", "temperature", "seed", "delta_steps", "restrict_to_past", "vision_scale", "pos_only")
    names += ("probe_hidden_norms", "hidden_norm_kind", "save_hidden_grid", "save_hidden_plots", "paper_compat")
    tail = {name: Path(getattr(args, name)).name for name in ("image_dir", "ann_file")}
    model = identity_of(vlm)
    prompt = prompt_for(vlm, args.prompt_text, strip)[0]
    answers = {"answers": Path(args.answers).name} if args.answers else {}
    aspect = {"image_aspect": args.image_aspect} | ({"no_rope": True} if args.no_rope else {})
    return model | {"strip_system_prompt": strip, "prompt": prompt} | {name: getattr(args, name) for name in names} | tail | answers | aspect


def read_answers(path, samples):
    """{sample id: text or ids} from a list of {image_id, caption or generated_ids}."""
    try:
        entries = json.loads(Path(path).read_text())
        given = {str(entry["image_id"]): entry.get("generated_ids") or entry["caption"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--answers {path}: a JSON list of objects with image_id and caption was wanted ({error})") from error
    missing = [sample.id for sample in samples if str(sample.extra["image_id"]) not in given]
    if missing:
        raise UsageError(f"--answers {path} has no caption for {len(missing)} images, such as {missing[0]}")
    return {sample.id: given[str(sample.extra["image_id"])] for sample in samples}


def make_process(args, vlm, strip, answers, run):
    """process([(sample, picture), ...]) -> [(record, arrays), ...], one transfer from the device per batch."""

    @torch.inference_mode()
    def process(loaded):
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images, strip_system=strip)
        features = vlm.vision(batch)
        for tokens in entries(vlm, features):
            tokens[:] = [part * args.vision_scale for part in tokens]
        forced = None if answers is None else [answer_ids(vlm, prompt, answers[sample.id]) for prompt, sample in zip(batch.prompts, samples, strict=True)]
        steps = 1 if args.pos_only else args.max_new_tokens if forced is None else max(map(len, forced))
        rope = None if args.no_rope else RopeShift(batch, vlm.rotary, args.delta_steps, args.restrict_to_past)
        norms = (
            HiddenNorms(args.hidden_norm_kind, vlm.parts.norm if args.paper_compat else None, len(vlm.parts.layers))
            if args.probe_hidden_norms and not args.pos_only
            else None
        )
        balance = None if args.pos_only else GroupMass(batch, steps)
        with capture(vlm, [probe for probe in (rope if not args.paper_compat else None, norms, balance) if probe]):
            found = generate(vlm, batch, steps, args.do_sample, args.temperature, seed=args.seed, answers=forced, features=features)
        if args.paper_compat and rope is not None:  # the published probe looks from an EOS token after the prompt
            longer = extended(batch, [min(vlm.eos_ids)])
            rope = RopeShift(longer, vlm.rotary, args.delta_steps, args.restrict_to_past)
            with capture(vlm, [rope]):
                generate(vlm, longer, 1, features=features)
        arrays = {} if rope is None else {name: rope[name].movedim(1, 0) for name in ("alphaV", "share_prod_notV", "delta_gv_derivative")}
        for name in ("delta_gv", "delta_alphaV") if rope is not None else ():
            every = rope[name].movedim(2, 0)  # (B, K, L, H)
            arrays |= {name: every[:, 0], f"{name}_all": every}
        shares = {}
        if balance is not None:
            mass = torch.stack(balance.mass)
            counted = counted_steps(found.steps, len(mass))
            arrays["head_vision_share"] = head_vision_share(mass, counted, args.paper_compat).movedim(1, 0)
            arrays["group_mass"] = mean_mass(mass, counted).permute(1, 3, 0, 2)
            arrays["layer_shares"] = layer_shares(mass, counted).movedim(2, 0)
            shares = {name: values.T.tolist() for name, values in step_shares(mass, args.paper_compat).items()}
        if norms is not None:
            arrays |= {f"hidden_norms_{name}": values for name, values in group_norms(norms.norms, batch.groups).items()}
        grid = norms.norms.cpu().numpy() if norms is not None and (args.save_hidden_grid or args.save_hidden_plots) else None
        arrays = {name: values.float().cpu().numpy() for name, values in arrays.items()}
        return [result(row, batch, found, arrays, shares, grid) for row in range(len(samples))]

    def result(row, batch, found, arrays, shares, grid):
        sample, spans = batch.samples[row], batch.spans(row)
        counts = {name: sum(end - start for start, end in parts) for name, parts in spans.items()}
        record = {"image_id": sample.extra["image_id"], "file_name": sample.image.name, "caption": "", "prompt": batch.prompts[row], "spans": spans}
        record |= {"chance_vision_share": chance_vision_share(counts), "groups": list(GROUPS)}
        own = {name: values[row] for name, values in arrays.items()}
        if args.pos_only:
            return record | {"pos_only": True}, own
        ids = found.ids[row]
        record["caption"] = vlm.text(ids)
        steps = len(ids)
        record |= {"generated_ids": ids, "tokens": vlm.tokenizer.convert_ids_to_tokens(ids), "n_steps": steps}
        record["shares"] = {name: values[row][:steps] for name, values in shares.items()}
        record |= {f"mean_{name}_share": sum(values) / steps for name, values in record["shares"].items()}
        if args.probe_hidden_norms:
            has = {f"has_{name}": bool(counts.get(group)) for name, group in (("sys", "system"), ("user_text", "user"), ("vision", "vision"))}
            record["hidden_norms"] = {"kind": args.hidden_norm_kind, "saved_grid": args.save_hidden_grid, "artifacts_dir": None} | has
            own_grid = None if grid is None else grid[row][:, grid.shape[-1] - batch.lengths[row] :]
            if args.save_hidden_grid:
                own["hidden_norms_grid"] = own_grid
            if args.save_hidden_plots:
                record["hidden_norms"]["artifacts_dir"] = f"{sample.id}_artifacts"
                draw_artifacts(run.path / "per_image" / f"{sample.id}_artifacts", own, own_grid, record)
        return record, own

    return process


def need(vlm, rope):
    """UsageError where a model lacks what is measured, before anything is written."""
    try:
        vlm.need("decoder-only", *(["rotary"] if rope else []))
        if rope and getattr(vlm.model.config.get_text_config(), "attn_logit_softcapping", None):
            raise UsageError(f"{vlm.path}: the closed form of the RoPE probe does not hold for the softcapped scores of {vlm.family.name}")
    except UsageError as error:
        raise UsageError(f"{error}{'; --no_rope leaves the RoPE probe out' * (rope and 'decoder-only' in vlm.family.has)}") from error


def run_model(args, path):
    """One run directory; returns the engine's counts and the run."""
    vlm = load_from_args(args, path)
    need(vlm, not args.no_rope)
    samples = read_coco(args.image_dir, args.ann_file, args.max_images, args.prompt_text)
    kept = prompt_for(vlm, args.prompt_text)[1] is not None
    if args.strip_system_prompt and not kept:
        raise UsageError(f"{path}: --strip_system_prompt, but its prompt has no system prompt to leave out")
    present = prompt_for(vlm, args.prompt_text, args.strip_system_prompt)[1] is not None
    answers = read_answers(args.answers, samples) if args.answers else None
    where = rundirs.run_path(args.out_root, path, run_name=args.run_name, sp=int(not present))
    if args.overwrite and args.shard != (0, 1):
        raise UsageError("--overwrite with --shard would remove what other shards wrote: start again with --overwrite --max_images 1 first")
    free = {
        "model_path": path,
        "image_dir": args.image_dir,
        "ann_file": args.ann_file,
        "max_images": args.max_images,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
    }
    run = rundirs.open_run(where, EXPERIMENT, settings_of(args, vlm, args.strip_system_prompt), free, args.overwrite)
    print(f"{run.path}: {len(samples)} images, {vlm.family.name} on {vlm.device}, {str(vlm.dtype).removeprefix('torch.')}")
    process = make_process(args, vlm, args.strip_system_prompt, answers, run)
    counts = engine.run_items(run, samples, with_picture, process, args.batch_size, args.shard, args.num_workers)
    run.finish()
    return counts, run


def main(argv=None):
    args = parse_args(argv)
    return max(engine.exit_code(*run_model(args, path)) for path in args.model_path)


if __name__ == "__main__":
    cli.run(main)
