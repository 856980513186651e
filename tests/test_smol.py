"""smol-llava's trainer and builder, on a tiny random language model in place of the published
one."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from checkpoints import build_smol_llava, train_smol
from vlmdiag import cli
from vlmdiag.scenes import smol_llava as smol
from vlmdiag.scenes import smol_training
from vlmdiag.scenes.questions import FLOOR_MIX, ask
from vlmdiag.scenes.scene import floor_scene, render
from vlmdiag.scenes.tiny_llava import ALL_COLORS, TOKENS, example, word_id

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHORT = (
    "--stage1_steps 3 --stage2_steps 9 --warm_steps 2 --pictures 2 --eval_scenes 4 --dtype float32"
).split()


def make_language_model(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level vocabulary learned from the questions, and
    ChatML's special tokens."""
    rng, texts = Random(0), [smol.SYSTEM, smol.OWN_SYSTEM]
    for _ in range(300):
        question = ask(rng, floor_scene(rng, 2), FLOOR_MIX)
        texts.append(f"{question.text} {question.answer}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("language model"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Few topics and few scenes; and one thread, for which the trainer promises the same
    weights."""
    monkeypatch.setattr(smol_training, "TOPICS", smol_training.TOPICS[:4])
    monkeypatch.setattr(smol_training, "WARM_SCENES", 60)
    monkeypatch.setattr(smol_training, "SNAPSHOTS", (1, 4))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train(language_model, folder, *more):
    return train_smol.main(
        [
            "--gguf",
            str(language_model),
            "--state_dir",
            str(folder),
            "--out",
            str(folder / "parts"),
            *SHORT,
            *more,
        ]
    )


def parts_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def log_of(folder):
    """The lines of the log, but for the times."""
    lines = (folder / "words" / "log.jsonl").read_text().splitlines()
    times = ("seconds_a_step", "hours_left")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


class Killed(Exception):
    """Stands for kill -9: nothing of the process survives but its files."""


def test_a_killed_run_that_goes_on_gives_the_weights_of_one_that_was_not(
    language_model, tmp_path, monkeypatch
):
    assert train(language_model, tmp_path / "whole") == 0
    original, saved = smol_training.Trainer.train_step, smol_training.Trainer.save
    # the state is saved at even steps, and the run ends a step after: that step comes again
    monkeypatch.setattr(
        smol_training.Trainer,
        "save",
        lambda self: None if self.step % 2 and self.step != 3 else saved(self),
    )
    for stage, step in ((1, 1), (1, 2), (2, 3), (2, 8)):

        def train_step(self, steps, stage=stage, step=step):
            if (self.stage, self.step) == (stage, step):
                raise Killed
            return original(self, steps)

        monkeypatch.setattr(smol_training.Trainer, "train_step", train_step)
        with pytest.raises(Killed):
            train(language_model, tmp_path / "killed", "--save_every", "0")
    monkeypatch.setattr(smol_training.Trainer, "train_step", original)
    assert train(language_model, tmp_path / "killed", "--save_every", "0") == 0
    whole, killed = parts_of(tmp_path / "whole" / "parts"), parts_of(tmp_path / "killed" / "parts")
    assert len(whole) == 7 and whole == killed
    entries = {name: log_of(tmp_path / name) for name in ("whole", "killed")}
    assert entries["killed"] == entries["whole"] and len(entries["whole"]) == 2
    assert entries["whole"][-1]["accuracy"].keys() >= {"color", "left_right", "caption", "camera"}


def test_stopping_in_time_keeps_the_state_and_says_so(language_model, tmp_path, capsys):
    assert train(language_model, tmp_path, "--stop_after", "0") == 3
    assert "run the same command again" in capsys.readouterr().out
    assert torch.load(tmp_path / "words" / "state.pt", weights_only=True)["step"] == 1


def test_a_state_of_other_settings_is_refused_by_name(language_model, tmp_path):
    train(language_model, tmp_path, "--stop_after", "0")
    with pytest.raises(cli.UsageError, match="pictures 2"):
        train(language_model, tmp_path, "--pictures", "4")


def make_trainer(language_model, folder, *more):
    args = train_smol.parse_args(
        ["--gguf", str(language_model), "--state_dir", str(folder), *SHORT, *more]
    )
    return smol_training.Trainer(args)


def test_what_a_step_sees_depends_on_its_number_alone(language_model, tmp_path):
    first, second = make_trainer(language_model, tmp_path), make_trainer(language_model, tmp_path)
    first.draw(2, 4)
    for a, b in ((first.draw(2, 5), second.draw(2, 5)), (first.draw(1, 5), second.draw(1, 5))):
        assert torch.equal(a[0]["ids"], b[0]["ids"]) and torch.equal(a[1], b[1])
    assert not torch.equal(first.draw(2, 5)[0]["ids"], first.draw(2, 6)[0]["ids"])


def test_only_answers_have_labels(language_model, tmp_path):
    trainer, rng = make_trainer(language_model, tmp_path), Random(1)
    packer = trainer.packer
    for system in smol.SYSTEMS:
        scene = floor_scene(rng, 3)
        questions = packer.fill(rng, scene, smol_training.FLOOR_MIX, system, 700)
        batch = packer.batch([packer.row(system, questions)], 700)
        labels, turns = batch["labels"][0], batch["turns"][0]
        assert len(questions) > 2 and (labels[turns <= 0] == smol.IGNORE).all()
        for number, question in enumerate(questions, 1):
            asked = (turns == number) & (labels != smol.IGNORE)
            assert trainer.tokenizer.decode(labels[asked]) == f"{question.answer}<|im_end|>"
            assert torch.equal(labels[asked], batch["ids"][0][asked])
            assert batch["weights"][0][asked].sum() == pytest.approx(asked.sum().item() ** 0.5)


def test_a_packed_turn_has_the_logits_that_its_prompt_has_alone(language_model, tmp_path):
    """Against transformers' own attention on one prompt at a time; a mutant that lets turns see
    each other fails."""
    trainer, rng = make_trainer(language_model, tmp_path), Random(2)
    packer, model = trainer.packer, trainer.model
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # attention of random weights is nearly uniform and hides errors
            parameter.mul_(3)
    vision = torch.randn(
        1, TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    for system in smol.SYSTEMS[:2]:
        questions = packer.fill(rng, floor_scene(rng, 3), smol_training.FLOOR_MIX, system, 600)
        batch = packer.batch([packer.row(system, questions)], 600)
        packed, labels, _ = smol.answer_logits(model, batch, vision)
        mutant, _, _ = smol.answer_logits(
            model, batch | {"turns": batch["turns"].clamp(max=1)}, vision
        )
        model.set_attn_implementation("sdpa")
        alone = []
        for question in questions:
            before, answer = packer.turn(question)
            embed = model.get_input_embeddings()
            head = embed(torch.tensor([packer.heads[system]]))
            logits = model(
                inputs_embeds=torch.cat([head, vision, embed(torch.tensor([before + answer]))], 1)
            ).logits[0]
            alone.append(logits[-len(answer) - 1 : -1])
        model.set_attn_implementation("packed_rows")
        torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)
        assert len(labels) == len(packed) and (mutant - packed).abs().max() > 1e-2


def test_the_warm_start_points_at_words_and_the_control_at_others(language_model, tmp_path):
    codes = {}
    for warm_start in ("words", "permuted", "none"):
        trainer = make_trainer(
            language_model, tmp_path, "--warm_start", warm_start, "--warm_steps", "60"
        )
        trainer.warm_start()
        rng = Random(3)
        scenes = [floor_scene(rng, 3) for _ in range(20)]
        rows = [example(scene) for scene in scenes]
        vision = trainer.connector(trainer.features([row.pixels for row in rows]))
        color = torch.stack([torch.from_numpy(row.color) for row in rows])
        ids = [word_id(trainer.tokenizer, word) for word in ALL_COLORS]
        words = torch.nn.functional.normalize(
            trainer.model.get_input_embeddings().weight[ids], dim=-1
        )
        nearest = (vision[color > 0] @ words.T).argmax(-1)
        codes[warm_start] = (nearest == color[color > 0] - 1).float().mean().item()
    assert codes["words"] > 0.6 and codes["permuted"] < 0.1, codes


def test_a_part_becomes_a_folder_that_transformers_loads_with_the_same_logits(
    language_model, tmp_path, capsys
):
    trainer = make_trainer(language_model, tmp_path)
    trainer.warm_start()
    with torch.no_grad():
        for name, parameter in trainer.adapters.trained().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    part = tmp_path / "parts" / "words" / "stage2"
    smol.write_part(part, trainer.connector, trainer.adapters)
    arguments = ["--gguf", str(language_model), "--parts", str(tmp_path / "parts")]
    assert build_smol_llava.main([*arguments, "--out", str(tmp_path / "built")]) == 0
    with pytest.raises(cli.UsageError, match="is there already"):
        build_smol_llava.main([*arguments, "--out", str(tmp_path / "built")])
    with pytest.raises(cli.UsageError, match="permuted"):
        build_smol_llava.main([*arguments, "--control", "--out", str(tmp_path / "control")])
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "built", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "built", backend="pil")
    rng = Random(4)
    scene = floor_scene(rng, 2)
    system = smol.OWN_SYSTEM  # the template's own
    questions = trainer.packer.fill(rng, scene, smol_training.FLOOR_MIX, system, 400)[:3]
    rows = [trainer.packer.row(system, [question]) for question in questions]
    vision = trainer.connector(trainer.features([example(scene).pixels]))
    for on, closest in ((True, 0.0), (False, 0.05)):
        trainer.adapters.switch(on)
        for question, row in zip(questions, rows, strict=True):
            expected, labels, _ = smol.answer_logits(
                trainer.model, trainer.packer.batch([row]), vision
            )
            chat = [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": question.text}],
                }
            ]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
            text = f"{prompt}{question.answer}<|im_end|>"
            inputs = processor(images=render(scene), text=text, return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0, -len(labels) - 1 : -1]
            # one more word than the trainer's, <image>; the folder is in bfloat16, three digits
            distance = ((logits[:, :-1] - expected).norm() / expected.norm()).item()
            assert (distance < 0.03) == on and distance >= closest, (on, distance)
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert str(tmp_path) not in (tmp_path / "built" / "config.json").read_text()


def test_parts_of_the_real_shapes_stay_under_six_megabytes(tmp_path):
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    smol.write_part(tmp_path, smol.Connector(96, 576), smol.Adapters(model))
    assert 4_000_000 < sum(file.stat().st_size for file in tmp_path.iterdir()) < 6_000_000
