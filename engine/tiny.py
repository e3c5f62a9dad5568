"""The tiny policy: Qwen2.5-VL's architecture, special tokens and chat format at 0.8 M parameters.

Its tokenizer is a byte-level BPE that does not stop at words. Code is boilerplate, and few tokens a
turn are what makes a laptop fast enough. An image becomes four tokens of 28 x 28 pixels.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.checkpoint import quiet

CHAT_TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}\
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_tiny_policy(folder, texts: list[str], seed: int, vocabulary: int) -> None:
    """Write a random policy to `folder`. texts: what its tokenizer is trained on."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    special = [f"<|{name}|>" for name in names]
    chat = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * len(texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*texts, *chat], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
    )
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=True))
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.08,  # at 0.02 it learned several times slower
        bos_token_id=None,
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
    )
    vision = dict(
        hidden_size=64,
        depth=2,
        num_heads=4,
        intermediate_size=128,
        out_hidden_size=96,
        fullatt_block_indexes=[0, 1],
        initializer_range=0.08,
    )
    config = Qwen2_5_VLConfig(
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
        text_config=text,
        vision_config=vision,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56).save_pretrained(folder)
