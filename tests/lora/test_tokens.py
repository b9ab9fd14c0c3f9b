"""New tokens: what they change in a text encoder, how they are trained, and the file that others read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.families.load import load_model
from loratune.families.sd import TOKENIZER
from loratune.formats.headers import read_header
from loratune.lora.inject import LoRA
from loratune.lora.load import load_with
from loratune.lora.tokens import (
    Embedding,
    GrownEmbedding,
    NewToken,
    add_tokens,
    check_new,
    initial_rows,
    put_embedding,
    read_embedding,
    rows_of,
    write_embedding,
)
from loratune.training.lora_module import LoRAModule
from loratune.training.objectives import Objective
from loratune.training.randomness import generator

CAPTIONS = ["a <blob> on a table", "a red disc"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


# A text encoder with more rows.


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=9), st.integers(1, 3))
def test_a_grown_embedding_is_the_old_rows_and_the_new(ids: list[int], count: int) -> None:
    known = nn.Embedding(8 - count, 3)
    grown = GrownEmbedding(known, rows(count, 3))
    assert grown.num_embeddings == 8
    asked = torch.tensor(ids)
    torch.testing.assert_close(grown(asked), torch.cat([known.weight, grown.rows])[asked], rtol=0, atol=0)
    assert torch.equal(grown.weight[asked], grown(asked))


def test_only_the_new_rows_get_gradients() -> None:
    known = nn.Embedding(5, 3).requires_grad_(False)
    grown = GrownEmbedding(known, rows(2, 3))
    grown(torch.tensor([[0, 5, 5]])).sum().backward()
    assert known.weight.grad is None
    assert grown.rows.grad is not None
    assert grown.rows.grad.tolist() == [[2.0] * 3, [0.0] * 3]


def test_rows_start_from_the_words_of_the_initializer_in_turn(tiny_base: Path) -> None:
    parts = load_model(str(tiny_base)).text_parts()
    tokenizer, encoder = parts["text_encoder"]
    weight = encoder.get_input_embeddings().weight
    red, disc = tokenizer("red disc", add_special_tokens=False).input_ids
    made = initial_rows(NewToken("<blob>", 3, "red disc"), parts)["text_encoder"]
    assert torch.equal(made, weight[[red, disc, red]])
    torch.manual_seed(0)
    drawn = initial_rows(NewToken("<blob>", 64), parts)["text_encoder"]
    assert drawn.shape == (64, weight.shape[1])
    assert float(drawn.std()) == pytest.approx(float(weight.detach().std()), rel=0.15)
    assert len(drawn.unique(dim=0)) == 64


@torch.no_grad()
def test_captions_without_the_token_stay_what_they_were(tiny_base: Path) -> None:
    family = load_model(str(tiny_base)).eval()
    before = family.encode_prompts(CAPTIONS)["text"]
    add_tokens(family.text_parts(), ["<blob>"], {"text_encoder": rows(1, 16)})
    after = family.encode_prompts(CAPTIONS)["text"]
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])
    add_tokens(family.text_parts(), ["<other>"], {"text_encoder": rows(1, 16, seed=1)})  # one more beside it
    assert torch.equal(family.encode_prompts(CAPTIONS)["text"], after)
    assert not torch.allclose(family.encode_prompts(["a <other> on a table"])["text"][0], after[0])


@torch.no_grad()
@pytest.mark.parametrize("end", [2, 49407])
def test_the_pooled_state_stays_that_of_the_end_token(tiny_sdxl: Path, end: int) -> None:
    family: Any = load_model(str(tiny_sdxl)).eval()
    for module in family.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end  # 2 in old configurations, and then the token of the highest number
    before = family.encode_prompts(CAPTIONS)["pooled"]
    add_tokens(family.text_parts(), ["<blob>"], {"text_encoder": rows(1, 8), "text_encoder_2": rows(1, 12)})
    after = family.encode_prompts(CAPTIONS)["pooled"]
    assert torch.equal(after[1], before[1])
    ids = family.family.read(family, CAPTIONS, "text_encoder_2").ids[:1]
    states = family.text_encoder_2(ids, output_hidden_states=True).last_hidden_state
    at = ids[0].tolist().index(49407)
    torch.testing.assert_close(after[0], family.text_encoder_2.text_projection(states[0, at]))


# Files.


def test_diffusers_reads_our_file_as_we_do(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    write_embedding(path, Embedding("<blob>", {"text_encoder": rows(3, 16)}), torch.float32, {"note": "x"})
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)  # type: ignore[no-untyped-call]
    before = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    pipeline.load_textual_inversion(path)
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[len(before) :], rows(3, 16))
    with torch.no_grad():
        theirs = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)[0]
        ours = load_with(str(tiny_base), [], "cpu", [path]).encode_prompts(CAPTIONS)["text"]
        base = load_model(str(tiny_base)).encode_prompts(CAPTIONS)["text"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(ours[0], base[0])


def test_diffusers_reads_sdxls_rows_as_we_do(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    held = {"text_encoder": rows(2, 8), "text_encoder_2": rows(2, 12)}
    write_embedding(path, Embedding("<blob>", held), torch.float32, {})
    state = load_file(path)
    assert {key: tuple(value.shape) for key, value in state.items()} == {"clip_l": (2, 8), "clip_g": (2, 12)}
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"text_encoder": f"text_encoder{end}", "tokenizer": f"tokenizer{end}"}
        own = {name: getattr(pipeline, part) for name, part in parts.items()}
        pipeline.load_textual_inversion(state[key], token="<blob>", **own)
    # As SDXL's configuration calls the end token 2, diffusers would pool the token of the highest number: the new one.
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    with torch.no_grad():
        theirs = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
        ours = load_with(str(tiny_sdxl), [], "cpu", [path]).encode_prompts(CAPTIONS)
    torch.testing.assert_close(ours["text"], theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], theirs[2], rtol=0, atol=1e-5)


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    save_file({"emb_params": rows(2, 16)}, tmp_path / "my-cat.safetensors")
    found = read_embedding(tmp_path / "my-cat.safetensors")
    assert found.names == ["my-cat", "my-cat_1"]
    save_file({"<my-cat>": rows(16)}, tmp_path / "learned_embeds.safetensors")
    found = read_embedding(tmp_path / "learned_embeds.safetensors")
    assert (found.token, found.rows["text_encoder"].shape) == ("<my-cat>", (1, 16))
    save_file({"clip_l": rows(1, 8), "clip_g": rows(1, 12)}, tmp_path / "dog7x.safetensors")
    found = read_embedding(tmp_path / "dog7x.safetensors")
    assert (found.token, set(found.rows)) == ("dog7x", {"text_encoder", "text_encoder_2"})


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"<blob>": rows(1, 24)}, r"is for another base \(widths: clip_l 24; this base's text_encoder has 16\)"),
        ({"clip_l": rows(1, 16), "clip_g": rows(1, 24)}, r"is for another base \(widths: clip_l 16, clip_g 24"),
        ({"clip_l": rows(1, 16), "clip_g": rows(2, 24)}, "its clip_l and clip_g have different numbers of rows"),
        ({"a": rows(1, 2), "b": rows(1, 2)}, r"is no embedding of a token \(it has 2 tensors\); a LoRA goes to --lora"),
        ({"<blob>": rows(1, 2, 3)}, r"is no embedding of a token \(it has no rows of numbers\)"),
        ({"<blob>": torch.zeros(1, 16, dtype=torch.int32)}, "no rows of numbers"),
        ({"cat": rows(1, 16)}, r"'cat' is in the base's vocabulary.*rename the token's key or the file"),
        ({"my cat": rows(1, 16)}, r"is 'my cat'; give one word without spaces.*rename the token's key"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    tiny_base: Path, tmp_path: Path, held: dict[str, Tensor], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(held, path)
    words = ["--base", str(tiny_base), "--prompt", "x", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["sample", *words, "--embedding", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert re.search(f"loratune: {re.escape(str(path))}: .*{said}", told[0]), told
    assert not (tmp_path / "out").exists()


def test_a_wrong_file_does_not_pass_the_reading_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import loratune.lora.tokens as tokens

    wrong = Embedding("<blob>", {"text_encoder": rows(1, 4) + 1})
    monkeypatch.setattr(tokens, "read_embedding", lambda _: wrong)
    with pytest.raises(UserError, match="reads back as something else; do not use this file"):
        write_embedding(
            tmp_path / "x.safetensors", Embedding("<blob>", {"text_encoder": rows(1, 4)}), torch.float32, {}
        )


def test_a_token_is_put_into_a_base_once(tiny_base: Path, tmp_path: Path) -> None:
    path, parts = tmp_path / "x.safetensors", load_model(str(tiny_base)).text_parts()
    save_file({"<blob>": rows(1, 16)}, path)
    assert put_embedding(path, parts) == "<blob>"
    assert torch.equal(rows_of(parts)["text_encoder"], rows(1, 16))
    with pytest.raises(UserError, match="'<blob>' is in the base's vocabulary"):
        put_embedding(path, parts)


# Settings.


@pytest.mark.parametrize(
    ("set_to", "said"),
    [
        ({"placeholder_token": "my cat"}, "tokens.placeholder_token is 'my cat'; give one word without spaces"),
        ({"placeholder_token": ""}, "tokens.placeholder_token is ''"),
        ({"placeholder_token": "<a:b>"}, "without ( ) [ ] : , "),
        ({"num_vectors": 0}, "tokens.num_vectors is 0; give 1 to 75"),
        ({"num_vectors": 76}, "tokens.num_vectors is 76; give 1 to 75, as many as a window holds"),
        ({"lr": 0.0}, "tokens.lr is 0.0; give a number above 0"),
        ({"lr": float("nan")}, "tokens.lr is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(set_to: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        NewToken(**{"placeholder_token": "<blob>", **set_to})


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (NewToken("cat"), "'cat' is in the base's vocabulary; give a new one, such as '<my-cat>'"),
        (NewToken("<|endoftext|>".replace("|", "")), ""),
        (NewToken("<blob>", 1, "red disc"), "'red disc' is 2 tokens, and tokens.num_vectors is 1; give a shorter one"),
        (NewToken("<blob>", 1, ""), "'' is 0 tokens"),
    ],
)
def test_a_token_must_be_new_and_its_initializer_fit(tokenizer: CLIPTokenizer, new: NewToken, said: str) -> None:
    if not said:
        check_new(new, tokenizer)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        check_new(new, tokenizer)


# Training.

TOKEN = [
    "--model.tokens",
    "{placeholder_token: <blob>, num_vectors: 2, initializer_token: disc, lr: 0.05}",
    "--data.caption_prefix",
    "<blob> ",
]


def fit(recipe: Path, out: Path, *more: str) -> int:
    return main(["fit", "-c", str(recipe), "--trainer.default_root_dir", str(out), *TOKEN, *more])


def test_a_module_trains_the_rows_and_holds_them_in_its_checkpoint(tiny_base: Path) -> None:
    module = LoRAModule(str(tiny_base), LoRA(targets="none"), tokens=NewToken("<blob>", 2))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 1
    assert trained[0].endswith("token_embedding.rows")
    assert list(module.state_dict()) == trained
    assert not module.text_is_frozen
    assert module.rows()["text_encoder"].shape == (2, 16)
    assert not module.layers()


def test_sdxls_rows_of_both_encoders_are_trained(tiny_sdxl: Path) -> None:
    module = LoRAModule(str(tiny_sdxl), LoRA(targets="none"), tokens=NewToken("<blob>"))
    batch = {"name": ["a"], "caption": ["a <blob>"], "mean": rows(1, 4, 4, 4), "logvar": torch.zeros(1, 4, 4, 4)}
    module.losses(batch, torch.tensor([500]), generator("cpu", 0), Objective()).sum().backward()
    held = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert [value.shape for value in held.values()] == [(1, 8), (1, 12)]
    assert all(value.grad is not None and float(value.grad.abs().max()) > 0 for value in held.values())


def test_a_token_alone_is_trained_saved_and_drawn_with(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    from loratune.recipe.run import run

    words = ["--model.lora.targets", "none", "--export.dtype", "float32", *TOKEN]
    cli = run(["-c", str(recipe), *words], execute=False)
    embedding = cli.model.model.text_encoder.get_input_embeddings()
    start = embedding.rows.detach().clone()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    base = load_model(str(tiny_base)).text_encoder.get_input_embeddings().weight
    assert torch.equal(embedding.known.weight, base)
    moved = (embedding.rows - start).abs().mean(1)
    assert (moved > 0.01).all()  # 6 steps at a rate of 0.05
    assert (moved < 0.5).all()
    path = tmp_path / "run" / "learned_embeds.safetensors"
    found = read_embedding(path)
    assert found.token == "<blob>"
    assert torch.equal(found.rows["text_encoder"], embedding.rows)
    assert not (tmp_path / "run" / "lora.safetensors").exists()
    words = ["--base", str(tiny_base), "--prompt", "a <blob>", "--steps", "2", "--device", "cpu"]
    assert main(["sample", *words, "--embedding", str(path), "--out", str(tmp_path / "with")]) == 0
    assert main(["sample", *words, "--out", str(tmp_path / "without")]) == 0
    images = [next((tmp_path / name).glob("000*.png")).read_bytes() for name in ("with", "without")]
    assert images[0] != images[1]


def test_a_resumed_run_has_the_same_rows(recipe: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    more = ["--model.lora.text_encoder", "true", "--trainer.callbacks+=EMA", "--export.every_n_steps", "3"]
    assert fit(recipe, whole, *more) == 0
    assert fit(recipe, half, *more, "--trainer.max_steps", "3") == 0
    assert fit(recipe, half, *more, "--ckpt_path", str(half / "checkpoints" / "last.ckpt")) == 0
    for name in ("lora", "lora-000003", "learned_embeds", "learned_embeds-000003"):
        one, two = (load_file(run / f"{name}.safetensors") for run in (whole, half))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    early, last = (load_file(whole / f"learned_embeds{at}.safetensors")["<blob>"] for at in ("-000003", ""))
    assert not torch.equal(early, last)
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, half)]
    moments = [
        [value for one in state["optimizer_states"][0]["state"].values() for value in one.values()] for state in states
    ]
    assert moments[0]
    assert all(torch.equal(one, two) for one, two in zip(*moments, strict=True))
    assert any(name.endswith("token_embedding.rows") for name in states[0]["state_dict"])
    said = read_header(whole / "learned_embeds.safetensors").metadata
    assert said["loratune.steps"] == "6"
    assert "token: <blob>" in said["loratune.recipe"]


@pytest.mark.parametrize(("lr", "wanted"), [(0.05, 0.05), (None, 1e-3)])
def test_the_tokens_own_rate_is_used(tiny_base: Path, lr: float | None, wanted: float) -> None:
    module: Any = LoRAModule(
        str(tiny_base),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        tokens=NewToken("<blob>", lr=lr),
    )
    module._trainer = type("Run", (), {"estimated_stepping_batches": 10})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == [1e-3, wanted]
    assert groups[1]["params"] == module._rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.tokens", "{placeholder_token: cat}"], "'cat' is in the base's vocabulary"),
        (
            ["--model.tokens", "{placeholder_token: my cat}"],
            "tokens.placeholder_token is 'my cat'; give one word without spaces",
        ),
        (
            ["--model.tokens", "{placeholder_token: <blob>, initializer_token: red disc}"],
            "is 2 tokens, and tokens.num_vectors is 1",
        ),
        (["--model.tokens", "{placeholder_token: <blob>, num_vectors: 76}"], "tokens.num_vectors is 76; give 1 to 75"),
        (["--model.lora.targets", "none"], "lora.targets is none and nothing else is trained; set model.tokens"),
        (["--model.prompts.chunks", "0"], "prompts.chunks is 0; give 1 to 16"),
        (["--data.caption_prefix", "word " * 80], "data.caption_prefix is 80 tokens, and a prompt holds 75"),
    ],
)
def test_what_is_wrong_with_a_token_is_told_before_a_weight_is_read(
    recipe: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    import loratune.training.diffusion_module as module

    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a weight was read"))
    assert main(["fit", "-c", str(recipe), *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loratune: ")]
    assert len(told) == 1
    assert said in told[0]
    assert not (tmp_path / "run").exists()


def test_a_token_in_no_caption_is_told_before_training(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", str(recipe), "--model.tokens", "{placeholder_token: <blob>}"]) == 2
    assert re.search(
        r"tokens.placeholder_token: '<blob>' is in none of \d+ captions; write it there", capsys.readouterr().err
    )
    assert not list((tmp_path / "run").rglob("*.safetensors"))
