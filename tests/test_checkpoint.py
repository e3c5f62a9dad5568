"""Checkpoints that people really have: what loads, and one line for what does not."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import Started

import evaluate
from data import DataError
from engine.checkpoint import complete
from model import load_policy, save_policy, tiny_policy

WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"
TEXTS = ["<answer>\n\\boxed{red}\n</answer>"] * 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound checkpoint, to be copied and broken."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_policy(folder, TEXTS, vocabulary=330)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


def refusal(name, capfd):
    """The message of a checkpoint that is refused, and that nothing else is printed."""
    with pytest.raises(DataError) as error:
        load_policy(name)
    message = str(error.value)
    assert len(message) < 300
    assert "\n" not in message
    assert str(name) in message
    printed = capfd.readouterr()
    assert not printed.out + printed.err
    return message


# ------------------------------------------------------------------------------ ways to break one
def rename(folder, change):
    """Write the weights with other names. change: name -> name, or None to leave it out."""
    weights = load_file(folder / WEIGHTS)
    renamed = {change(name): tensor for name, tensor in weights.items()}
    renamed.pop(None, None)
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})


def without_vision(folder):
    names = [name for name in load_file(folder / WEIGHTS) if name.startswith("visual.")]
    assert len(names) > 5
    rename(folder, lambda name: None if name in names[:5] else name)


def without_head(folder):
    rename(folder, lambda name: None if name == "lm_head.weight" else name)


def wrapped(folder):
    """As torch's DistributedDataParallel names them."""
    rename(folder, "module.{}".format)


def compiled(folder):
    """As torch.compile names them."""
    rename(folder, "_orig_mod.{}".format)


def with_value_head(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "v_head.weight": torch.zeros(3)}, folder / WEIGHTS)


def of_other_shapes(folder):
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def in_parts(folder):
    """As large models are saved: two files and an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {}
    for number, part in enumerate((list(weights)[::2], list(weights)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        chosen = {name: weights[name] for name in part}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def half(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def truncated(folder):
    half(folder / WEIGHTS)


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def pointer(folder):
    """What git leaves in the place of a large file that was not fetched."""
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")


def truncated_part(folder):
    in_parts(folder)
    half(folder / "model-00002-of-00002.safetensors")


def without_part(folder):
    in_parts(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")


def without(*names):
    def broken(folder):
        for name in names:
            (folder / name).unlink()

    return broken


def holding(name, text):
    """A file of it has another content; an object is written as JSON."""

    def broken(folder):
        content = text if isinstance(text, str) else json.dumps(text)
        (folder / name).write_text(content)

    return broken


def changed(name, **values):
    """Some values in a JSON file of it are others."""

    def broken(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return broken


def adapter(folder):
    """What peft saves of LoRA: no model and no configuration of one."""
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    about = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def adapter_with_config(folder):
    shutil.copy(folder / "config.json", folder / "kept")
    adapter(folder)
    (folder / "kept").rename(folder / "config.json")


def with_awq(folder):
    quantization = {"quant_method": "awq", "bits": 4}
    changed("config.json", quantization_config=quantization)(folder)


def other_image_token(folder):
    """A tokenizer of another family, under whose chat format no image would be seen."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|image_pad|>", "<image_soft_token>"))


BROKEN = {  # name: (how, what the message names)
    "five vision tensors are missing": (without_vision, "5 missing", "visual.blocks.0"),
    "the head is missing": (without_head, "1 missing", "lm_head.weight"),
    "names of DDP": (wrapped, "missing", "unexpected", "module."),
    "names of torch.compile": (compiled, "missing", "unexpected", "_orig_mod."),
    "a value head": (with_value_head, "1 unexpected", "v_head.weight"),
    "other shapes": (of_other_shapes, "mismatched", "lm_head.weight"),
    "truncated": (truncated, WEIGHTS),
    "empty": (empty, WEIGHTS),
    "a pointer of git": (pointer, WEIGHTS),
    "one part is truncated": (truncated_part, "model-00002-of-00002.safetensors"),
    "one part is missing": (without_part, "model-00002-of-00002.safetensors"),
    "a pickle that is none": (pickled, "model"),
    "no weights": (without(WEIGHTS), WEIGHTS),
    "an adapter": (adapter, "adapter"),
    "an adapter and a config": (adapter_with_config, "adapter"),
    "quantized": (with_awq, "model", "awq"),
    "no template": (without("chat_template.jinja"), "chat template"),
    "a template that is none": (holding("chat_template.jinja", "{% for m in %}"), "chat template"),
    "a template without texts": (
        holding("chat_template.jinja", "{{ messages[0].role }}"),
        "chat template",
    ),
    "no tokenizer.json": (without("tokenizer.json"), "tokenizer"),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "tokenizer",
    ),
    "a tokenizer that is none": (holding("tokenizer.json", "{"), "tokenizer"),
    "a tokenizer of another family": (other_image_token, "tokenizer", "<|image_pad|>"),
    "no processor": (without(PROCESSOR), PROCESSOR),
    "a processor that is none": (holding(PROCESSOR, "{"), PROCESSOR),
    "a processor of another family": (
        holding(PROCESSOR, {"image_processor_type": "CLIPImageProcessor"}),
        PROCESSOR,
    ),
    "no config": (without("config.json"), "config.json"),
    "a config that is no JSON": (holding("config.json", "no JSON"), "config.json"),
    "a config that is a list": (holding("config.json", "[1]"), "config.json", "model_type"),
    "a run without a step": (
        holding("config.json", {"steps": 80, "task": "image"}),
        "step_N",
        "model_type",
    ),
    "a text model": (holding("config.json", {"model_type": "qwen2"}), "qwen2;", "qwen2_5_vl"),
    "LLaVA": (holding("config.json", {"model_type": "llava"}), "llava;", "qwen2_5_vl"),
    "an unknown model": (holding("config.json", {"model_type": "next_year"}), "next_year"),
    "no model type": (changed("config.json", model_type=None), "config.json"),
    "a config of nonsense": (
        changed("config.json", text_config={"hidden_size": "many"}),
        "config.json",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(name, folder, capfd):
    broken, *words = BROKEN[name]
    broken(folder)
    message = refusal(folder, capfd)
    for word in words:
        assert word.lower() in message.replace(str(folder), "").lower()


def test_a_tokenizer_with_tokens_that_the_model_does_not_know(folder, capfd):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    assert "tokenizer" in refusal(folder, capfd)


def test_a_template_that_shows_images_by_other_words(folder, capfd):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|image_pad|>", "<image>"))
    assert "chat template" in refusal(folder, capfd)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct-typo", "runs/imgae", "a b/c"])
def test_a_hub_name_that_cannot_be_reached(name, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(name, capfd)
    assert "no such folder" in message
    assert "hub" in message


@pytest.mark.parametrize("name", ["/missing", "./missing", "Qwen", "https://hub/Qwen/Qwen2.5-VL"])
def test_a_name_that_is_neither_a_folder_nor_of_the_hub(name, capfd):
    assert "no such folder" in refusal(name, capfd)


# ------------------------------------------------------------------------------------- what loads
def logits(policy):
    ids = torch.tensor([policy.tokenizer("What is it?").input_ids])
    with torch.no_grad():
        return policy.model(input_ids=ids).logits


def test_loading_and_saving_print_nothing(whole, tmp_path, capfd):
    save_policy(load_policy(whole), tmp_path)
    tiny_policy(tmp_path, TEXTS, vocabulary=330)
    printed = capfd.readouterr()
    assert not printed.out + printed.err


def test_the_loggers_of_others_speak_again_afterwards(whole, folder, caplog):
    truncated(folder)
    with pytest.raises(DataError):
        load_policy(folder)
    load_policy(whole)
    logging.getLogger("somebody").warning("still heard")
    assert "still heard" in caplog.text


def test_weights_in_parts_load(whole, folder):
    in_parts(folder)
    assert torch.equal(logits(load_policy(folder)), logits(load_policy(whole)))


def newer(name):
    """The name of a tensor as newer versions of transformers write it."""
    head, _, rest = name.partition(".")
    names = {"visual": f"model.visual.{rest}", "model": f"model.language_model.{rest}"}
    return names.get(head, name)


def test_weights_under_the_names_of_newer_versions_load(whole, folder):
    rename(folder, newer)
    assert torch.equal(logits(load_policy(folder)), logits(load_policy(whole)))


def test_weights_in_bfloat16_load_in_the_precision_asked_for(whole, folder):
    weights = load_file(folder / WEIGHTS)
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})
    changed("config.json", dtype="bfloat16")(folder)
    policy = load_policy(folder)
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
    assert torch.allclose(logits(policy), logits(load_policy(whole)), atol=0.1)
    half_precision = load_policy(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half_precision.model.parameters()} == {torch.bfloat16}


def test_tied_embeddings_load_without_a_head_of_their_own(whole, tmp_path):
    made = load_policy(whole)
    made.model.config.tie_word_embeddings = True
    made.model.config.get_text_config().tie_word_embeddings = True
    made.model.tie_weights()
    save_policy(made, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in weights
    for extra in ({}, {"lm_head.weight": made.model.lm_head.weight.detach().clone()}):
        save_file({**weights, **extra}, tmp_path / WEIGHTS, metadata={"format": "pt"})
        loaded = load_policy(tmp_path)
        assert torch.equal(logits(loaded), logits(made))
        head = loaded.model.lm_head.weight
        assert head.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()


def test_the_folder_of_a_run_is_its_newest_step(whole, tmp_path):
    """By number, and whatever else lies beside; what a kill left behind counts for nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"steps": 80, "task": "image"}))
    for number in (5, 10, 9):
        step = shutil.copytree(whole, tmp_path / f"step_{number}")
        weights = load_file(step / WEIGHTS)
        weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], number)
        save_file(weights, step / WEIGHTS, metadata={"format": "pt"})
    shutil.copytree(whole, tmp_path / "step_10_old")
    shutil.copytree(whole, tmp_path / "step_best")
    (tmp_path / "step_11").mkdir()
    for name in (tmp_path, str(tmp_path)):
        assert float(load_policy(name).model.lm_head.weight[0, 0].detach()) == 10
    assert float(load_policy(tmp_path / "step_9").model.lm_head.weight[0, 0].detach()) == 9


def test_a_copy_of_a_step_does_not_disturb_resuming(tmp_path):
    (tmp_path / "state").mkdir()
    for name in ("step_2", "step_10", "step_2_old"):
        (tmp_path / name).mkdir()
        (tmp_path / "state" / f"{name}.pt").touch()
    assert [file.stem for file in complete(tmp_path)] == ["step_2", "step_10"]


# ----------------------------------------------------------------------------- the command line
def one_row(folder):
    """A data file with one question."""
    Image.new("RGB", (56, 56), "red").save(folder / "red.png")
    row = dict(question="?", answer="red", image_path="red.png")
    (folder / "rows.json").write_text(json.dumps([row]))
    return folder / "rows.json"


def command(folder, *words):
    """`python train.py --model FOLDER --data …` -> exit code, and the lines on the terminal."""
    settings = ["--model", folder, "--data", one_row(folder.parent)]
    settings += ["--out", folder.parent / "run", *words]
    process = Started(folder.parent / "text", *settings)
    return process.wait(), process.text.splitlines()


TRIED = """five vision tensors are missing, names of DDP, truncated, an adapter, no template,
    no tokenizer, a text model, LLaVA"""


@pytest.mark.parametrize("name", [name.strip() for name in TRIED.split(",")])
def test_the_command_ends_with_one_line_and_exit_code_2(name, folder):
    broken, *_ = BROKEN[name]
    broken(folder)
    code, lines = command(folder)
    assert code == 2
    greeting = {"policy", "data", "run", "train.py:"}
    assert {line.split()[0] for line in lines} <= greeting
    (line,) = [line for line in lines if line.startswith("train.py:")]
    assert line == lines[-1]
    assert str(folder) in line


@pytest.mark.parametrize("name", ["names of DDP", "truncated", "LLaVA"])
def test_an_evaluation_ends_so_too(name, folder):
    broken, *_ = BROKEN[name]
    broken(folder)
    words = ["--model", folder, "--data", one_row(folder.parent)]
    words += ["--out", folder.parent / "results"]
    process = Started(folder.parent / "text", list(map(str, words)), target=evaluate.main)
    assert process.wait() == 2
    assert str(folder) in process.text.splitlines()[-1]
    assert not (folder.parent / "results" / "results.json").exists()


@pytest.mark.parametrize("lr", ["-1e-6", "nan"])
def test_a_learning_rate_that_is_none(lr, folder):
    code, lines = command(folder, "--lr", lr)
    assert code == 2
    assert len(lines) == 1
    assert "--lr" in lines[0]
