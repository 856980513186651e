"""The recipe of models/README.md: its family file, as it is printed there, on a small architecture
that transformers does not have."""

import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

import common
from tests.conftest import ROOT, in_process
from vlmdiag.cli import UsageError
from vlmdiag.families import find_family
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.identity import identity_of
from vlmdiag.model.probes import GroupMass, RopeShift
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy.gradients import trace
from vlmdiag.scenes import tiny_llava as tiny

SIDE, PATCH = 112, 14


class GlanceConfig(PretrainedConfig):
    model_type = "glance"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(self, text_config=None, image_token_id=0, width=32, **options):
        text = (
            text_config
            if isinstance(text_config, LlamaConfig)
            else LlamaConfig(**(text_config or {}))
        )
        self.text_config, self.image_token_id, self.width = text, image_token_id, width
        super().__init__(**options)


class Glance(PreTrainedModel, GenerationMixin):
    """Convolutions that see one patch and its neighbours, a linear connector, a Llama decoder."""

    config_class = GlanceConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.tower = nn.Sequential(
            nn.Conv2d(3, config.width, PATCH, PATCH),
            nn.GELU(),
            nn.Conv2d(config.width, config.width, 3, padding=1),
        )
        self.project = nn.Linear(config.width, config.text_config.hidden_size)
        self.language_model = LlamaModel(config.text_config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.language_model

    def get_image_features(self, pixel_values, return_dict=True):
        cells = self.tower(pixel_values).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=cells, pooler_output=self.project(cells)
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        logits_to_keep=0,
        pixel_values=None,
        **_,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values).pooler_output
                inputs_embeds = inputs_embeds.masked_scatter(
                    (input_ids == self.config.image_token_id)[..., None], features.to(inputs_embeds)
                )
        found = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(found.last_hidden_state[:, -logits_to_keep:]),
            past_key_values=found.past_key_values,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of Glance, and a folder of own families with the README's block."""
    path = tmp_path_factory.mktemp("glance")
    tokenizer = tiny.make_tokenizer(path)
    tokenizer.chat_template = None
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Glance(GlanceConfig(text, image, initializer_range=0.2))
    for p in model.tower.parameters():
        p.data *= 3
    model.tower[2].weight.data[:, :, 1, 1] *= (
        10  # a token is of its own cell first, as the self-check wants it
    )
    model.save_pretrained(path)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full"
    ).save_pretrained(path)
    source = re.search(
        r"```python\n(.*?)```", (ROOT / "models" / "README.md").read_text(), re.DOTALL
    )[1]
    package = types.ModuleType("glance")
    package.Glance = Glance
    package.GlanceConfig = GlanceConfig
    sys.modules["glance"] = package
    own_families = tmp_path_factory.mktemp("families")
    (own_families / "glance_family.py").write_text(source)
    (own_families / "helper.py").write_text("raise RuntimeError('no family, so not run')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMDIAG_FAMILIES", str(own_families))
        yield path
    del sys.modules["glance"]


def test_it_loads_with_the_self_check_and_is_measured(folder, pictures):
    vlm = common.load_model(folder)
    assert vlm.family.name == "glance" and not vlm.parts.vision_blocks
    samples = [
        Sample(str(i), None, question)
        for i, question in enumerate(("What is left?", "Is there a red circle in the image?"))
    ]
    batch = vlm.encode(samples, pictures[:2])
    assert [len(grid.boxes) for grid in batch.grids] == [(SIDE // PATCH) ** 2] * 2
    assert batch.prompts[0].startswith("<image>\nQuestion: What is left?")
    with capture(vlm, [mass := GroupMass(batch, 3), rope := RopeShift(batch, vlm.rotary, [1.0])]):
        found = generate(vlm, batch, 3)
    assert torch.allclose(mass.mass[0].sum(-1), torch.ones(()), atol=1e-5)
    assert rope["alphaV"].shape == (3, 2, 4)
    alone = [
        generate(vlm, vlm.encode([sample], [picture]), 3).ids[0]
        for sample, picture in zip(samples, pictures, strict=False)
    ]
    assert found.ids == alone
    inputs = vlm.encode(samples[:1], pictures[:1])
    theirs = vlm.model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        **inputs.image_inputs,
        max_new_tokens=3,
        do_sample=False,
    )
    assert theirs[0, inputs.input_ids.shape[1] :].tolist()[: len(alone[0])] == alone[0]


def test_relevancy_stops_at_its_vision_tokens(folder, pictures):
    vlm = common.load_model(folder, self_check=False)
    batch = vlm.encode([Sample("0", None, "What is left?")], [pictures[0]])
    run = trace(vlm, batch, generate(vlm, batch, 3).ids[0])
    found = attribution.relevancy(run, range(len(run.ids)))
    assert found.cells is None
    assert found.picture.shape == (len(run.ids), 3, (SIDE // PATCH) ** 2)
    assert found.rows.min() >= 0
    assert found.picture.max() > 0


def test_scripts_run_on_it(folder, pictures, tmp_path):
    (tmp_path / "images").mkdir()
    pictures[0].save(tmp_path / "images" / "a.png")
    script = in_process(ROOT / "diagnostic_tools" / "relevancy_maps.py")
    done = script(
        "--model_path",
        folder,
        "--image_folder",
        tmp_path / "images",
        "--out_root",
        tmp_path,
        "--max_new_tokens",
        3,
    )
    assert done.returncode == 0, done.stderr
    drawn = in_process(ROOT / "diagnostic_tools" / "viz_relevancy.py")
    assert (
        drawn(
            "--run_dir",
            next((tmp_path / "relevancy").iterdir()),
            "--image_folder",
            tmp_path / "images",
        ).returncode
        == 0
    )
    lens = in_process(ROOT / "scripts" / "logit_lens" / "create_logit_lens.py")
    done = lens(
        "--model_path",
        folder,
        "--image_folder",
        tmp_path / "images",
        "--save_folder",
        tmp_path / "pages",
        "--out_root",
        tmp_path,
    )
    assert done.returncode == 0 and len(list((tmp_path / "pages").iterdir())) == 1, done.stderr


def own_file():
    """The family file of the README, where the fixture put it."""
    return Path(os.environ["VLMDIAG_FAMILIES"]) / "glance_family.py"


def test_a_run_remembers_the_family_file_and_does_not_go_on_with_a_changed_one(folder, tmp_path):
    identity = identity_of(common.load_model(folder, self_check=False))
    copied = tmp_path / "other_name.py"
    copied.write_text(own_file().read_text() + "# changed\n")
    changed = common.load_model(folder, family=copied, self_check=False)
    assert changed.family.name == "glance" and changed.family.file == copied
    other = identity_of(changed)
    assert other.pop("family_file") != identity.pop("family_file")
    assert other == identity
    builtin = common.load_model(ROOT / "checkpoints" / "tiny-llava", self_check=False)
    assert "family_file" not in identity_of(builtin)


def test_the_flag_takes_a_file_where_no_folder_names_one(folder, tmp_path, monkeypatch, pictures):
    source = own_file().read_text()
    monkeypatch.delenv("VLMDIAG_FAMILIES")
    mine = tmp_path / "mine.py"
    mine.write_text(source)
    pictures[0].save(tmp_path / "a.png")
    grid = tmp_path / "grid.png"
    shown = in_process(ROOT / "diagnostic_tools" / "check_model.py")
    done = shown(folder, tmp_path / "a.png", "What?", "--family", mine, "--out", grid)
    assert done.returncode == 0, done.stderr
    assert "vision" in done.stdout and grid.exists()
    assert shown(folder, tmp_path / "a.png", "What?", "--out", grid).returncode == 2


@pytest.mark.parametrize(
    "source, reason",
    [
        ("FAMILY = (", "cannot be read as Python"),
        ("import no_such_module\nFAMILY = 1", "does not run: ModuleNotFoundError"),
        ("FAMILY = 'llava'", "is to be a vlmdiag.families.Family"),
    ],
)
def test_a_family_file_that_does_not_work_is_named_in_one_line(
    tmp_path, monkeypatch, source, reason
):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.setenv("VLMDIAG_FAMILIES", str(tmp_path))
    with pytest.raises(UsageError, match=f"broken.py.*{reason}"):
        common.load_model(ROOT / "checkpoints" / "tiny-llava", self_check=False)


def test_family_files_of_the_working_folder_are_never_run(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.py").write_text("raise SystemExit('run')\nFAMILY = 1")
    monkeypatch.chdir(tmp_path)
    assert find_family({"model_type": "llava"}).name == "llava"


def test_an_unknown_type_without_its_file_is_told_how_to_be_added(folder, monkeypatch):
    monkeypatch.delenv("VLMDIAG_FAMILIES")
    with pytest.raises(UsageError, match="known types"):
        common.load_model(folder)
    assert np.all(
        [
            name in (ROOT / "models" / "README.md").read_text()
            for name in ("parts", "grid", "patches", "positions", "prompt", "has")
        ]
    )
