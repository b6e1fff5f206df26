"""A tokenizer whose tokens are bytes, for checkpoints of random weights: 259 tokens, made here, read by `transformers`.

Its first three tokens are padding, beginning and end; byte b is token 3 + b.
"""

import json

SPECIAL = ("<pad>", "<bos>", "<eos>")


def byte_tokenizer_files(chat_template: str | None = None) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, by name, and the chat template if one is given."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {token: number for number, token in enumerate([*SPECIAL, *_letters()])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **added} for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        **dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    }
    files = {"tokenizer.json": json.dumps(tokenizer), "tokenizer_config.json": json.dumps(config)}
    return files | ({} if chat_template is None else {"chat_template.jinja": chat_template})


def _letters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
